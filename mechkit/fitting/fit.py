"""Fit an edit: train its tensors on a task, and show on other prompts what it does.

1. The task is split into training and held-out prompts, unless held-out ones are given.
2. A part of the training prompts is kept for validation; on the rest the free tensors of the edits are trained
   (``train``), the model's own weights as they are. The values that were best in validation are the fit's.
3. A head's score is how far its tensors went from the values that change nothing, as a norm.
4. The report is the evaluation of the fitted edit on the held-out prompts, with controls (``evidence.evaluate``).

LoFiT (Yin et al. 2024, arXiv 2406.01563, section 3) in two calls: scale every head elementwise, with ``l1``, and take
the heads with the largest scores; then steer those.

    first = mk.fit(model, task, mk.scale(model.heads()), l1=5e-4)
    second = mk.fit(model, task, mk.steer(first.scores.heads(10)))
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from ..edits import Edit
from ..edits.free import Free, free
from ..errors import EditError, Interrupted, OptionError, TaskError
from ..evidence.evaluate import EditEvaluation, evaluate
from ..evidence.measure import as_edits
from ..results import Scores, as_html, provenance
from ..sites import Site
from .train import Plan, Trained, filled_in, trained

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import Model
    from ..tasks.task import Task

OBJECTIVES = ("loss", "metric", "preference")
_VALIDATION = 0.2  # of the training prompts


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """A fitted edit, and how it came about.

    Attributes:
        edit: the edit with its fitted tensors; several, as a tuple, where several were given.
        history: a row a validation: ``step``, ``train`` (the mean objective of the steps since the row before),
            ``validation``; both without ``l1``.
        scores: a row a head, or other site: how far its tensors are from the values that change nothing.
        best: the step that the tensors are of.
        train, held_out: prompts that it was fitted on (those of validation among them), and the others.
        meta: model, task, objective, options and versions.
    """

    edit: Edit | tuple[Edit, ...]
    history: pd.DataFrame
    scores: Scores
    best: int
    train: Task
    held_out: Task
    meta: Mapping[str, Any]
    _model: Model = field(repr=False)
    _given: Edit | Sequence[Edit] = field(repr=False)
    _options: Mapping[str, Any] = field(repr=False)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The fitted edits, as ``model.run`` takes them."""
        return as_edits(self.edit)

    @cached_property
    def report(self) -> EditEvaluation:
        """The evaluation on held-out prompts; measured when first asked for, which fits once more on shuffled labels.

        ``mk.evaluate(model, task, fit, ...)`` has fresh prompts, a ranking and other texts.
        """
        return evaluate(
            self._model,
            self.held_out,
            self,
            controls=self._options["controls"],
            seed=self._options["seed"],
            progress=self._options["progress"],
        )

    def again(self, task: Task, *, progress: bool = True) -> Fit:
        """The same edit fitted anew, in the same way, on other training prompts."""
        return fit(self._model, task, self._given, **{**self._options, "held_out": self.held_out, "progress": progress})

    def _told(self) -> str:
        validation = self.history["validation"].to_numpy()
        seen = (
            f"validation {validation[0]:.4g} at the start, {validation.min():.4g} at step {self.best}; "
            if len(validation)
            else ""
        )
        return (
            f"Fit of {len(self.scores)} sites: {seen}{len(self.train)} training, {len(self.held_out)} held-out prompts"
        )

    def __repr__(self) -> str:
        return self._told() + "\n" + self.scores.top(10).to_string(index=False)

    def _repr_html_(self) -> str:
        return as_html(self.scores.top(10), self._told())


