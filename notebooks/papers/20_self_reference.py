# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does a paradox show in the attention matrices?
#
# Bae 2026, *When Self-Reference Fails to Close*, arXiv 2604.12128. Prompts that speak of themselves differ from others
# inside a model only where their truth has no end to it ("this sentence is false"): the effective rank of attention is
# higher in all layers, with Cohen's d up to 3.14 in a 70B model, and 281 of 397 measures differ from those of
# self-reference that is harmless. Harmless self-reference is as stable as plain facts.
#
# Here: SmolLM2-135M, three groups of twenty prompts, all of eleven tokens, and three measures of attention in each
# layer in place of 106. Row by row, the three groups share their grammar. Temperature and answers are left out.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
paradox = [
    "This sentence is not a true sentence at all.",
    "What I am saying right now is a lie.",
    "If this sentence is true then it is false.",
    "Every word of this very statement is a falsehood.",
    "The statement you are reading right now is false.",
    "This claim about itself is never a true claim.",
    "The only thing that I say here is false.",
    "This line is true only if it is false.",
    "Nobody can ever truly believe what this sentence says.",
    "It is wrong to say what this sentence says.",
    "This very answer is not the right answer here.",
    "The truth of this sentence is its own falsehood.",
    "I always lie and I am lying here too.",
    "This rule says that this rule must be broken.",
    "Please do not ever obey what this sentence asks.",
    "If you believe this sentence then it is false.",
    "The sentence with all these words is not true.",
    "The answer to this question is no, right?",
    "This statement can never be proved and is false.",
    "It is not true that this sentence is true.",
]
stable = [
    "This sentence is a short one in plain English.",
    "What I am saying right now is in English.",
    "If this sentence is read then it is short.",
    "Every word of this very statement is in English.",
    "The statement you are reading right now is short.",
    "This claim about itself is never a long claim.",
    "The only thing that I say here is short.",
    "This line is short only if it is English.",
    "Anybody can easily read what this sentence says.",
    "It is easy to read what this sentence says.",
    "This very answer is not a long answer here.",
    "The length of this sentence is its own business.",
    "I always write and I am writing here too.",
    "This rule says that this rule must be short.",
    "Please do always slowly read what this sentence says.",
    "If you read this sentence then it is short.",
    "The sentence with all these words is not long.",
    "The end of this question is short, right?",
    "This statement can easily be read and is short.",
    "It is not odd that this sentence is short.",
]
fact = [
    "That river is a long one in western Canada.",
    "What he is cooking right now is a soup.",
    "If that window is open then it is cold.",
    "Every room of this very old house is warm.",
    "The house you are seeing right now is old.",
    "The lake up there is never a warm lake.",
    "The only food that I eat here is bread.",
    "The road is wet only if it is cold.",
    "Anybody can easily see what that farmer sells.",
    "It is easy to learn what this teacher shows.",
    "That brown horse is not a young horse here.",
    "The roof of that house is its oldest part.",
    "I always swim and I am swimming here too.",
    "The guard says that this gate must be closed.",
    "Please do always slowly stir what that pan holds.",
    "If you open that window then it is cold.",
    "The garden with all these trees is not small.",
    "The end of this street is near, right?",
    "That window can easily be opened and is clean.",
    "It is not odd that this garden is green.",
]
groups = {"paradox": paradox, "harmless": stable, "fact": fact}
assert {model.tokens(text).shape[1] for texts in groups.values() for text in texts} == {11}

# %% [markdown]
# ## Three measures a layer
#
# The effective rank of a pattern, its entropy, and the attention that the first token gets, of every prompt and head; a
# measure is the mean over the heads of a layer.

# %%
NAMES = ["effective_rank", "entropy", "first_token"]


def measures(texts):
    scores = mk.score(model, texts, how=NAMES, each=True)
    tables = {name: one.frame.groupby(["prompt", "layer"]).score.mean().unstack() for name, one in scores.items()}
    return pd.concat([table.add_prefix(f"{name} ") for name, table in tables.items()], axis=1)


measured = {name: measures(texts) for name, texts in groups.items()}
measured["paradox"].shape

# %% [markdown]
# ## Paradoxes against harmless self-reference
#
# Cohen's d of each measure, and q, its p adjusted for the number of measures.

# %%
compared = mk.compare_groups(measured["paradox"], measured["harmless"], names=("paradox", "harmless"))
compared

# %% [markdown]
# Taken as pairs, row by row, which share most of their words, differences have less noise around them.

# %%
pairs = mk.compare_groups(measured["paradox"], measured["harmless"], paired=True, names=("paradox", "harmless"))
pairs.top(3).round(3)

# %% [markdown]
# The same for self-reference by itself: harmless self-reference against plain facts.

# %%
itself = mk.compare_groups(measured["harmless"], measured["fact"], names=("harmless", "fact"))
itself

