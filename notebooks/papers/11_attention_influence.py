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
# # Which texts need the heads that look things up?
#
# Hua et al. 2025, *AttentionInfluence*, arXiv 2505.07293. The score of a text is how much its loss rises, in
# proportion, when the 5% of heads that retrieve best attend evenly instead. Texts with high scores call for reasoning;
# pretraining on the fifth of a corpus that scores highest makes a model better at benchmarks.
#
# Here: SmolLM2-135M, which is at chance when it has to look something up in a list, so that its retrieval heads cannot
# be ranked. In their place stand its induction heads, found on random tokens. They are masked in twelve short texts of
# two kinds, beside random heads of the same layers. Nothing is pretrained.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
worked = [
    "Peter is older than Lucy, and Lucy is older than Mark. Who is the youngest? Peter is older than Lucy, so it is "
    "not Peter. Lucy is older than Mark, so the youngest is Mark.",
    "The key is in the drawer, and the drawer is in the desk. Where is the key? The drawer is in the desk, so the "
    "key is in the desk as well.",
    "Ducks are brown, and geese are white. This bird is not brown. Is it a duck or a goose? Ducks are brown, so it "
    "is no duck. The bird is a goose.",
    "When it rains, the street is wet, and when the street is wet, the bus is late. It rains. So the street is wet, "
    "and the bus is late.",
    "A train goes 60 miles in an hour. How far does it go in 3 hours? In an hour it goes 60 miles, so in 3 hours it "
    "goes 3 times 60 miles.",
    "Let x be 4 and let y be x plus 3. What is y plus x? Since x is 4, y is 4 plus 3, which is 7. So y plus x is 7 "
    "plus 4.",
]
plain = [
    "The river runs through the middle of the town, and most of the older houses stand along its banks. In the "
    "morning people cross the bridge on their way to work.",
    "Our new summer collection is here! Find light dresses, soft shirts and bright colors for every day, and enjoy "
    "free shipping on all orders this weekend.",
    "She opened the window and listened. Somewhere below, a dog barked twice, and a bicycle bell rang. It was going "
    "to be a hot day again.",
    "Twice a week there is a market, where farmers sell bread, apples and cheese. On Sundays a small band plays in "
    "front of the church until late.",
    "Visit our hotel by the sea and relax in large rooms with a view of the beach. Breakfast is served until noon, "
    "and parking is free for guests.",
    "Thanks so much for your letter. We were glad to hear about your garden and the children. Here the winter was "
    "long, but now the first flowers are out.",
]
texts = worked + plain
lengths = [np.mean([model.tokens(text).shape[1] for text in some]) for some in (worked, plain)]
print(f"tokens a text: worked {lengths[0]:.0f}, plain {lengths[1]:.0f}")

# %% [markdown]
# ## The heads
#
# The 5% with the largest induction score, on random tokens that are repeated.

# %%
induction = mk.score(model, how="induction")
heads = induction.heads(round(0.05 * len(induction)))
print(heads)
induction.plot()

# %% [markdown]
# ## The score of every text
#
# Beside it that of four draws of as many random heads in each layer.

# %%
influence = mk.score(model, texts, how="attention_influence", heads=heads, controls=4, progress=False)
table = influence.frame.assign(kind=["worked"] * len(worked) + ["plain"] * len(plain), begins=[t[:28] for t in texts])
table[["kind", "begins", "score", "random_mean", "random_min", "random_max", "base_loss"]].round(3)

# %%
figure, axes = plt.subplots(figsize=(6, 2.6))
at = np.arange(len(table))
axes.bar(at, table.score, color=["tab:blue" if kind == "worked" else "tab:orange" for kind in table.kind])
spread = [table.random_mean - table.random_min, table.random_max - table.random_mean]
axes.errorbar(at, table.random_mean, spread, fmt="o", color="black", markersize=3, linewidth=1, label="random heads")
axes.set(xlabel="text (worked blue, plain orange)", ylabel="rise of the loss (fraction)")
axes.legend(fontsize=7)
figure.tight_layout()
plt.close(figure)
figure

