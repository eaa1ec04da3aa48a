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
# # Are there attention sinks besides the first token?
#
# Wong et al. 2025, arXiv 2512.22213, on secondary attention sinks. The first token holds much of the attention in many
# layers (the primary sink). Other tokens become sinks in middle layers: an MLP turns their stream into the direction of
# the first token's, and they hold attention for some layers. They are found in 11 families of models, with several
# levels of them in the larger ones.
#
# Here: SmolLM2-135M and six short texts of 40 tokens, worked examples and prose; the paper has long reasoning texts and
# thresholds for 48 layers, which are shares of the layers here. Every text begins with the same special token, and so
# what is seen at it is the same in all. The block that makes the sink is therefore found with that token, and tested in
# three texts without it, whose first tokens are others.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
texts = [
    "Question: Anna has 12 apples and buys 7 more.\nHow many are there?\nAnswer: 12 + 7 = 19.\nShe gives 4 of them to "
    "Tom. 19 - 4 = 15.\nThere are 15 left.",
    "The river runs through the middle of the town. In the morning, people cross the bridge on their way to work, "
    "while the shops on the square open one after another. When it rains, the water rises a little.",
    "First, we write x + 3 = 10.\nThen, we take 3 from both sides, so x = 7.\nWait, let us check: 7 + 3 = 10.\nSo the "
    "answer is x = 7.\n\nThis is right.",
    "Step 1: The train leaves at 3.\nStep 2: It arrives at 6.\nStep 3: That is 3 hours.\nStep 4: 3 times 60 miles is "
    "180 miles.\nThe answer is 180.",
    "Most of the older houses stand along the banks. There is a market twice a week, where farmers sell bread, apples "
    "and cheese, and on Sundays a small band plays in front of the church until late in the evening.",
    "Hmm, is 21 a prime number? 21 divided by 2 is not whole. 21 divided by 3 is 7.\nSo 21 is 3 times 7.\nThus 21 is "
    "not a prime number, and we are done.",
]
assert min(model.tokens(text).shape[1] for text in texts) >= 40
ids = torch.cat([model.tokens(text)[:, :40] for text in texts])
bare = ids[3:, 1:]
other = int(np.random.default_rng(0).integers(2, 20))  # a position to compare the first one with

# %% [markdown]
# ## All sinks
#
# A later token is a sink where its stream is nearly parallel to the first token's. A row a sink of any text, first with
# the special token, then without.

# %%
found = mk.score(model, ids, how="sinks")
block = int(found.frame[found.frame.label == "primary"].layer.mode()[0])
found.frame.round(2)

# %%
without = mk.score(model, bare, how="sinks")
without.frame.round(2)

# %% [markdown]
# How much attention does the first token get, head by head, and how much another one?

# %%
first = mk.score(model, ids, how="first_token")
elsewhere = mk.score(model, ids, how="share", span=other)
print(
    f"first token {first.frame.score.mean():.2f}, token {other} {elsewhere.frame.score.mean():.2f} (means over heads)"
)
first.plot()

# %% [markdown]
# ## The jump of the norm

# %%
streams = [f"resid.{i}" for i in range(model.n_layers + 1)]
run = model.run(ids, record=streams)
norms = torch.stack([run[one].norm(dim=-1) for one in streams])  # [stream, text, position]
own, others = (float((norms[block + 1] / norms[block])[:, at].mean()) for at in (0, other))
start, stop = found.meta["layers"][0]
inside = torch.stack([run[one] for one in streams[start : stop + 1]])  # where the first token is a sink
nearest = float(torch.cosine_similarity(inside[:, :, :1], inside[:, :, 1:], dim=-1).abs().max())
print(f"norm times {own:.0f} in block {block}, of token {other} times {others:.2f}")
print(f"the largest cosine of another token with the first, in resid.{start} to resid.{stop}: {nearest:.2f}")
figure, axes = plt.subplots(figsize=(5, 2.6))
for at, label in ((0, "first token"), (other, f"token {other}")):
    axes.plot(norms[:, :, at].mean(1), label=label)
