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
# # Do heads talk to each other along single directions?
#
# Merullo et al. 2024, *Talking heads*, arXiv 2406.09519. What one head writes is read by a later one along one or two
# singular directions of its weights, a channel. The paper finds such channels from the weights alone, shows that IOI
# and a laundry list task run over them, and that setting a channel by hand often makes long lists more than 20 points
# better.
#
# Here: SmolLM2-135M instead of GPT-2 small and Pythia-160m, lists of 6 objects, and channels that are scaled instead of
# set. Heads, channel and scale are picked on one third of the prompts; all that is reported is of the rest.

# %%
import matplotlib.pyplot as plt
import pandas as pd

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
task = mk.tasks.laundry_list(model, n=42, seed=0, objects=6)
train, held_out = task.split(1 / 3, seed=0)
print(task.texts[0])


def differences(prompts, edits=()):
    answers = model.read(prompts.clean, prompts.answer_positions, prompts.answers, edits)
    return answers[:, 0] - answers[:, 1]


def accuracy(prompts, edits=()):
    return float((differences(prompts, edits) > 0).float().mean())


base = accuracy(held_out)
print(f"The missing object beats its neighbor on {base:.0%} of {len(held_out)} held-out prompts")

# %% [markdown]
# Which heads write the answer at the last token? Path patching to the logits, on the training prompts. The first of
# them is the one whose channels are looked for.

# %%
writers = mk.path_patch(model, train, receivers="logits", positions="END", progress=False)
mover = writers.heads(1)
writers.top(3)[["site", "score", "se"]].round(3)

# %% [markdown]
# Who speaks to the query of that head? From the weights alone: every earlier head, every singular component
# of what it writes. z is how far a component stands above unrelated directions, `apart` how many standard deviations
# it stands above all components of its own head. Four channels stand furthest apart.

# %%
composed = mk.composition(model, receivers=str(mover), kind="q")
parts = composed.frame.dropna(subset=["component", "z"]).copy()
of_head = parts.groupby(["sender", "receiver"], observed=True).z
parts["apart"] = (parts.z - of_head.transform("mean")) / of_head.transform("std")
channels = parts[parts.z >= 10].sort_values("apart", ascending=False).drop_duplicates(["sender", "component"])[:4]
channels = channels.reset_index(drop=True)
channels[["sender", "receiver", "component", "score", "z", "apart"]].round(2)

# %% [markdown]
# The one that stands furthest apart beside all other components of its sender.

# %%
sender, receiver, component = channels.sender[0], channels.receiver[0], int(channels.component[0])
pair = composed.of_pair(sender, receiver).dropna(subset=["component"])
whole_z = composed.pairs().set_index(["sender", "receiver"]).z
figure, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
axes.bar(pair.component.astype(int), pair.z)
axes.set(xlabel=f"component of {sender}", ylabel="z", title=f"{sender} to the query of {receiver}")
plt.close(figure)
figure

# %% [markdown]
# Do the channels matter to the task? Each of the four is taken out on the training prompts; the one without which most
# is lost is tried again on the others, beside random changes of the same head and size.

# %%
tried = {}
for one in channels.itertuples():
    svd = mk.svd(model, one.sender)
    effects = mk.channel_effects(model, train, svd, int(one.component), n_random=1, progress=False)
    tried[one.sender, int(one.component)] = effects.channel
chosen, number = max(tried, key=tried.get)
effects = mk.channel_effects(model, held_out, mk.svd(model, chosen), number, n_random=8, progress=False)
random = effects.frame.score[1:].abs()
lost = effects.channel
print(f"component {number} of {chosen}: {lost:+.3f} of the gap; random changes at most {random.max():.3f}")

# %% [markdown]
# Can the list be made easier by scaling the channel? The factor is picked on the training prompts; the control is the
# same factor on other components of the same head.

# %%
svd = mk.svd(model, chosen)
alphas = (-2, 0, 3)
on_train = {alpha: differences(train, [svd.scale(number, alpha)]) for alpha in alphas}
at = {alpha: (float((some > 0).float().mean()), float(some.mean())) for alpha, some in on_train.items()}
alpha = max(at, key=at.get)  # the best accuracy, then the largest mean difference
scaled = accuracy(held_out, [svd.scale(number, alpha)])
same = [accuracy(held_out, [svd.scale(i, alpha)]) for i in range(6) if i != number][:3]
print(f"factor {alpha}: {base:.0%} to {scaled:.0%}; other components {min(same):.0%} to {max(same):.0%}")
pd.DataFrame(at, index=["accuracy", "mean difference"]).rename_axis(columns="factor, training prompts").round(2)

# %%
top_z, spread, gain = float(channels.z[0]), float(channels.apart[0]), 100 * (scaled - base)
median_apart = parts.groupby(["sender", "receiver"], observed=True).apart.max().median()
summary = pd.DataFrame(
    [
        {
            "claim": "channels are single components",
            "the paper reports": "1 or 2 components of a head stand out, the whole matrices do not",
            "this model shows": f"{sender} to {receiver}.q, component {component}: z = {top_z:.0f}, {spread:.1f} "
            "standard deviations above its head's components",
            "control": f"whole matrices of the pair: z = {whole_z[sender, receiver]:.0f}; "
            f"most apart in the median pair: {median_apart:.1f}",
            "reproduced": "yes"
            if spread > 1.5 * median_apart and top_z > whole_z[sender, receiver]
            else "partly"
            if spread > 1.5 * median_apart
            else "no",
        },
        {
            "claim": "the task runs over the channel",
            "the paper reports": "without the channel, inhibition is lost",
            "this model shows": f"taken out, {lost:+.3f} of the gap is lost on held-out prompts",
            "control": f"{len(random)} random changes of the head: mean size {random.mean():.3f}, "
            f"largest {random.max():.3f}",
            "reproduced": "yes" if lost > max(0.1, random.max()) else "partly" if lost > random.max() else "no",
        },
        {
            "claim": "changing the channel makes lists easier",
            "the paper reports": "often more than 20 points",
            "this model shows": f"{base:.0%} to {scaled:.0%} ({gain:+.0f} points)",
            "control": f"other components by the same factor: {min(same):.0%} to {max(same):.0%}",
            "reproduced": "yes" if gain > 20 and scaled > max(same) else "partly" if scaled > max(same) else "no",
        },
    ]
)
summary

# %% [markdown]
# The weights name components that stand far out, as in the paper; a large z alone does not say that a component matters
# to this task. Scaling is cruder than setting a position in the list by hand, and the lists here are short.
