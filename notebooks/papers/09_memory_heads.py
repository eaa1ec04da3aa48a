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
# # Memory against context: one head decides?
#
# Yu, Merullo and Pavlick 2023, "Characterizing Mechanisms for Factual Recall in Language Models", arXiv 2310.15910. A
# prompt states a wrong capital; a model can follow it, or answer from memory. They find heads that push one answer or
# the other by direct logit attribution, and turn models round by scaling the values of a single head.
#
# Here: SmolLM2-135M follows the prompt nearly always, so what can be tested is the way to the memorised answer. Head
# and factor are chosen on half of the sixteen countries that the model is surest of, and tried on the other half.
# Scaling z is scaling the values.

# %%
import random

import pandas as pd

import mechkit as mk

model = mk.load("smollm2-135m")
countries = list(mk.tasks.known_capitals(model, surest=16))
random.Random(0).shuffle(countries)


def prompts(some, n, seed):
    """Without the token that the chat format begins with, which plain text does not have."""
    task = mk.tasks.capitals_conflict(model, n=n, seed=seed, countries=some, check=False)
    ids = task.clean[:, 1:], task.corrupt[:, 1:], task.correct, task.wrong
    return mk.Task.from_tokens(*ids, lengths=task.lengths - 1, name="capitals in conflict")


train, test = prompts(countries[:8], 32, 0), prompts(countries[8:], 48, 1)
print(model.to_text(train.clean[0][: train.lengths[0]]), "...")
sorted(countries[:8]), sorted(countries[8:])

# %% [markdown]
# What each head adds to the stated city's logit, less the memorised one's, on the training countries. The head with the
# lowest number pushes the memorised answer most: it is the one to scale, as in the paper.

# %%
direct = mk.score(model, train, "direct", progress=False)
direct.plot()

# %%
direct.top(3, by="negative").round(2)

# %% [markdown]
# Some factors for that head, tried on the training countries: how often is the memorised capital the likeliest token of
# all?

# %%
head = direct.top(1, by="negative").site[0]
found = mk.select(
    model,
    train,
    lambda factor: mk.scale(head, factor),
    [2, 4, 6],
    objective="wrong_rate",
    held_out=test.with_metric("wrong_rate"),
    controls=6,
    progress=False,
)
found.frame.round(2)

# %%
alpha = found.chosen
print(f"chosen: head {head}, times {alpha}")

# %% [markdown]
# On countries that had no part in this, beside the same factor at six draws of another head of the same layer, and
# beside what this way of choosing finds where the training labels are shuffled.

# %%
report = found.report
report

# %%
report.plot()

# %%
stated = mk.evaluate(model, test.with_metric("correct_rate"), mk.scale(head, alpha), controls=0, progress=False)
rows = report.frame.set_index("condition").metric
before, after = float(rows["none"]), float(rows["edit"])
draws = report.frame[report.frame.condition == "random"].metric
in_context = stated.frame.set_index("condition").metric
low, high = report.interval

# %%
summary = pd.DataFrame(
    [
        (
            "scaling one head makes the model answer from memory",
            "one head scaled turns many answers round",
            f"memorised {before:.0%} to {after:.0%} (95% interval of the rise {low:+.0%} to {high:+.0%})",
            f"other heads of the layer: at most {draws.max():.0%}",
            "yes" if low > 0.2 and after > draws.max() else "partly" if low > 0 else "no",
        ),
        (
            "the stated answer goes",
            "",
            f"in context {in_context['none']:.0%} to {in_context['edit']:.0%}",
            "",
            "yes" if in_context["edit"] < in_context["none"] - 0.2 else "no",
        ),
        (
            "scaling one head makes the model follow the prompt",
            "up to 88% in context",
            f"{in_context['none']:.0%} without an edit: nothing left to raise",
            "",
            "not tested here",
        ),
    ],
    columns=["claim", "the paper reports", "this model shows", "control", "reproduced"],
)
summary

# %% [markdown]
# The mechanism is there, in the direction of memory. It is one model and sixteen countries. How much it is depends on
# what is chosen: with the sweep left to choose among the three lowest heads too, it took 24.4, and the memorised
# answers rose by 25 points; over all the countries that the model knows, and with the chat format's first token, by 6.
# What the edit costs on other text is in the report above: a head that is scaled this much is scaled everywhere.
