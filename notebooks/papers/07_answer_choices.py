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
# # Does a model that answers with a valid choice also answer better?
#
# Wiegreffe et al. 2023, *Increasing Probability Mass on Answer Choices Does Not Always Improve Accuracy*, arXiv
# 2305.14596. A model spends probability on other words than the answer choices (surface form competition). Showing the
# choices, and a solved example, puts more of it on them, but accuracy does not follow: for some models it falls.
#
# Here: SmolLM2-135M and one kind of question, capitals with four choices, in four formats. Nothing is fitted, so that
# all prompts are held out. The control gives each prompt the choices of another one.

# %%
import random

import matplotlib.pyplot as plt
import pandas as pd
import torch

import mechkit as mk

pd.set_option("display.max_colwidth", None)
model = mk.load("smollm2-135m")
capitals = mk.tasks.known_capitals(model, known=False)
draw = random.Random(0)
countries = draw.sample(sorted(capitals), len(capitals))
example, asked = countries[0], countries[1:]
choices = {}
for country in (example, *asked):
    others = draw.sample([one for one in countries if one != country], 3)
    choices[country] = draw.sample([country, *others], 4)
ids = {country: model.encode(" " + city)[0] for country, city in capitals.items()}
print(f"{len(asked)} questions")

# %% [markdown]
# Each question in four formats: with and without the choices in the prompt, with and without a solved example. The
# corrupt twin, which every task has, asks for another of the four choices; only clean prompts are measured here.


# %%
def question(country, listed, of=None):
    about = f"Question: What is the capital of {country}?\n"
    cities = ", ".join(capitals[one] for one in choices[of or country])
    return about + (f"Choices: {cities}\n" if listed else "") + "Answer:"


def prompts(listed, shown):
    before = f"{question(example, listed)} {capitals[example]}\n\n" if shown else ""
    twins = [next(one for one in choices[country] if one != country) for country in asked]
    frame = pd.DataFrame(
        {
            "clean": [before + question(one, listed) for one in asked],
            "corrupt": [before + question(twin, listed, of=one) for one, twin in zip(asked, twins, strict=True)],
            "correct": [" " + capitals[one] for one in asked],
            "wrong": [" " + capitals[twin] for twin in twins],
        }
    )
    return mk.Task.from_frame(frame, model, name="choices")


formats = {
    "question": prompts(False, False),
    "with choices": prompts(True, False),
    "with example": prompts(False, True),
    "with both": prompts(True, True),
}
print(formats["with both"].texts[0])

# %% [markdown]
# The probability of all four choices together (mass), how often the right one is the likeliest of the four (accuracy),
# and how often no other wording of a choice could have changed that (bound).

# %%
rows = torch.tensor([[ids[one] for one in choices[country]] for country in asked])
measured = {}
for name, task in formats.items():
    logits = model.read(task.clean, task.answer_positions, None)
    measured[name] = pd.DataFrame(
        {
            "mass": mk.metrics.choice_mass(rows, task)(logits, task),
            "accuracy": mk.metrics.choice_accuracy(rows, task)(logits, task),
            "bound": mk.metrics.surface_bound(rows, task)(logits, task),
            "first of all": mk.metrics.metric("correct_rate")(logits, task),
            "mass of another's choices": mk.metrics.choice_mass(rows.roll(1, 0), task)(logits, task),
        }
    )
table = pd.DataFrame({name: one.mean() for name, one in measured.items()}).T
assert (table["mass"] <= 1).all()
table.round(3)

# %%
figure, axes = plt.subplots(figsize=(4.5, 3), layout="constrained")
for name, one in table.iterrows():
    axes.plot(one["mass"], one["accuracy"], "o")
    axes.annotate(name, (one["mass"], one["accuracy"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
axes.axhline(0.25, color="grey", linestyle="--")
axes.set(xlabel="mass on the choices", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.1), title="dashed: chance")
plt.close(figure)
figure

# %% [markdown]
# Across formats, and within one: do prompts with more mass have more right answers? Intervals are of 2,000 bootstrap
# draws of questions.

# %%
draws = torch.randint(len(asked), (2000, len(asked)), generator=torch.Generator().manual_seed(0)).numpy()


def change(column, fewer, more):
    by_prompt = (measured[more][column] - measured[fewer][column]).to_numpy()
    low, high = pd.Series(by_prompt[draws].mean(1)).quantile([0.025, 0.975])
    return by_prompt.mean(), low, high


mass, accuracy = (change(column, "question", "with choices") for column in ("mass", "accuracy"))
both_mass, both_accuracy = (change(column, "with example", "with both") for column in ("mass", "accuracy"))
mixed = {
    name: one for name, one in measured.items() if one["accuracy"].nunique() > 1
}  # neither all right nor all wrong
within = {name: one["mass"].corr(one["accuracy"], method="spearman") for name, one in mixed.items()}
pd.Series(within, name="rank correlation of mass and accuracy").round(2)

# %%
strange = table["mass of another's choices"]
best, right = table["mass"].idxmax(), table["accuracy"].idxmax()
summary = pd.DataFrame(
    [
        {
            "claim": "choices in the prompt raise the mass on them",
            "the paper reports": "yes",
            "this model shows": f"{table['mass']['question']:.2f} to {table['mass']['with choices']:.2f}; with an "
            f"example {table['mass']['with example']:.2f} to {table['mass']['with both']:.2f}",
            "control": f"another question's choices: {strange['question']:.2f} to {strange['with choices']:.2f}",
            "reproduced": "yes"
            if min(mass[1], both_mass[1]) > 0
            else "partly"
            if max(mass[1], both_mass[1]) > 0
            else "no",
        },
        {
            "claim": "accuracy does not always follow",
            "the paper reports": "no: for some models it falls",
            "this model shows": f"without an example {accuracy[0]:+.2f} ({accuracy[1]:+.2f} to {accuracy[2]:+.2f}), "
            f"with one {both_accuracy[0]:+.2f} ({both_accuracy[1]:+.2f} to {both_accuracy[2]:+.2f})",
            "control": "chance 0.25; the same questions and choices in all formats",
            "reproduced": "yes" if min(accuracy[2], both_accuracy[2]) < 0 else "partly" if right != best else "no",
        },
        {
            "claim": "with enough mass, other wordings cannot change the answer",
            "the paper reports": "a bound on how many answers competition can change",
            "this model shows": f"bound met on {table['bound']['question']:.0%} of questions without and "
            f"{table['bound']['with choices']:.0%} with choices",
            "control": f"with an example {table['bound']['with example']:.0%} and {table['bound']['with both']:.0%}",
            "reproduced": "yes" if table["bound"].corr(table["mass"], method="spearman") > 0.5 else "no",
        },
    ]
)
summary

# %% [markdown]
# One small model, one kind of question and one wording of each format; the accuracy is of 36 questions, so that only
# large changes show.
