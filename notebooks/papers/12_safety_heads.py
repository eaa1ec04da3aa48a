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
# # Which heads refuse?
#
# Zhou et al. 2024, *On the Role of Attention Heads in Large Language Model Safety*, arXiv 2410.13708. Ships: how far
# the next-token distribution of a harmful question moves when one head attends evenly instead. Sahara: how far the
# main direction of all questions together turns. Without a single head found in this way, Llama-2-7b-chat answers 16
# times as many harmful questions.
#
# Here: a harmless stand-in. SmolLM2-135M is told of a house that does not cook, is shown a question that gets "No" and
# one that gets "Sure", and is asked another. Questions about cooking are the refused ones. Only next-token
# distributions are looked at, and only heads of the last two fifths of the layers, which keeps it short.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
PROMPT = "We do not cook.\nHow do I fix doors? Sure\nHow do I cook beans? No\nHow do I {}?"
refused = (
    "bake bread, cook rice, fry eggs, boil pasta, roast chicken, grill fish, make soup, peel potatoes, steam fish, "
    "bake pies, fry onions, boil eggs, roast nuts, grill corn"
).split(", ")
allowed = (
    "paint walls, plant trees, fix bikes, wash shirts, clean windows, learn French, sell books, train dogs, "
    "fix chairs, draw maps, cut paper, build walls, plant roses, ride horses"
).split(", ")


def questions(about, beside):
    frame = pd.DataFrame({"clean": map(PROMPT.format, about), "corrupt": map(PROMPT.format, beside)})
    return mk.Task.from_frame(frame.assign(correct=" No", wrong=" Sure"), model, name="house rule")


train = questions(refused[:4], allowed[:4])
held_out, spared = questions(refused[4:], allowed[4:]), questions(allowed[4:], refused[4:])
no = {
    name: mk.metrics.logit_diff(model.run(task).logits, task).numpy()
    for name, task in (("refused", held_out), ("allowed", spared))
}
apart = (no["refused"][:, None] > no["allowed"]).mean()
print(", ".join(f"{name}: No over Sure by {values.mean():.2f} logits" for name, values in no.items()))
print(f"a refused question gets more No than an allowed one in {apart:.0%} of all pairs")

# %% [markdown]
# ## Ships
#
# Of every head, on four refused questions less on four allowed ones.

# %%
late = [head for head in model.heads() if head.layer >= 0.6 * model.n_layers]
ships, plain = (
    mk.score(model, [PROMPT.format(one) for one in some[:4]], how="ships", heads=late, progress=False)
    for some in (refused, allowed)
)
contrast = replace(ships, frame=ships.frame.assign(score=ships.frame.score - plain.frame.score))
contrast.plot()

# %%
K = 5
by_ships = list(contrast.top(K, by="positive").site)
contrast.top(K, by="positive")[["site", "score"]].round(4)

# %% [markdown]
# ## Sahara
#
# Of the same refused questions, by how prompts load on the main direction (samples, as in the released code) and by the
# direction itself (features).

# %%
sahara = {
    side: mk.score(model, train, how="sahara", side=side, heads=late, progress=False)
    for side in ("samples", "features")
}
by_sahara = list(sahara["samples"].top(K).site)
pd.DataFrame({side: list(one.top(K).site) for side, one in sahara.items()} | {"Ships": by_ships})

# %% [markdown]
# Do they agree? Both on refused questions alone.

# %%
agree = {side: ships.compare(one, k=10) for side, one in sahara.items()}
sides = sahara["samples"].compare(sahara["features"], k=10)
for name, one in {**{f"Ships and {side}": one for side, one in agree.items()}, "both sides": sides}.items():
    print(f"{name}: {one}")

# %% [markdown]
# ## Taking them out
#
# On ten other refused questions, beside random heads of the same layers and the heads at the bottom of the ranking, and
# on ten allowed questions, where nothing should change.

# %%
chosen = {"first by Ships": by_ships[:1], f"{K} by Ships": by_ships, f"{K} by Sahara": by_sahara}
found = {
    name: mk.evaluate(model, held_out, mk.ablate(heads, "uniform"), ranking=contrast, controls=6, progress=False)
    for name, heads in chosen.items()
}
beside = {
    name: mk.metrics.logit_diff(model.run(spared, edits=[mk.ablate(heads, "uniform")]).logits, spared).numpy()
    - no["allowed"]
    for name, heads in chosen.items()
}
found[f"{K} by Ships"]

# %%
figure, axes = plt.subplots(figsize=(5, 2.4))
for at, (name, one) in enumerate(found.items()):
    drawn = one.frame[one.frame.condition == "random"].effect
    axes.plot(drawn, [at] * len(drawn), "|", color="grey", markersize=12, label="random heads" if at == 0 else None)
    axes.errorbar(one.effect, at, xerr=np.abs(np.array([one.interval]).T - one.effect), fmt="o", color="tab:blue")
    axes.plot(beside[name].mean(), at, "x", color="tab:orange", label="allowed questions" if at == 0 else None)
axes.axvline(0, color="black", linewidth=0.8)
axes.set(yticks=range(len(found)), yticklabels=found, ylim=(-0.5, 2.5), xlabel="change of No over Sure (logits)")
axes.legend(fontsize=7)
figure.tight_layout()
plt.close(figure)
figure

# %%
rows = []
for name, claim in zip(
    found, ("the head that Ships puts first", f"{K} heads of Ships", f"{K} heads of Sahara"), strict=True
):
    one, others = found[name], float(beside[name].mean())
    low, high = one.interval
    drawn = one.frame[one.frame.condition == "random"].effect
    own = one.effect - others  # beyond what happens to allowed questions
    rows.append(
        {
            "claim": f"without {claim}, questions are refused less",
            "the paper reports": "16 times as many harmful answers without one head"
            if len(chosen[name]) == 1
            else "groups of heads do more than one",
            "this model shows": f"{', '.join(chosen[name])}: No over Sure {no['refused'].mean():.2f} changes by "
            f"{one.effect:+.2f} ({low:+.2f} to {high:+.2f})",
            "control": f"random heads {drawn.min():+.2f} to {drawn.max():+.2f}; allowed questions {others:+.2f}",
            "reproduced": "yes"
            if high < 0 and one.effect < drawn.min() and own < 0.5 * one.effect
            else "partly"
            if high < 0 and one.effect < drawn.min()
            else "no",
        }
    )
rows.append(
    {
        "claim": "Ships and Sahara find the same heads",
        "the paper reports": "some heads are found by both",
        "this model shows": f"{agree['samples'].shared} of the top 10 the same (samples), {agree['features'].shared} "
        f"(features); ranks correlate {agree['samples'].rho:.2f} and {agree['features'].rho:.2f}",
        "control": f"by chance {sides.by_chance:.1f}; the two sides of Sahara share {sides.shared}",
        "reproduced": "yes"
        if all(one.p < 0.05 and one.rho > 0 for one in agree.values())
        else "partly"
        if min(one.p for one in agree.values()) < 0.05
        else "no",
    }
)
summary = pd.DataFrame(rows)
summary

# %% [markdown]
# The heads that Ships puts first carry a good part of the refusal on questions that they were not found on, far beyond
# random heads, but much of it is a general leaning towards No, since allowed questions lose part of it as well; the
# heads that turn the main direction of the questions, as Sahara has it, need not be heads that refuse. A rule in one
# line of a prompt is no safety training, and a small model follows it only by degrees.
