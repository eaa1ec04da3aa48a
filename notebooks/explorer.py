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
# # Explore a behaviour
#
# "When Mary and John went to the store, John gave a drink to" … " Mary". Which heads of the model do this, where do
# they look, how do they work together, and which words matter? Four views, linked: choose a head in one, and it is
# chosen in the others.

# %%
import mechkit as mk

model = mk.load("smollm2-135m")
task = mk.tasks.ioi(model, n=16, seed=0)
explorer = mk.explore(model, task, progress=False)
explorer

# %% [markdown]
# Things to try, with the pointer or by keys (each view lists its keys):
#
# * **Scores**: `]` goes to the next largest head. All views follow.
# * **Attention**: press `A` on a head to ablate it, `P` to patch it from the other prompt. The table shows the next
#   token before and now. Order the heads by their score.
# * **Circuit**: move the slider to leave in fewer heads, or cut a line with `X`, and see what is left of the behaviour
#   on prompts that the circuit was not found on. Choose heads, and put them into a group under a name.
#
# What you did is there for Python:

# %%
explorer.selection, explorer.edits, explorer.circuit.size, explorer.circuit.cuts

# %% [markdown]
# The edits run anywhere else too, and the page keeps all of it but the model:

# %%
model.run(task[[0]], edits=explorer.edits).next_tokens(k=3)
# explorer.to_html("explorer.html")
