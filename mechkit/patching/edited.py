"""A task's metric under edits, many times: the layers before the first edit run once.

1. The clean prompts run once, those of a length together, and what enters each block is kept.
2. Under edits, the run begins at the block of the first edited layer, and only the answer's logits are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.change import functions_of
from ..backends.lens import local_backend
from ..backends.protocol import Read
from ..backends.window import Window
from ..errors import EditError

if TYPE_CHECKING:
    from ..edits import Edit
    from ..model import Model
    from ..tasks.task import Task


class EditedRuns:
    """Base runs of a task's clean prompts, ready to be edited.

    Args:
        model: local.
        task: prompts and metric.

    Attributes:
        clean: the metric of each prompt without edits ``[n]``.

    Raises:
        UnsupportedError: a model that runs elsewhere, or whose blocks cannot be run one by one.
        CapacityError: a base run does not fit in memory.
    """

    def __init__(self, model: Model, task: Task):
        backend = local_backend(model, "Repeated edits of")
        self._backend, self._task = backend, task
        self._groups = []
        for length in task.lengths.unique().tolist():
            prompts = (task.lengths == length).nonzero()[:, 0]
            for some in prompts.split(max(1, backend.base_tokens() // length)):
                self._groups.append((some, backend.start(task.clean[some, :length], 0)))
        ends = [base.ends(self._read(some)) for some, base in self._groups]
        self._own = [logits if task.metric.reads == "clean" else None for logits in ends]
        self.clean = self._metric(ends)
        self._model = model

    @cached_property
    def corrupt(self) -> Tensor:
        """The metric of each corrupt prompt ``[n]``."""
        found = []
        for some, _ in self._groups:
            read = self._read(some)
            found.append(self._model.read(self._task.corrupt[some], read.positions, read.columns))
        return self._metric(found)

    def metric(self, edits: Sequence[Edit]) -> Tensor:
        """The metric of each prompt under edits ``[n]``; their positions are numbers or masks.

        Raises:
            SiteError, EditError: as of ``model.run``; an edit of the embedding, which is before the first block.
        """
        if any(site.kind == "embed" for edit in edits for site in edit.sites):
            raise EditError('"embed", in runs that begin at a block', expected='"resid.0"')
        first = min(site.layer for edit in edits for site in edit.sites)
        first = min(first, self._backend.info.n_layers - 1)  # the stream that leaves the last block is seen there
        found = []
        for some, base in self._groups:
            lengths = self._task.lengths[some]
            functions = functions_of(edits, self._backend.info, Window(lengths))
            found.append(base.vary(first, torch.arange(len(some)), functions, self._read(some)))
        return self._metric(found)

    def _read(self, some: Tensor) -> Read:
        part = self._task[some]
        return Read(part.answer_positions, part.answers if self._task.metric.reads == "answers" else None)

    def _metric(self, logits: Sequence[Tensor]) -> Tensor:
        values = torch.zeros(len(self._task))
        for (some, _), found, own in zip(self._groups, logits, self._own, strict=True):
            values[some] = self._task.metric(found, self._task[some], own).cpu()
        return values
