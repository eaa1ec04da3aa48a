"""Run a task with only some heads left in.

1. Take the values that ablated heads get, once: template means, zeros, or the corrupt twins' own.
2. Measure the model as it is, once.
3. For each set of heads: one run in which every other head is replaced, reading only the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..edits import ABLATIONS, Edit, patch_in
from ..errors import OptionError
from ..references import corrupt_activations, template_means
from ..sites import HeadSet, Site

if TYPE_CHECKING:
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task


class Keeper:
    """Measures a task with every head ablated but those it is told to keep.

    Args:
        model: any loaded model.
        task: the clean prompts that run.
        ablation: ``"mean"``, ``"zero"`` or ``"resample"``.
        reference: whose corrupt prompts give the values.
    """

    def __init__(self, model: Model, task: Task, ablation: Ablation, reference: Task):
        if ablation not in ABLATIONS:
            raise OptionError(f"Ablation {ablation!r}", expected="one of " + ", ".join(ABLATIONS))
        self._model, self._task = model, task
        self._heads = model.heads()
        self._values = self._replacements(ablation, reference)
        self._columns = task.answers if task.metric.reads == "answers" else None
        self._clean = self._read(()) if task.metric.reads == "clean" else None
        self.model_metric = self._measure(())

    def metric(self, kept: Sequence[HeadSet], progress: bool = False) -> np.ndarray:
        """Metric of each prompt with each set kept: ``[sets, n]``."""
        bar = tqdm(kept, desc="evaluating", unit="set", disable=not progress)
        return np.stack([self._measure(self._edits(heads)) for heads in bar])

    def _replacements(self, ablation: str, reference: Task) -> dict[Site, Tensor]:
        sites = list(self._heads)
        if ablation == "zero":
            return {site: torch.zeros(self._model.d_head) for site in sites}
        if ablation == "resample":
            source = corrupt_activations(self._model, reference, sites)
        else:
            means = template_means(self._model, reference, sites)
            source = {key: means.rows(key, self._task) for key in means.values}
        return {site: source[site.kind, site.layer][..., site.head, :] for site in sites}

    def _edits(self, kept: HeadSet) -> list[Edit]:
        out = [head for head in self._heads if head not in kept]
        return [patch_in(out, {head: self._values[head] for head in out})] if out else []

    def _read(self, edits: Sequence[Edit]) -> Tensor:
        return self._model.read(self._task.clean, self._task.answer_positions, self._columns, edits)

    def _measure(self, edits: Sequence[Edit]) -> np.ndarray:
        return self._task.metric(self._read(edits), self._task, self._clean).cpu().numpy()
