"""Measure a task with only some heads left in.

1. Take the values that ablated heads get, once: template means, zeros, or the corrupt twins' own.
2. Measure the model as it is, once.
3. Run every set of heads, all others replaced, reading only the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backends.protocol import Keep, Read
from ..errors import OptionError
from ..prompts import check_task
from ..references import corrupt_activations, template_means
from ..sites import HeadSet, Site

if TYPE_CHECKING:
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task

MODES = ("mean", "zero", "resample")
_SETS_AT_ONCE = 32  # between two moves of the progress bar; each call repeats what all sets share


class Keeper:
    """Measures a task with every head ablated but those it is told to keep.

    Args:
        model: any loaded model.
        task: the clean prompts that run.
        ablation: ``"mean"``, ``"zero"`` or ``"resample"``.
        reference: whose corrupt prompts give the values.

    Attributes:
        model_metric: metric of each prompt with every head left in ``[n]``.
    """

    def __init__(self, model: Model, task: Task, ablation: Ablation, reference: Task):
        if ablation not in MODES:
            raise OptionError(f"Ablation {ablation!r}", expected="one of " + ", ".join(MODES))
        check_task(model, task)
        self._model, self._task = model, task
        self._values = self._replacements(ablation, reference)
        columns = task.answers if task.metric.reads == "answers" else None
        self._read = Read(task.answer_positions, columns)
        logits = model.read(task.clean, task.answer_positions, columns)
        self._clean = logits if task.metric.reads == "clean" else None
        self.model_metric = self._measure(logits)

    def metric(self, kept: Sequence[HeadSet], progress: bool = False) -> np.ndarray:
        """Metric of each prompt with each set kept: ``[sets, n]``."""
        info = self._model.info
        masks = torch.zeros(len(kept), info.n_layers, info.n_heads, dtype=torch.bool)
        for number, heads in enumerate(kept):
            for head in heads:
                masks[number, head.layer, info.slot(head)] = True
        # Sets that begin in the same layer go together: what comes before is then run once for all of them.
        order = masks.any(-1).int().argmax(-1).argsort(descending=True)
        values = np.empty((len(kept), len(self._task)), dtype=np.float32)
        with tqdm(total=len(kept), desc="evaluating", unit="set", disable=not progress) as bar:
            for some in order.split(_SETS_AT_ONCE):
                keep = Keep(masks[some], self._values)
                logits = self._model.backend.keep_only(self._task.clean, keep, self._read)
                for number, one in zip(some.tolist(), logits, strict=True):
                    values[number] = self._measure(one)
                bar.update(len(some))
        return values

    def _replacements(self, ablation: str, reference: Task) -> list[Tensor]:
        info = self._model.info
        if ablation == "zero":
            return [torch.zeros(())] * info.n_layers
        layers = [Site(layer, 0) for layer in range(info.n_layers)]  # a recording holds all heads of its layer
        if ablation == "resample":
            source = corrupt_activations(self._model, reference, layers)
        else:
            means = template_means(self._model, reference, layers)
            source = {key: means.rows(key, self._task) for key in means.values}
        return [source["z", layer] for layer in range(info.n_layers)]

    def _measure(self, logits: Tensor) -> np.ndarray:
        return self._task.metric(logits, self._task, self._clean).cpu().numpy()
