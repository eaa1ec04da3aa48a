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
# # Your own task in ten lines
#
# A template to copy. Each row is a pair of prompts with as many tokens each, and two answers of one token.

# %%
import pandas as pd

import mechkit as mk

model = mk.load("smollm2-135m")
countries = {"France": " Paris", "Italy": " Rome", "Japan": " Tokyo", "Germany": " Berlin"}
pairs = [(a, b) for a in countries for b in countries if a != b]
frame = pd.DataFrame(
    {
        "clean": [f"The capital of {a} is the city of" for a, _ in pairs],
        "corrupt": [f"The capital of {b} is the city of" for _, b in pairs],
        "correct": [countries[a] for a, _ in pairs],
        "wrong": [countries[b] for _, b in pairs],
    }
)
task = mk.Task.from_frame(frame, model, name="capitals")
task

# %%
scores = mk.patch(model, task, "heads", progress=False)
scores.plot()

# %%
scores.top(5).round(3)
