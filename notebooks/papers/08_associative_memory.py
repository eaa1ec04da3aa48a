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
# # Is an attention head an associative memory, and how much does it hold?
#
# Qiao 2025, *Understanding Transformers through the Lens of Pavlovian Conditioning*, arXiv 2508.08289. A head without
# softmax is a Hebbian memory: the sum of outer products of values and keys, from which a key reads its value back. The
# paper derives how the pairs interfere: what can be held for certain grows with the root of the head's width, what can
# be held on average with the width itself.
#
# Here: the law on random unit keys, then keys and values of real heads of SmolLM2-135M (64 wide), read back linearly
# and by softmax. The paper has theory and no such test on a pretrained model.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cosine_similarity, normalize

import mechkit as mk

torch.manual_seed(0)
pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
d = model.d_head
sizes = [4, 8, 16, 32, 64, 128, 192]

# %% [markdown]
# Random unit keys and values: one pair is read back from a memory of N. The squared error should be N / d.

# %%
errors, strange = [], []
for n in sizes:
    keys, values = normalize(torch.randn(50, n, d), dim=-1), normalize(torch.randn(50, n, d), dim=-1)
    memory = values.mT @ keys
    recalled = keys @ memory.mT
    errors.append(float((recalled - values).square().sum(-1).mean()))
    strange.append(float((recalled - values.roll(1, 1)).square().sum(-1).mean()))
slope = float(np.polyfit(np.array(sizes) / d, errors, 1)[0])
print(f"slope of the squared error by N / d: {slope:.3f}")
print(f"error at N = {sizes[0]}: {errors[0]:.2f}, to the value of another pair {strange[0]:.2f}")

# %% [markdown]
# Real keys and values: three layers, every key/value group, of a text that the model reads. Nothing is fitted to them.

# %%
text = (
    "The harbour was quiet when the first boats came in. Two women mended nets on the wall, and a boy sold hot "
    "bread from a basket. Behind them the town climbed the hill in narrow streets, with shops for rope, lamps "
    "and paint. The baker knew everyone by name, the smith knew every horse, and the teacher knew which "
    "children had stayed at home. At noon a bell rang from the tower and the market closed for an hour. People "
    "ate soup, cheese and apples under the trees while dogs slept in the sun. Later the wind turned, clouds "
    "gathered over the islands, and the captain of the largest ship ordered his crew to wait. Nobody "
    "complained, because the inn was warm, its owner played the violin, and a traveller from the north told "
    "stories about ice, wolves and a river that ran backwards twice a year. In the evening the rain began, "
    "soft at first and then so loud on the roofs that the music stopped. A letter arrived for the doctor, who "
    "read it by candle light and smiled. By morning the sea was flat again and the boats were gone."
)
groups = [f"{layer}.kv{group}" for layer in (6, 15, 24) for group in range(model.n_kv_heads)]
run = model.run(text, record=[f"{one}.{kind}" for one in groups for kind in "kv"])
tokens = run.tokens.shape[1] - 1
assert tokens >= sizes[-1]
real = {one: (run[f"{one}.k"][0, 1:], run[f"{one}.v"][0, 1:]) for one in groups}
assert all(k.shape == v.shape == (tokens, d) for k, v in real.values())
print(f"{tokens} keys and values of {len(groups)} groups")

# %% [markdown]
# How close is what is read back to the value itself (cosine)? Linearly, by softmax over the same keys, and, as a
# control, beside the values of other tokens. Keys of one head have much in common: their mean is taken off first.


# %%
def recall(keys, values, softmax):
    """Mean cosine of what each key reads back with its own value, and with that of another token."""
    keys, values = keys - keys.mean(0), values - values.mean(0)
    unit = normalize(keys, dim=-1)
    weights = (keys @ keys.T / d**0.5).softmax(-1) if softmax else unit @ unit.T
    back = weights @ values
    other = values.roll(1, 0)
    return float(cosine_similarity(back, values).mean()), float(cosine_similarity(back, other).mean())


rows = []
for how in ("linear", "softmax"):
    for n in sizes:
        for one, (k, v) in real.items():
            own, other = recall(k[:n], v[:n], how == "softmax")
            rows.append({"how": how, "N": n, "group": one, "own": own, "other": other})
for n in sizes:
    own, other = recall(torch.randn(n, d), torch.randn(n, d), False)
    rows.append({"how": "random keys, linear", "N": n, "group": "", "own": own, "other": other})
curves = pd.DataFrame(rows).groupby(["how", "N"])[["own", "other"]].mean()
curves.unstack("how").round(2)

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
axes[0].plot(np.array(sizes) / d, errors, "o-")
axes[0].set(xlabel="N / d_head", ylabel="squared error", title="random unit keys")
for how, table in curves.groupby("how"):
    axes[1].plot(table.index.get_level_values("N"), table.own, "o-", label=how)
axes[1].plot(curves.loc["linear"].index, curves.loc["linear"].other, "--", color="grey", label="linear, other tokens")
axes[1].axvline(d, color="grey", linewidth=0.8)
axes[1].set(xlabel="N (line: d_head)", ylabel="cosine with the value", title="heads of SmolLM2-135M")
axes[1].legend(fontsize=7)
plt.close(figure)
figure

# %%
first, last = sizes[0], sizes[-1]
linear, soft, noise = (curves.loc[how] for how in ("linear", "softmax", "random keys, linear"))
summary = pd.DataFrame(
    [
        {
            "claim": "squared error of recall grows as N / d_head",
            "the paper reports": "interference in proportion to N / d (theory)",
            "this model shows": f"random unit keys: slope {slope:.2f}",
            "control": f"error at N = {sizes[0]}: {errors[0]:.2f}, to another pair's value {strange[0]:.2f}",
            "reproduced": "yes" if abs(slope - 1) < 0.1 else "no",
        },
        {
            "claim": "real heads, read linearly, lose their pairs as N passes d_head",
            "the paper reports": "of the order of d pairs on average (theory)",
            "this model shows": f"cosine {linear.own[first]:.2f} at N = {first}, {linear.own[64]:.2f} at 64, "
            f"{linear.own[last]:.2f} at {last}",
            "control": f"values of other tokens {linear.other[last]:.2f}; random keys {noise.own[64]:.2f} at 64",
            "reproduced": "yes" if linear.own[last] < linear.own[64] < linear.own[first] else "no",
        },
        {
            "claim": "softmax holds more than the linear memory",
            "the paper reports": "not tested on a pretrained model",
            "this model shows": f"softmax {soft.own[last]:.2f}, linear {linear.own[last]:.2f} at N = {last}",
            "control": f"softmax, values of other tokens {soft.other[last]:.2f}",
            "reproduced": "yes" if soft.own[last] > linear.own[last] else "no",
        },
    ]
)
summary

# %% [markdown]
# The law is one of random keys. Real keys are alike, so a head's linear memory blurs sooner than the law says; this
# measures how pairs interfere, not that the model uses its heads as such a memory.