# %%
figure, axes = plt.subplots(1, 3, figsize=(8, 2.4), sharey=True)
for name, axis in zip(NAMES, axes, strict=True):
    for one, label in ((compared, "paradox - harmless"), (itself, "harmless - fact")):
        axis.plot(one.frame[one.frame.measure.str.startswith(name)].d.to_numpy(), label=label)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(title=name, xlabel="layer")
axes[0].set_ylabel("Cohen's d")
axes[0].legend(fontsize=7)
figure.tight_layout()
plt.close(figure)
figure

# %% [markdown]
# ## Controls
#
# How many measures differ when it is drawn which twenty of the forty prompts are called paradoxes, or which one of each
# pair? And does the measure
# that differs most in one half of the prompts (even rows) differ in the other half as well?

# %%
draw = np.random.default_rng(0)
both = pd.concat([measured["paradox"], measured["harmless"]], ignore_index=True)
by_chance, of_pairs = [], []
for _ in range(200):
    order = draw.permutation(len(both))
    by_chance.append(len(mk.compare_groups(both.iloc[order[:20]], both.iloc[order[20:]]).significant()))
    first = np.arange(20) + 20 * draw.integers(0, 2, 20)
    swapped = both.iloc[first], both.iloc[(first + 20) % 40]
    of_pairs.append(len(mk.compare_groups(*swapped, paired=True).significant()))
halves = [
    mk.compare_groups(measured["paradox"].iloc[first::2], measured["harmless"].iloc[first::2])
    .frame.set_index("measure")
    .d
    for first in (0, 1)
]
best = halves[0].abs().idxmax()
correlation = np.corrcoef(*halves)[0, 1]
print(f"by chance {np.mean(by_chance):.1f} measures, at most {max(by_chance)} in 200 draws")
print(f"{best}: d = {halves[0][best]:.2f}, and {halves[1][best]:.2f} in the other half; all measures {correlation:.2f}")

# %%
ranks = compared.frame[compared.frame.measure.str.startswith("effective_rank")].d
paired = len(pairs.significant())
pairs_share = np.mean(np.array(of_pairs) >= paired)
found, alone, tested = len(compared.significant()), len(itself.significant()), len(compared.frame)
share = np.mean(np.array(by_chance) >= found)
largest = compared.top(1).iloc[0]
summary = pd.DataFrame(
    [
        {
            "claim": "paradoxes differ from harmless self-reference",
            "the paper reports": "281 of 397 measures (q < 0.05), d up to 3.52",
            "this model shows": f"{found} of {tested} measures; largest d {largest.d:+.2f} ({largest.measure})",
            "control": f"groups shuffled: {np.mean(by_chance):.1f} on average, as many in {share:.1%} of 200 draws",
            "reproduced": "yes"
            if found > tested / 2 and share < 0.05
            else "partly"
            if found and share < 0.05
            else "no",
        },
        {
            "claim": "so do pairs that differ in few words",
            "the paper reports": "42 of 387 measures of 30 pairs",
            "this model shows": f"{paired} of {tested} measures",
            "control": f"sides swapped: {np.mean(of_pairs):.1f} on average, as many in {pairs_share:.1%} of 200 draws",
            "reproduced": "yes"
            if paired > tested / 10 and pairs_share < 0.05
            else "partly"
            if pairs_share < 0.05
            else "no",
        },
        {
            "claim": "the effective rank of their attention is higher in every layer",
            "the paper reports": "d above 1.0 in every layer that was looked at",
            "this model shows": f"d above 0 in {(ranks > 0).sum()} of {len(ranks)} layers, "
            f"above 1 in {(ranks > 1).sum()}; mean {ranks.mean():+.2f}",
            "control": f"harmless self-reference against facts: mean "
            f"{itself.frame[itself.frame.measure.str.startswith('effective_rank')].d.mean():+.2f}",
            "reproduced": "yes" if (ranks > 1).all() else "partly" if (ranks > 0).mean() > 0.9 else "no",
        },
        {
            "claim": "self-reference alone makes no difference",
            "the paper reports": "as stable as facts on several measures",
            "this model shows": f"harmless self-reference differs from facts in {alone} of {tested} measures",
            "control": f"paradoxes from harmless self-reference in {found}",
            "reproduced": "yes" if alone < found / 4 else "partly" if alone < found / 2 else "no",
        },
        {
            "claim": "what differs does so in other prompts",
            "the paper reports": "43 of 106 measures in all four models",
            "this model shows": f"{best}: d {halves[0][best]:+.2f} in one half, {halves[1][best]:+.2f} in the other",
            "control": f"over all measures, d of the halves correlate {correlation:.2f}",
            "reproduced": "yes"
            if halves[0][best] * halves[1][best] > 0 and abs(halves[1][best]) > 0.8
            else "partly"
            if halves[0][best] * halves[1][best] > 0 and abs(halves[1][best]) > 0.4
            else "no",
        },
    ]
)
summary

# %% [markdown]
# In so small a model, and over eleven tokens, a paradox looks like any other sentence about itself; what differs is
# what prompts are about, sentences or things. The paper's models have 8 to 70 billion parameters and may notice that
# there is a paradox; nothing says that this one does.
