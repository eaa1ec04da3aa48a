"""Can the model do the task at all? What is found for a behaviour that is not there explains nothing.

1. Accuracy is the share of clean prompts on which the model prefers the correct answer to the wrong one: the prompts
   that ``task.known(model)`` keeps. Chance is 0.5 for a pair of answers.
2. A one-sided binomial test at 5% asks whether the accuracy is above chance. Fewer than five prompts can never pass
   it; they pass when the model gets all of them right.
3. Where it is not, there is a warning. The task is made all the same.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import MechkitWarning
from ..metrics import METRICS

if TYPE_CHECKING:
    from ..model import Model
    from .task import Task

CHANCE = 0.5
LEVEL = 0.05


def with_ability(model: Model, task: Task, chance: float = CHANCE, depth: int = 2) -> Task:
    """The same task, with ``accuracy`` and ``chance`` in its ``meta``; one run of the clean prompts.

    Args:
        model: reads two logits a prompt.
        task: its correct and wrong answers are compared.
        chance: the accuracy of a model that has nothing to go by.
        depth: how many calls lie between the user's code and this one, for the line that the warning names.

    Warns:
        MechkitWarning: the accuracy is not clearly above chance.
    """
    from scipy.stats import binomtest

    values = METRICS["logit_diff"](model.read(task.clean, task.answer_positions, task.answers), task)
    right, n = int((values > 0).sum()), len(task)
    if right < n and binomtest(right, n, chance, alternative="greater").pvalue > LEVEL:
        warnings.warn(
            f'{model.name} prefers the correct answer on {right} of {n} prompts of "{task.name}": an accuracy of '
            f"{right / n:.2f}, not clearly above chance ({chance:.2f}), so that there may be no behaviour to explain. "
            "Take a model that can do the task or more prompts, or pass check=False if this is meant",
            MechkitWarning,
            stacklevel=2 + depth,
        )
    return replace(task, meta={**task.meta, "accuracy": right / n, "chance": chance})