axes.plot(norms[:, :, 1:].amax(2).mean(1), "--", color="grey", label="largest of all others")
axes.set(xlabel="blocks passed", ylabel="norm of the stream", yscale="log")
axes.legend(fontsize=7)
figure.tight_layout()
plt.close(figure)
figure

# %% [markdown]
# Of the 576 dimensions of the stream, few are ever as large as that of the jump (507).

# %%
massive = mk.score(model, ids, how="massive_dims", tau=0.6 * model.d_model**0.5)
massive.frame

# %% [markdown]
# ## Which branch makes it?
#
# In the texts without the special token, the MLP of the block that makes the sink is taken out at the first token
# alone, and so are its heads, and the MLPs of the six blocks around it, one at a time.

# %%
patterns = [f"{head}.pattern" for head in model.heads() if head.layer > block]


def to_first(*edits):
    """Attention to the first token in the blocks behind, a mean over heads, texts and queries."""
    run = model.run(bare, record=patterns, edits=edits)
    return float(torch.stack([run[one][:, 1:, 0] for one in patterns]).mean())


heads_of_block = [head for head in model.heads() if head.layer == block]
kept = {
    "nothing": to_first(),
    f"m{block}": to_first(mk.ablate(f"m{block}", positions=0)),
    f"heads of {block}": to_first(mk.ablate(heads_of_block, positions=0)),
}
around = [i for i in range(block - 3, block + 4) if i != block]
kept |= {f"m{i}": to_first(mk.ablate(f"m{i}", positions=0)) for i in around}
pd.DataFrame({"taken out": kept.keys(), "attention to the first token": kept.values()}).round(3)

# %%
primary = without.frame[without.frame.label == "primary"]
by_mlp = int(((primary.source == "mlp") & (primary.layer == block)).sum())
least = min(kept[f"m{i}"] for i in around)
both = pd.concat([found.frame, without.frame.assign(prompt=without.frame.prompt + len(ids))])
later = both[both.label.isin(["secondary", "primary-like"])]
noise, seen = int((both.label == "noise").sum()), later.groupby("prompt").ngroups
candidates, runs = ids[:, 1:].numel() + bare[:, 1:].numel(), len(ids) + len(bare)
summary = pd.DataFrame(
    [
        {
            "claim": "the first token is a sink",
            "the paper reports": "in all models, as known before",
            "this model shows": f"{first.frame.score.mean():.0%} of the attention; "
            f"{(first.frame.score > 0.5).sum()} of {len(first)} heads give it more than half",
            "control": f"token {other}: {elsewhere.frame.score.mean():.1%}",
            "reproduced": "yes" if first.frame.score.mean() > 5 * elsewhere.frame.score.mean() else "no",
        },
        {
            "claim": "its norm jumps in one block, by the MLP",
            "the paper reports": "an MLP of an early or middle layer makes it",
            "this model shows": f"norm times {own:.0f} in block {block}; by its MLP in {by_mlp} of {len(bare)} texts "
            f"without the special token; without m{block} at their first token it gets {kept[f'm{block}']:.0%} of the "
            f"attention, not {kept['nothing']:.0%}",
            "control": f"token {other}: times {others:.2f}; heads of block {block} out: "
            f"{kept[f'heads of {block}']:.0%}, other MLPs out: {least:.0%} or more",
            "reproduced": "yes"
            if own > 5 * others and by_mlp == len(bare) and kept[f"m{block}"] < 0.8 * least
            else "partly"
            if own > 5 * others
            else "no",
        },
        {
            "claim": "other tokens become sinks later",
            "the paper reports": "secondary sinks in 11 families, several levels in larger models",
            "this model shows": f"{len(later)} of {candidates} later tokens, in {seen} of {runs} runs",
            "control": f"cosine with the first token at most {nearest:.2f} (0.9 makes a sink); brief ones: {noise}",
            "reproduced": "yes" if seen > runs / 2 else "partly" if seen else "no",
        },
    ]
)
summary

# %% [markdown]
# The primary sink is made as the paper says of sinks, by one MLP in the middle of the model, at whatever token comes
# first. That no secondary sinks are found says little: texts are of forty tokens, and the paper's come out of long
# reasoning in larger models; and a token whose norm is as large as the first one's in early layers only, as the dashed
# line shows there is, does not count as one.
