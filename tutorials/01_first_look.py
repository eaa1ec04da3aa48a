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
# # 01 · First look: which heads do it?
#
# A language model reads *"When Mary and John went to the store, John gave a drink to"* and says *" Mary"*. To do that
# it must notice that John stands twice and Mary once. **Which of its attention heads do this?** You will
#
# 1. load a small model and watch it predict,
# 2. patch each of its 270 heads and see which ones matter,
# 3. test whether those heads do it alone, on other prompts, against heads drawn at random.
#
# It takes about two minutes to run, on any laptop.

# %%
import mechkit as mk

model = mk.load("smollm2-135m")
model

# %%
run = model.run("When Mary and John went to the store, John gave a drink to")
run.next_tokens(5)

# %% [markdown]
# ## Many prompts, in pairs
#
# One prompt proves little. A *task* holds many, each with a *corrupt* twin in which the other name is repeated, so that
# the right answer changes sides. The *logit difference* says how much more the model believes in the right name than
# in the wrong one.

# %%
task = mk.tasks.ioi(model, n=24, seed=0)
print(task)
print(task.texts[0])
difference = mk.metrics.logit_diff(model.run(task).logits, task)
print(f"mean {difference.mean():.2f}, right on {(difference > 0).float().mean():.0%} of the prompts")
assert difference.mean() > 3

# %% [markdown]
# ## One head at a time
#
# *Activation patching*: run the corrupt prompt, but give one head the output it has on the clean prompt. How much of
# the way from the corrupt to the clean answer does that one head carry? We ask this on one half of the prompts only.

# %%
found, held_out = task.split(0.5, seed=0)
circuit = mk.discover(model, found, size=13, progress=False)
circuit.scores.plot()

# %%
circuit.frame[["site", "score", "se"]].round(2)

# %% [markdown]
# Blue heads work for the behaviour, orange ones against it. Where does the strongest one look, from the last word?

# %%
head = next(iter(circuit.heads))
one = model.run(held_out[0], record=[f"{head}.pattern"])
weights = one[f"{head}.pattern"][0, -1]
tokens = [model.to_text(i) for i in held_out[0].clean[0].tolist()]
sorted(zip([round(float(w), 2) for w in weights], tokens, strict=True), reverse=True)[:3]

# %% [markdown]
# ## Do they do it alone?
#
# On the other half of the prompts, replace every head *outside* the circuit by its average. *Faithfulness* is the share
# of the logit difference that is left: 1 is all of it. As a control, do the same with random heads of the same layers.

# %%
evaluation = circuit.evaluate(model, held_out, progress=False)
print(evaluation)
assert evaluation.faithfulness > evaluation.control.faithfulness.mean()
evaluation.plot()

# %% [markdown]
# ## Try it
#
# * Ablate the strongest head and look at the prediction: `model.run(prompt, edits=[mk.ablate("23.3")]).next_tokens()`.
# * Set `corrupt="abc"` in `mk.tasks.ioi`: a third name stands where the subject was repeated. Which heads stay?
# * Write your own prompts: see [Your own task](../notebooks/own_task.ipynb).
#
# **Read next**: Wang et al. 2022, *Interpretability in the Wild* (arXiv 2211.00593), who asked this of GPT-2 small.