# %% [markdown]
# ## Token by token
#
# Where in a worked text does the loss rise?

# %%
influence.tokens(0).plot()

# %% [markdown]
# Induction heads should matter at a token that followed the same token before, and at others less.

# %%
rises = []
for number, text in enumerate(texts):
    ids = model.tokens(text)[0].tolist()
    rise = influence.tokens(number).frame.score.to_numpy()
    seen = [ids[i - 1 : i + 1] in [ids[j - 1 : j + 1] for j in range(1, i)] for i in range(1, len(ids))]
    rises += list(zip([number] * len(seen), seen, rise[1:], strict=True))
rises = pd.DataFrame(rises, columns=["text", "seen before", "rise"])
rises.groupby("seen before").rise.agg(["mean", "count"]).round(3)

# %% [markdown]
# Both differences have a control: that of kinds with the kinds shuffled, that of tokens with positions shuffled within
# their texts.


# %%
def apart(values, is_first):
    return values[is_first].mean() - values[~is_first].mean()


draw = np.random.default_rng(0)
kinds, score, random = (table.kind == "worked").to_numpy(), table.score.to_numpy(), table.random_mean.to_numpy()
gap, random_gap = apart(score, kinds), apart(random, kinds)
by_chance = np.array([apart(score, draw.permutation(kinds)) for _ in range(5000)])
p_kinds = (by_chance >= gap).mean()
before, rise = rises["seen before"].to_numpy(), rises.rise.to_numpy()
groups = [np.flatnonzero(rises.text == number) for number in range(len(texts))]
shuffles = [np.concatenate([draw.permutation(group) for group in groups]) for _ in range(1000)]
token_gap = apart(rise, before)
p_tokens = np.mean([apart(rise, before[one]) >= token_gap for one in shuffles])
beats = (table.score > table.random_max).sum()

# %%
summary = pd.DataFrame(
    [
        {
            "claim": "masking these heads costs more than masking random ones",
            "the paper reports": "retrieval heads matter more than others",
            "this model shows": f"loss up by {score.mean():.0%}, more than by every random draw in {beats} of "
            f"{len(texts)} texts",
            "control": f"random heads of the same layers: {random.mean():.0%}",
            "reproduced": "yes" if beats == len(texts) else "partly" if beats > len(texts) / 2 else "no",
        },
        {
            "claim": "texts that call for reasoning score higher",
            "the paper reports": "selected texts are richer in reasoning",
            "this model shows": f"worked {score[kinds].mean():.0%}, plain {score[~kinds].mean():.0%}; "
            f"kinds shuffled: as far apart in {p_kinds:.1%}",
            "control": f"by random heads: {random[kinds].mean():.0%} and {random[~kinds].mean():.0%}",
            "reproduced": "yes"
            if p_kinds < 0.05 and gap > 2 * abs(random_gap)
            else "partly"
            if p_kinds < 0.05 and gap > random_gap
            else "no",
        },
        {
            "claim": "the loss rises where the text goes on as it did before",
            "the paper reports": "(not of the paper: what induction heads are for)",
            "this model shows": f"{rise[before].mean():+.2f} nats there, {rise[~before].mean():+.2f} elsewhere",
            "control": f"positions shuffled: as far apart in {p_tokens:.1%}",
            "reproduced": "yes" if p_tokens < 0.05 else "no",
        },
        {
            "claim": "pretraining on what scores high makes better models",
            "the paper reports": "MMLU +1.4, GSM8K +2.7, HumanEval +3.5 points",
            "this model shows": "",
            "control": "",
            "reproduced": "not tested here",
        },
    ]
)
summary

# %% [markdown]
# Induction heads cost more than random ones, but how much a text needs them tells nothing here of whether it is worked
# out step by step. That is no test of the paper, which has retrieval heads of a model ten times as large, compares
# texts within a domain, and judges them by what a model learns from them.
