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
# # Does attention to the first token set how well a model answers?
#
# Han et al. 2025, *ZeroTuning*, arXiv 2505.11739. Most heads give much of their attention to the first token, a sink.
# The paper multiplies that attention by one factor gamma in chosen heads, without training, and reports better
# accuracy in classification, question answering and dialogue; the lower layers matter most.
#
# Here: SmolLM2-135M instead of models of 7B and more, and few-shot sentiment of short sentences with two labels.
# Layers and heads are profiled, and gamma is chosen, on training sentences; accuracy is of sentences with other
# words.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
SHOTS = "The soup was tasty: good\nThe bus was dirty: bad\n"


def sentiment(words, nouns, name):
    rows = []
    for noun in nouns:
        for good, bad in words:
            twins = [f"{SHOTS}The {noun} was {word}:" for word in (good, bad)]
            rows.append((*twins, " good", " bad"))
            rows.append((*twins[::-1], " bad", " good"))
    return mk.Task.from_frame(pd.DataFrame(rows, columns=["clean", "corrupt", "correct", "wrong"]), model, name=name)


train = sentiment(
    [("wonderful", "terrible"), ("lovely", "awful"), ("excellent", "horrible"), ("superb", "boring")],
    ["film", "meal"],
    "train",
)
held_out = sentiment(
    [("delightful", "dreadful"), ("amazing", "nasty"), ("brilliant", "ugly"), ("charming", "poor")],
    ["hotel", "book", "song"],
    "held-out",
)
print(train, held_out, sep="\n")

# %% [markdown]
# Two measures. Accuracy: which of the two labels has the larger logit. For profiling, which accuracy is too coarse
# for so few prompts: the log-probability of the right label, of the two.

# %%
labels = torch.tensor([model.encode(word)[0] for word in (" good", " bad")])
accuracy = mk.metrics.choice_accuracy(labels)


def log_choice(logits, task):
    return torch.nn.functional.logsigmoid(mk.metrics.logit_diff(logits, task))


train = train.with_metric(log_choice)


def tune(heads, gamma):
    return mk.attend(heads, bias=math.log(gamma), keys=0)


# %% [markdown]
# The edit adds log gamma to the scores of key 0. Gamma 1 must change nothing, and any gamma must leave the ratios of
# all other keys as they are.

# %%
HEAD = "15.3"
plain, neutral, halved = (
    model.run(train[0], record=[f"{HEAD}.pattern"], edits=edits)
    for edits in ([], [tune(model.heads(), 1.0)], [tune(HEAD, 0.5)])
)
before, after = (run[f"{HEAD}.pattern"][0, -1] for run in (plain, halved))
assert torch.allclose(plain.logits, neutral.logits, atol=1e-3)
assert torch.allclose(after[1:] / after[1:].sum(), before[1:] / before[1:].sum(), atol=1e-4)
print(f"head {HEAD}, last token: attention to the first token {before[0]:.2f}, with gamma 0.5 {after[0]:.2f}")

# %% [markdown]
# Profile: all heads of one layer with gamma 1.5, a layer at a time. Above 0: more attention to the first token helps.

# %%
PROBE = 1.5
layers = [[f"{layer}.{head}" for head in range(model.n_heads)] for layer in range(model.n_layers)]
by_layer = mk.select(
    model, train, lambda layer: tune(layers[layer], PROBE), range(model.n_layers), held_out=held_out, progress=False
).frame
fig, ax = plt.subplots(figsize=(6, 2.2))
ax.bar(range(model.n_layers), by_layer.effect)
ax.set(xlabel="layer", ylabel="change of log-prob.", title="All heads of a layer, gamma 1.5")
plt.show()

# %% [markdown]
# In the three layers that matter most, the same for each head. Heads are of the class "up" or "down", after what
# helps; the larger class is tuned.

# %%
strongest = by_layer.effect.abs().nlargest(3).index
candidates = [head for layer in sorted(strongest) for head in layers[layer]]
by_head = mk.select(model, train, lambda head: tune(head, PROBE), candidates, held_out=held_out, progress=False).frame
up, down = by_head[by_head.effect > 0].candidate, by_head[by_head.effect <= 0].candidate
heads = model.heads(list(max(up, down, key=len)))
others = model.heads(list(min(up, down, key=len)))
print(f"layers {sorted(strongest)}: {len(up)} heads up, {len(down)} down; tuned: {heads}")

# %% [markdown]
# One gamma for all of them, the best on the training prompts.

# %%
GAMMAS = [0.1, 0.2, 0.5, 1.0, 2.0, 4.0]
chosen = mk.select(model, train, lambda gamma: tune(heads, gamma), GAMMAS, held_out=held_out, progress=False)
chosen.frame[["candidate", "metric", "effect", "chosen"]].round(3)

# %% [markdown]
# Accuracy on the held-out sentences, beside the same edit at random heads of the same layers. Then the same gamma at
# the heads of the other class.

# %%
report = mk.evaluate(model, held_out, chosen.edit, metric=accuracy, controls=10, progress=False)
other = mk.evaluate(model, held_out, tune(others, chosen.chosen), metric=accuracy, controls=0, progress=False)
print(f"the other class: {other.effect:+.2f}")
report

# %%
report.plot()

# %%
rows = report.summary[report.summary.split == "held-out"].set_index("condition")
drawn = report.frame[report.frame.condition == "random"].effect
size, third = by_layer.effect.abs().to_numpy(), model.n_layers // 3
draw = np.random.default_rng(0)
chance = np.mean([draw.permutation(size)[:third].mean() >= size[:third].mean() for _ in range(2000)])
low, high = report.interval
summary = pd.DataFrame(
    [
        {
            "claim": "a factor on the first token's attention raises accuracy",
            "the paper reports": "+11.7 points in classification (Llama-3.1-8B)",
            "this model shows": f"{rows.metric['none']:.2f} to {rows.metric['edit']:.2f}, "
            f"difference {low:+.2f} to {high:+.2f} (gamma {chosen.chosen})",
            "control": f"random heads, same layers: {drawn.mean():+.2f} ({drawn.min():+.2f} to {drawn.max():+.2f})",
            "reproduced": "yes" if low > 0 and report.effect > drawn.max() else "partly" if low > 0 else "no",
        },
        {
            "claim": "heads fall into two classes that want opposite factors",
            "the paper reports": "some heads should attend to it more, others less",
            "this model shows": f"of {len(by_head)} heads {len(up)} up, {len(down)} down; the same gamma at the other "
            f"class: {other.effect:+.2f}",
            "control": f"at the chosen class: {report.effect:+.2f}",
            "reproduced": "yes" if other.effect < 0 < low else "partly" if other.effect < low else "no",
        },
        {
            "claim": "early layers matter more",
            "the paper reports": "tuning the lower layers gains most",
            "this model shows": f"mean size of a layer's effect {size[:third].mean():.3f} in the first third, "
            f"{size[third:-third].mean():.3f} and {size[-third:].mean():.3f} in the others",
            "control": f"layers in random order: as large in {chance:.0%} of 2000 draws",
            "reproduced": "yes" if chance < 0.05 else "partly" if size[:third].mean() > size[third:].mean() else "no",
        },
    ]
)
summary

# %% [markdown]
# Less attention to the first token makes up for this model's leaning to one label, and heads of the other class want
# the opposite. But some random sets of heads of the same layers, most of which share heads with the tuned ones, do as
# well, so the profile is not shown to pick the right heads. One few-shot prompt and plain sentences.
