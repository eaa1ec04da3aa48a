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
# # Do recall and reasoning use different heads?
#
# Fartale et al. 2025, *Disentangling Recall and Reasoning in Transformer Models through Layer-wise Attention and
# Activation Analysis*, arXiv 2510.03366. Heads that matter for recalling facts are found by patching, and so are heads
# that matter for inference over several steps. Taking out the one group lowers its own task by up to 15% and leaves the
# other intact (Qwen and Llama models).
#
# Here: SmolLM2-135M; recall is naming capitals, and in place of reasoning, which so small a model does not do, stands
# the simplest inference from the context, induction over random tokens. Heads are found on half of the prompts and
# taken out on the other half, whose countries are others.

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
capitals = mk.tasks.known_capitals(model)
countries = sorted(capitals)
halves = countries[::2][:8], countries[1::2][:8]


def recall(some, n=12):
    pairs = list(itertools.permutations(some, 2))[::4][:n]
    frame = pd.DataFrame(
        {
            "clean": [f"The capital of {a} is the city of" for a, _ in pairs],
            "corrupt": [f"The capital of {b} is the city of" for _, b in pairs],
            "correct": [" " + capitals[a] for a, _ in pairs],
            "wrong": [" " + capitals[b] for _, b in pairs],
        }
    )
    return mk.Task.from_frame(frame, model, name="recall")


train = {"recall": recall(halves[0]), "induction": mk.tasks.induction(model, n=8, seed=0, length=10)}
held_out = {"recall": recall(halves[1]), "induction": mk.tasks.induction(model, n=16, seed=1, length=10)}
print(held_out)

# %% [markdown]
# Every head patched by itself on each task.

# %%
scores = {name: mk.patch(model, task, progress=False) for name, task in train.items()}
K = 6
top = {name: model.heads(list(one.top(K, by="positive").site)) for name, one in scores.items()}
print(*(f"{name}: {heads}" for name, heads in top.items()), sep="\n")
scores["recall"].compare(scores["induction"], k=2 * K)

# %%
scores["recall"].plot()

# %%
scores["induction"].plot()

# %% [markdown]
# Each group is taken out (set to its mean over prompts) on both held-out tasks, and so are random heads of the same
# layers. The drop is the share of the logit difference that is lost.


# %%
def drops(task, heads):
    """The drop of each prompt, over the mean without edits."""
    edits = [mk.ablate(str(heads), "mean", reference=task)]
    before = base[task.name]
    return (before - mk.metrics.logit_diff(model.run(task, edits=edits).logits, task).numpy()) / before.mean()


base = {name: mk.metrics.logit_diff(model.run(task).logits, task).numpy() for name, task in held_out.items()}


own = {(task, group): drops(held_out[task], top[group]) for task in held_out for group in top}
random = {
    (task, group): [drops(held_out[task], top[group].random_like(seed)).mean() for seed in range(4)]
    for task in held_out
    for group in top
}
table = pd.DataFrame(
    {
        f"{kind}{group}": [np.mean(values[task, group]) for task in held_out]
        for kind, values in (("", own), ("random like ", random))
        for group in top
    },
    index=list(held_out),
)
table.round(2)

# %%
axes = table.plot.bar(figsize=(5, 2.8), rot=0, ylabel="share of the logit difference lost", xlabel="task")
axes.legend(title="heads taken out", fontsize=7)
figure = axes.figure
figure.tight_layout()
plt.close(figure)
figure

# %% [markdown]
# The index D sums, over both groups, what a group takes from its own task less what it takes from the other: 0 means no
# dissociation. Its interval is a bootstrap over prompts.


# %%
def index(values):
    return (
        values["recall", "recall"].mean()
        - values["induction", "recall"].mean()
        + values["induction", "induction"].mean()
        - values["recall", "induction"].mean()
    )


draw = np.random.default_rng(0)
picks = [{task: draw.integers(0, len(held_out[task]), len(held_out[task])) for task in held_out} for _ in range(2000)]
drawn = [index({key: own[key][pick[key[0]]] for key in own}) for pick in picks]
D, (low, high) = index(own), np.quantile(drawn, (0.025, 0.975))
by_chance = [index({key: np.array(random[key][seed]) for key in random}) for seed in range(4)]
print(f"D = {D:.2f} ({low:.2f} to {high:.2f}); random heads {min(by_chance):.2f} to {max(by_chance):.2f}")

# %%
cells = {key: float(value.mean()) for key, value in own.items()}
shared = top["recall"] & top["induction"]
rows = []
for group, other in (("recall", "induction"), ("induction", "recall")):
    lost, spared, chance = cells[group, group], cells[other, group], max(random[group, group])
    rows.append(
        {
            "claim": f"heads of {group} are needed for {group} and not for {other}",
            "the paper reports": "up to 15% less on the own task, the other intact",
            "this model shows": f"{group} loses {lost:.0%}, {other} {spared:.0%}",
            "control": f"random heads of the same layers: {group} loses at most {chance:.0%}",
            "reproduced": "yes"
            if lost > chance and spared < 0.1
            else "partly"
            if lost > chance and spared < lost / 2
            else "no",
        }
    )
rows.append(
    {
        "claim": "the two are dissociated",
        "the paper reports": "separable circuits",
        "this model shows": f"D = {D:.2f} ({low:.2f} to {high:.2f}); {len(shared)} of {K} heads shared",
        "control": f"random heads: D from {min(by_chance):.2f} to {max(by_chance):.2f}",
        "reproduced": "yes" if low > max(0, *by_chance) else "partly" if low > 0 else "no",
    }
)
summary = pd.DataFrame(rows)
summary

# %% [markdown]
# The two depend on different heads for the most part, but each group takes something from the other task as well, and
# some heads are of both. Naming capitals and repeating what was read are further apart than the paper's two tasks, and
# induction is no reasoning: what is shown here is the weaker claim.
