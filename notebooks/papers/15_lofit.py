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
# # Which heads are worth fitting?
#
# Yin et al. 2024, *LoFiT*, arXiv 2406.01563. Fine-tuning in two stages: first a scale for every number that heads
# give, with a penalty, to see which heads it changes most; then only a vector for each of the few best heads, added
# to what they give. The paper reports results near those of LoRA with 20 to 200 times fewer parameters, and that
# fitting heads chosen in this way is better than fitting others.
#
# Here: SmolLM2-135M instead of models of 2B to 13B, sentences with two labels instead of TruthfulQA, MQuAKE and
# CLUTRR, 8 of 270 heads (3%, as in the paper), and few steps. Both kinds of heads are fitted in the same way, to the
# same prompts; results are of sentences with other words.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import bootstrap

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")


def sentiment(words, nouns, name):
    rows = []
    for noun in nouns:
        for good, bad in words:
            twins = [f"The {noun} was {word}:" for word in (good, bad)]
            rows.append((*twins, " good", " bad"))
            rows.append((*twins[::-1], " bad", " good"))
    return mk.Task.from_frame(pd.DataFrame(rows, columns=["clean", "corrupt", "correct", "wrong"]), model, name=name)


train = sentiment(
    [("wonderful", "terrible"), ("lovely", "awful"), ("excellent", "horrible"), ("superb", "boring")],
    ["film", "meal", "game", "room"],
    "train",
)
held_out = sentiment(
    [("delightful", "dreadful"), ("amazing", "nasty"), ("brilliant", "ugly"), ("charming", "poor")],
    ["hotel", "book", "song", "garden"],
    "held-out",
)
print(train, held_out, sep="\n")

# %% [markdown]
# Stage 1: a scale for each of the 64 numbers of every head, with a penalty on what differs from 1. A head's score is
# how far its scales have moved.

# %%
first = mk.fit(
    model, train, mk.scale(model.heads()), held_out=held_out, steps=40, lr=1e-2, l1=1e-3, every=20, progress=False
)
chosen = first.scores.heads(8)
print(f"chosen: {chosen}")
first.scores.plot()

# %% [markdown]
# Stage 2: a vector for each chosen head, from zero. In the same way for as many random heads of the same layers,
# three draws.


# %%
def second(heads):
    return mk.fit(model, train, mk.steer(heads), held_out=held_out, steps=30, lr=2e-2, every=15, progress=False)


draws = [chosen.random_like(seed=seed) for seed in range(3)]
fits = {"chosen": second(chosen), **{f"random {i}": second(heads) for i, heads in enumerate(draws)}}
pd.DataFrame({name: one.history.set_index("step").validation for name, one in fits.items()}).round(3)

# %% [markdown]
# Held-out prompts: whether the right label has the larger logit of the two, and its log-probability of the two.


# %%
def log_choice(logits, task):
    return torch.nn.functional.logsigmoid(mk.metrics.logit_diff(logits, task))


logits = {"none": model.run(held_out).logits}
logits |= {name: model.run(held_out, edits=one.edits).logits for name, one in fits.items()}
right = {name: (mk.metrics.logit_diff(one, held_out) > 0).float().mean().item() for name, one in logits.items()}
sure = {name: log_choice(one, held_out).numpy() for name, one in logits.items()}
table = pd.DataFrame({"accuracy": right, "log-probability": {name: one.mean() for name, one in sure.items()}})
table.round(3)

# %% [markdown]
# The difference prompt by prompt: chosen heads less the mean of the random draws.

# %%
random_mean = np.mean([sure[name] for name in sure if name.startswith("random")], axis=0)
difference = sure["chosen"] - random_mean
low, high = bootstrap((difference,), np.mean, random_state=0, method="percentile").confidence_interval
gain = sure["chosen"] - sure["none"]
gain_low, gain_high = bootstrap((gain,), np.mean, random_state=0, method="percentile").confidence_interval
fig, ax = plt.subplots(figsize=(5, 2.4))
ax.hist(difference, bins=15)
ax.axvline(0, color="black", linewidth=1)
ax.set(xlabel="log-probability, chosen less random heads", ylabel="held-out prompts")
plt.show()
print(f"mean {difference.mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f}")

# %%
others = [right[name] for name in right if name.startswith("random")]
numbers = len(chosen) * model.d_head
summary = pd.DataFrame(
    [
        {
            "claim": "vectors at a few heads teach the task",
            "the paper reports": "near LoRA with 20 to 200 times fewer parameters",
            "this model shows": f"accuracy {right['none']:.2f} to {right['chosen']:.2f} with {numbers} numbers; "
            f"log-probability {gain_low:+.2f} to {gain_high:+.2f}",
            "control": f"without a fit: {right['none']:.2f}; LoRA was not tried",
            "reproduced": "partly" if gain_low > 0 else "no",
        },
        {
            "claim": "chosen heads are better to fit than random ones",
            "the paper reports": "better than random and other choices",
            "this model shows": f"log-probability {difference.mean():+.3f} ({low:+.3f} to {high:+.3f}), "
            f"accuracy {right['chosen']:.2f}",
            "control": f"random heads of the same layers: accuracy {min(others):.2f} to {max(others):.2f}",
            "reproduced": "yes" if low > 0 else "no",
        },
    ]
)
summary

# %% [markdown]
# What the first stage ranks highest is also what is best to fit, and by an interval that tells; but the task is easy:
# the model had most labels right before, and random heads of the same layers come close. One small model, one task.
