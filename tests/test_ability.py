"""Whether a model can do a task at all is measured, and said."""

from __future__ import annotations

import types
import warnings

import pytest
import ready
import torch
from families import tiny

import mechkit as mk
from mechkit.errors import MechkitWarning
from mechkit.tasks.ability import with_ability


def _answering(right: int, n: int) -> tuple[types.SimpleNamespace, mk.Task]:
    """A stand-in for a model that prefers the correct answer on the first prompts only, and prompts for it."""
    task = mk.tasks.induction(tiny("llama"), n=n, length=6, check=False)
    logits = torch.tensor([[1.0, 0.0]] * right + [[0.0, 1.0]] * (n - right))
    return types.SimpleNamespace(name="stand-in", read=lambda *_: logits), task


@pytest.mark.parametrize(("right", "n"), [(64, 64), (40, 64), (5, 5), (4, 4), (1, 1)])
def test_a_model_above_chance_gets_no_warning(right, n):
    model, task = _answering(right, n)
    measured = with_ability(model, task)
    assert measured.meta == {**task.meta, "accuracy": right / n, "chance": 0.5}


@pytest.mark.parametrize(("right", "n"), [(38, 64), (32, 64), (0, 64), (3, 4), (0, 1)])
def test_a_model_not_clearly_above_chance_gets_one(right, n):
    model, task = _answering(right, n)
    with pytest.warns(MechkitWarning, match=rf"stand-in prefers the correct answer on {right} of {n} prompts") as seen:
        measured = with_ability(model, task)
    assert measured.meta["accuracy"] == right / n
    for part in ("induction", f"accuracy of {right / n:.2f}", r"chance (0.50)", "check=False"):
        assert part in str(seen[0].message)


def test_chance_is_the_tasks_own():
    model, task = _answering(40, 64)
    with pytest.warns(MechkitWarning, match=r"chance \(0\.60\)"):
        assert with_ability(model, task, chance=0.6).meta["chance"] == 0.6


@ready.each_case
def test_a_random_model_is_warned_of_where_the_task_was_made(name, options, differ):
    """On the prompts of some seed at least it is at chance; what is measured is what ``known`` keeps."""
    warned = False
    for seed in range(3):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", MechkitWarning)
            task = ready.make(name, seed=seed, **options, check=True)
        seen = [one for one in seen if one.category is MechkitWarning]
        assert all(one.filename == ready.__file__ for one in seen)
        warned = warned or bool(seen)
        right = round(task.meta["accuracy"] * len(task))
        assert right == (len(task.known(ready.model())) if right else 0)
        assert bool(seen) == (right <= 16)  # of 24; 17 has p = 0.032
    assert warned


def test_an_unchecked_task_says_nothing_of_accuracy():
    assert "accuracy" not in ready.make("docstring").meta
