"""A task's metric under one change of a model after another; what a free text loses by a change.

1. Prompts are cut into groups of one length, as many at once as one base run may be.
2. Every group runs once without edits, and what enters each block is kept; under edits, a run begins at the block of
   the first edited layer and reads only the answer's logits (``patching.edited``). What that cannot do (an edit of the
   embedding, a family whose blocks cannot be run one by one) runs whole.
3. What an edit has for each prompt of the task is cut with the prompts: values and vectors that have a row a prompt,
   and the reference of resampled values. Spans, means and groups of heads are looked up as in any run of a task.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.lens import LensBackend
from ..backends.memory import in_batches
from ..backends.protocol import Read
from ..edits import Ablate, Edit
from ..errors import EditError, MechkitWarning, UnsupportedError
from ..patching.edited import EditedRuns
from ..progress import bar

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task

Edits: TypeAlias = "Edit | Sequence[Edit]"


def as_edits(edits: Any) -> tuple[Edit, ...]:
    """One edit, or several, as a tuple.

    Raises:
        EditError: something that is no edit.
    """
    several = (edits,) if isinstance(edits, Edit) else edits
    if not isinstance(several, Sequence) or not all(isinstance(one, Edit) for one in several):
        raise EditError(f"{edits!r} is no edit", expected="what mk.ablate, mk.scale and their like make, or a list")
    return tuple(several)


def rows_of(edits: Sequence[Edit], rows: Tensor, n: int) -> list[Edit]:
    """Edits made for a task of ``n`` prompts, for some of its prompts."""
    return [_cut(edit, rows, n) for edit in edits]


def _cut(edit: Edit, rows: Tensor, n: int) -> Edit:
    changes: dict[str, Any] = {}
    for field in fields(edit):
        value = getattr(edit, field.name)
        cut = _cut_value(value, rows, n)
        if isinstance(value, Mapping):
            cut = {key: _cut_value(one, rows, n) for key, one in value.items()}
        changes[field.name] = cut
    if isinstance(edit, Ablate) and edit.mode == "resample" and edit.reference is not None:
        changes["reference"] = edit.reference[rows] if len(edit.reference) == n else edit.reference
    return replace(edit, **changes)


def _cut_value(value: Any, rows: Tensor, n: int) -> Any:
    by_prompt = isinstance(value, Tensor) and value.ndim == 3 and len(value) == n > 1
    return value[rows.to(value.device)] if by_prompt else value


class Measure:
    """The metric of each of a task's clean prompts, under edits.

    Args:
        model: one that runs here.
        task: prompts and metric.

    Attributes:
        clean: without edits ``[n]``.

    Raises:
        CapacityError: a base run does not fit in memory.
    """

    def __init__(self, model: Model, task: Task):
        self._model, self._task = model, task
        at_once = model.backend.base_tokens()
        self._groups: list[tuple[Tensor, Task, EditedRuns | None]] = []
        for length in task.lengths.unique().tolist():
            for some in (task.lengths == length).nonzero()[:, 0].split(max(1, at_once // length)):
                self._groups.append((some, task[some], self._begun(task[some])))
        self._own: dict[int, Tensor] = {}  # rows of logits without edits, where the metric reads them
        self.clean = self(())

    def __call__(self, edits: Sequence[Edit]) -> Tensor:
        """Under edits ``[n]``, on the CPU.

        Raises:
            SiteError, EditError: as of ``model.run``.
            MetricError: a value that is not finite.
        """
        values = torch.zeros(len(self._task))
        for number, (some, part, runs) in enumerate(self._groups):
            if runs is not None and not edits:
                values[some] = runs.clean
                continue
            cut = self._model.resolved(rows_of(edits, some, len(self._task)), part)
            if runs is not None and all(site.kind != "embed" for edit in cut for site in edit.sites):
                values[some] = runs.metric(cut)
            else:
                values[some] = self._whole(number, part, cut)
        return values

    def _begun(self, part: Task) -> EditedRuns | None:
        if not isinstance(self._model.backend, LensBackend):
            return None
        try:
            return EditedRuns(self._model, part)
        except UnsupportedError:
            return None

    def _whole(self, number: int, part: Task, edits: Sequence[Edit]) -> Tensor:
        """As of a group, each run from the embedding to the logits."""
        metric = part.metric
        if metric.reads == "clean" and number not in self._own:
            self._own[number] = self._logits(part, ())
        return metric(self._logits(part, edits), part, self._own.get(number)).cpu()

    def _logits(self, part: Task, edits: Sequence[Edit]) -> Tensor:
        read = Read(part.answer_positions, part.answers if part.metric.reads == "answers" else None)
        return self._model.backend.forward(part.clean, edits, (), read, part.lengths).logits


@where_the_model_is
def measured(model: Model, task: Task, variants: Sequence[Sequence[Edit]], progress: bool = True) -> Tensor:
    """The metric of each clean prompt without edits, then under each of several lists of edits: ``[1 + variants, n]``.

    Raises:
        SiteError, EditError, MetricError, CapacityError: see ``Measure``.
    """
    measure = Measure(model, task)
    values = [measure.clean]
    show = progress and len(variants) > 1
    with bar(len(variants), "measuring", "edit", show=show) as shown, warnings.catch_warnings():
        for number, edits in enumerate(variants):
            if number == 1:  # what is shared by groups of heads has been said
                warnings.simplefilter("ignore", MechkitWarning)
            values.append(measure(edits))
            shown.update()
    return torch.stack(values)


@where_the_model_is
def text_losses(model: Model, tokens: Tensor, lengths: Tensor, variants: Sequence[Sequence[Edit]]) -> Tensor:
    """Mean next-token loss of free texts, in nats a token: without edits, then under each list of edits.

    Args:
        model: any.
        tokens: ids ``[texts, pos]``, padded at the right.
        lengths: tokens of each text ``[texts]``.
        variants: lists of edits.

    Returns:
        ``[1 + variants]``.

    Raises:
        EditError: an edit of a span, or of a position that a text does not have.
    """
    every = torch.arange(len(tokens))
    totals = []
    for edits in ((), *variants):
        resolved = model.resolved(edits, None)

        def losses(some: Tensor, edits: Sequence[Edit] = resolved) -> Tensor:
            ids, ends = tokens[some], lengths[some]
            logits = model.backend.forward(ids, edits, lengths=ends).logits[:, :-1].float()
            wanted = ids[:, 1:].to(logits.device)
            real = torch.arange(wanted.shape[1]) < ends[:, None] - 1
            each = -logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
            return each.cpu()[real].double().sum()

        parts = in_batches(every, max(1, model.backend.base_tokens() // tokens.shape[1]), losses)
        totals.append(sum(total for _, total, _ in parts))
    return torch.stack([torch.as_tensor(total) for total in totals]) / (lengths - 1).clamp(min=0).sum()