def fit(
    model: Model,
    task: Task,
    edit: Edit | Sequence[Edit],
    *,
    objective: Literal["loss", "metric", "preference"] = "loss",
    maximise: bool = True,
    held_out: Task | None = None,
    fraction: float = 0.7,
    steps: int = 200,
    batch: int = 8,
    lr: float = 1e-2,
    l1: float = 0.0,
    beta: float = 0.5,
    every: int = 25,
    controls: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    """Fit the tensors of an edit to a task.

    Costs ``steps`` runs of ``batch`` prompts with gradients, and a run of the validation prompts every ``every`` steps.

    Args:
        model: any; its weights do not change.
        task: prompts; without ``held_out`` it is split.
        edit: one or several, such as ``mk.steer(heads)``, ``mk.scale(heads)`` or ``mk.inject(heads, values)`` with
            what is to be found left out. Edits in which nothing is free are carried out as they are.
        objective: ``"loss"``, minus the log-probability of the correct answer; ``"metric"``, the task's;
            ``"preference"``, that of the pair of answers against the model without edits.
        maximise: the metric, where it is the objective; else it is made small.
        held_out: prompts for the report, which no training sees.
        fraction: of the prompts that is trained on, where the task is split.
        steps: of Adam.
        batch: prompts a step.
        lr: of Adam.
        l1: times the sum of |value - neutral|.
        beta: of the preference.
        every: steps between validations.
        controls: random draws in the report.
        seed: of the splits, the order of prompts and the report.
        progress: show a bar.

    Raises:
        OptionError: an option outside its range.
        TaskError: too few prompts to keep some for validation.
        EditError: nothing to fit, or an edit that the logits do not depend on.
        MetricError: a metric without gradient, or a gradient that is not finite.
        UnsupportedError: a service that keeps code apart from the weights.
        Interrupted: it was stopped; ``error.scores`` is the fit so far, a ``Fit``.
    """
    started = time.perf_counter()
    _check(objective, steps=steps, batch=batch, every=every)
    for name, number in (("lr", lr), ("beta", beta), ("l1", l1)):
        if not isinstance(number, int | float) or not 0 <= number < float("inf") or (name != "l1" and number == 0):
            raise OptionError(
                f"{name} = {number!r}", expected="a number above 0" if name != "l1" else "a number from 0"
            )
    edits = as_edits(edit)
    frees = [free(one, model.info) for one in edits]
    if not any(frees):
        raise EditError(
            f"Nothing to fit in {' '.join(map(repr, edits)) or 'no edit'}",
            expected="an edit with tensors, such as mk.steer(heads) or mk.scale(heads)",
            fix="Try candidates with mk.select",
        )
    train, rest = task.split(fraction, seed) if held_out is None else (task, held_out)
    if len(train) < 2:
        raise TaskError(
            f"{len(train)} training prompts", expected="two at least, one of them for validation", fix="Take more"
        )
    learnt, validation = train.split(1 - max(_VALIDATION, 1 / len(train)), seed)
    plan = Plan(objective, maximise, steps, batch, lr, l1, beta, every, seed)
    found = trained(model, learnt, validation, edits, plan, progress)
    options = {name: value for name, value in vars(plan).items() if name != "maximise" or objective == "metric"}
    meta = provenance(model, train, "fit", time.perf_counter() - started, **options, held_out=len(rest))
    filled = filled_in(edits, frees, found.tensors)
    done = Fit(
        edit=filled[0] if isinstance(edit, Edit) else tuple(filled),
        history=pd.DataFrame(found.history, columns=["step", "train", "validation"]),
        scores=_scores(frees, found, len(learnt), meta),
        best=found.best,
        train=train,
        held_out=rest,
        meta=meta,
        _model=model,
        _given=edit,
        _options={**vars(plan), "controls": controls, "progress": progress},
    )
    if found.done < steps:
        raise Interrupted(
            f"Stopped after {found.done} of {steps} steps. What was fitted is in the error's .scores "
            "(in a notebook: import sys; sys.last_value.scores).",
            done,
        )
    return done


def _check(objective: str, **numbers: int) -> None:
    if objective not in OBJECTIVES:
        raise OptionError(f"objective = {objective!r}", expected="one of " + ", ".join(OBJECTIVES))
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise OptionError(f"{name} = {number!r}", expected="a whole number from 1")


def _scores(frees: Sequence[Sequence[Free]], found: Trained, n: int, meta: Mapping[str, Any]) -> Scores:
    squares: dict[Site, float] = {}
    every = [one for some in frees for one in some]
    for one, tensor in zip(every, found.tensors, strict=True):
        site = _whole(one.site)
        squares[site] = squares.get(site, 0.0) + _square(tensor, one.neutral)
    frame = pd.DataFrame(
        {
            "site": [str(site) for site in squares],
            "layer": [site.layer for site in squares],
            "head": pd.array([site.head for site in squares], dtype="Int64"),
            "kind": [site.kind for site in squares],
            "score": [square**0.5 for square in squares.values()],
            "metric": float("nan"),
            "se": float("nan"),
            "n": n,
        }
    )
    return Scores(frame, "distance from no change", meta)


def _square(tensor: Tensor, neutral: Tensor) -> float:
    return float((tensor - neutral.to(tensor)).double().square().sum())


def _whole(site: Site) -> Site:
    """The head that a pattern, or scores, are of."""
    return Site(site.layer, site.head) if site.kind in ("pattern", "scores") else site
