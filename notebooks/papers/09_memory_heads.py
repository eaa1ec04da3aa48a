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
# and factor are chosen on half of the countries and tried on the other half. Scaling z is scaling the values.

# %%
import random

import pandas as pd

import mechkit as mk

model = mk.load("smollm2-135m")
countries = list(mk.tasks.known_capitals(model))
random.Random(0).shuffle(countries)
half = len(countries) // 2
train = mk.tasks.capitals_conflict(model, n=32, seed=0, countries=countries[:half], check=False)
test = mk.tasks.capitals_conflict(model, n=48, seed=1, countries=countries[half:], check=False)
print(train.texts[0], "...")
len(countries[:half]), len(countries[half:])

# %% [markdown]
# What each head adds to the stated city's logit, less the memorised one's, on the training countries. Blue heads push
# the memorised answer.

# %%
direct = mk.score(model, train, "direct", progress=False)
direct.plot()

# %%
memory = list(direct.top(3, by="negative").site)
direct.top(3, by="negative").round(2)

# %% [markdown]
# Three heads and some factors, tried on the training countries: how often is the memorised capital the likeliest token
# of all?

# %%
candidates = [(head, alpha) for head in memory for alpha in (2, 4, 8)]
found = mk.select(
    model,
    train,
    lambda candidate: mk.scale(*candidate),
    candidates,
    objective="wrong_rate",
    held_out=test.with_metric("wrong_rate"),
    controls=6,
    progress=False,
)
found.frame.round(2)

# %%
head, alpha = found.chosen
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
stated = mk.evaluate(
    model, test.with_metric("correct_rate"), mk.scale(head, alpha), controls=0, neutral=test.texts[0], progress=False
)
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
# The mechanism is there, in the direction of memory. It is one model and some forty countries, and what the edit costs
# on other text is in the report above: a head that is scaled this much is scaled everywhere.
