"""Measure a task with only some parts of the model, or only some edges between them, left in.

1. Take the values that ablated parts get, once: means over the corrupt prompts of a template, zeros, or what the part
   writes on the prompt's own corrupt twin.
2. Measure the model as it is, once.
3. Run every set of parts with all others replaced; or every set of edges, with all others carrying what their source
   writes when ablated. Only the answer is read.
4. What is resampled from a prompt's own twin does not differ before the twins do. Prompts whose twins begin to differ
   at about the same position run together from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..backends.elsewhere import kept_where_the_model_is
from ..backends.protocol import Ablated, EdgeRuns, Keep, Read
from ..errors import OptionError, UnsupportedError
from ..graph import Edge, EdgeLike, Graph
from ..progress import bar as progress_bar
from ..prompts import check_task
from ..references import corrupt_activations, template_means
from ..sites import Site

if TYPE_CHECKING:
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task

Masks: TypeAlias = "np.ndarray | Tensor"
MODES = ("mean", "zero", "resample")
KINDS = ("z", "mlp")
_SETS_AT_ONCE = 32  # between two moves of the progress bar; each call repeats what all sets share
_AT_ONCE = 1 << 28  # bytes of masks, and of logits that are kept until they are measured
_MORE = 4  # a group of prompts may run this part of its positions in vain


class _Measured:
    """A task, and the metric of each of its prompts.

    Attributes:
        model_metric: with everything left in ``[n]``.
    """

    def __init__(self, model: Model, task: Task, ablation: Ablation, reference: Task):
        if ablation not in MODES:
            raise OptionError(f"Ablation {ablation!r}", expected="one of " + ", ".join(MODES))
        check_task(model, task)
        if ablation == "resample" and reference.corrupt.shape != task.clean.shape:
            raise OptionError(
                f"Resampling prompts of shape {list(task.clean.shape)} from a reference of shape "
                f"{list(reference.corrupt.shape)}",
                expected="as many reference prompts, of the same lengths",
            )
        self._model, self._task, self._ablation, self._reference = model, task, ablation, reference
        columns = task.answers if task.metric.reads == "answers" else None
        self._read = Read(task.answer_positions, columns)
        logits = model.read(task.clean, task.answer_positions, columns)
        self._clean = logits if task.metric.reads == "clean" else None
        self.model_metric = self._measure(logits)

    def _ablated(self, sites: list[Site]) -> Mapping[tuple[str, int], Tensor]:
        """What is written at some sites when ablated: ``[n, pos, ...]``, or what broadcasts to it, by (kind, layer)."""
        if self._ablation == "zero":
            return {(one.kind, one.layer): torch.zeros(()) for one in sites}
        if self._ablation == "resample":
            return corrupt_activations(self._model, self._reference, sites)
        means = template_means(self._model, self._reference, sites)
        return {key: means.rows(key, self._task) for key in means.values}

    def _windows(self) -> Iterator[tuple[Tensor, slice]]:
        """Prompts that run together, and the positions at which anything may differ."""
        task, first = self._task, torch.zeros_like(self._task.lengths)
        if self._ablation == "resample":
            differ = task.clean != self._reference.corrupt
            first = torch.where(differ.any(1), differ.int().argmax(1), task.lengths - 1)
        for rows in _together(first, task.lengths, self._model.backend.base_tokens()):
            yield rows, slice(int(first[rows].min()), int(task.lengths[rows].max()))

    def _read_of(self, rows: Tensor) -> Read:
        columns = self._read.columns
        return Read(self._read.positions[rows], None if columns is None else columns[rows])

    def _logits(self, sets: int) -> Tensor:
        """Room for the logits of sets ``[sets, n, k]``."""
        width = self._model.info.d_vocab if self._read.columns is None else self._read.columns.shape[1]
        return torch.empty(sets, len(self._task), width)

    def _measure(self, logits: Tensor) -> np.ndarray:
        return self._task.metric(logits, self._task, self._clean).cpu().numpy()


@kept_where_the_model_is
class Keeper(_Measured):
    """Measures a task with every head, or MLP, ablated but those it is told to keep.

    Args:
        model: any loaded model.
        task: the clean prompts that run.
        ablation: ``"mean"``, ``"zero"`` or ``"resample"``.
        reference: whose corrupt prompts give the values; left out: ``task``.
        kinds: what is ablated at all: ``"z"`` for heads, ``"mlp"`` for MLPs.

    Attributes:
        model_metric: metric of each prompt with everything left in ``[n]``.
        parts: every head and MLP of those kinds.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        ablation: Ablation,
        reference: Task | None = None,
        kinds: Sequence[str] = ("z",),
    ):
        super().__init__(model, task, ablation, reference or task)
        if not kinds or not {*kinds} <= {*KINDS}:
            raise UnsupportedError(f"Ablating sites of the kinds {', '.join(kinds)}", expected="heads, MLPs or both")
        every = [Site(layer, None if kind == "mlp" else 0, kind) for layer in range(model.n_layers) for kind in kinds]
        values, nothing = self._ablated(every), torch.zeros(())  # a recording holds all heads of its layer
        self._heads, self._mlps = ([values.get((kind, at), nothing) for at in range(model.n_layers)] for kind in KINDS)
        self._kinds, self._groups = frozenset(kinds), list(self._windows())
        graph = Graph(model.n_layers, model.n_heads, model.n_kv_heads)
        self.parts = tuple(one for one in graph.sources if one.kind in kinds)

    def metric(self, kept: Sequence[Iterable[Site]], progress: bool = False) -> np.ndarray:
        """Metric of each prompt with each set kept: ``[sets, n]``.

        Raises:
            UnsupportedError: something that is none of ``parts``.
        """
        info, known = self._model.info, {*self.parts}
        heads = torch.full((len(kept), info.n_layers, info.n_heads), "z" not in self._kinds)
        mlps = torch.full((len(kept), info.n_layers), "mlp" not in self._kinds)
        for number, parts in enumerate(kept):
            for part in parts:
                if part not in known:
                    raise UnsupportedError(
                        f'Leaving in "{part}" where sites of the kinds {", ".join(sorted(self._kinds))} are ablated',
                        expected="heads and MLPs of those kinds",
                    )
                if part.kind == "mlp":
                    mlps[number, part.layer] = True
                else:
                    heads[number, part.layer, info.slot(part)] = True
        # Sets that begin in the same layer go together: what comes before is then run once for all of them.
        any_part = heads.any(-1) | mlps if "mlp" in self._kinds else heads.any(-1)
        order = any_part.int().argmax(-1).argsort(descending=True)
        values = np.empty((len(kept), len(self._task)), dtype=np.float32)
        with progress_bar(values.size, "evaluating", "run", show=progress) as bar:
            for some in order.split(_SETS_AT_ONCE):
                logits = self._logits(len(some))
                for rows, window in self._groups:
                    at_heads, at_mlps = ([_part(one, rows, window) for one in v] for v in (self._heads, self._mlps))
                    keep = Keep(heads[some], at_heads, first=window.start)
                    if "mlp" in self._kinds:
                        keep = Keep(heads[some], at_heads, mlps[some], at_mlps, window.start)
                    tokens = self._task.clean[rows, : window.stop]
                    found = self._model.backend.keep_only(tokens, keep, self._read_of(rows))
                    logits[:, rows] = found.to("cpu", torch.float32)
                    bar.update(len(some) * len(rows))
                for number, one in zip(some.tolist(), logits, strict=True):
                    values[number] = self._measure(one)
        return values


@kept_where_the_model_is
class EdgeKeeper(_Measured):
    """Measures a task with only some edges carrying what their source writes, all others what it writes when ablated.

    What a part reads over an edge that is not kept is what the source writes on the prompt's corrupt twin
    (``"resample"``), its mean over the corrupt prompts of the template (``"mean"``), or nothing (``"zero"``).

    Args:
        model: any loaded model.
        task: the clean prompts that run.
        ablation: ``"resample"``, ``"mean"`` or ``"zero"``.
        reference: whose corrupt prompts give the values; left out: ``task``.
        ungrouped: count keys and values for each query head, where heads share them.

    Attributes:
        graph: whose edges they are.
        model_metric: metric of each prompt with every edge left in ``[n]``.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        ablation: Ablation = "resample",
        reference: Task | None = None,
        ungrouped: bool = False,
    ):
        super().__init__(model, task, ablation, reference or task)
        self.graph = model.graph(ungrouped)
        every = [Site(layer, None if kind == "mlp" else 0, kind) for layer in range(model.n_layers) for kind in KINDS]
        values = self._ablated([Site(0, None, "resid"), *every])
        self._groups = list(self._started(values))

    @property
    def parts(self) -> tuple[Edge, ...]:
        """Every edge of the graph."""
        return self.graph.edges

    def masks(self, kept: Sequence[Iterable[EdgeLike]]) -> np.ndarray:
        """Sets of edges as masks ``[sets, sources, targets]``, in the order of ``graph``.

        Raises:
            SiteError: an edge that the graph has not.
        """
        masks = np.zeros((len(kept), *self.graph.exists.shape), bool)
        for mask, edges in zip(masks, kept, strict=True):
            for one in edges:
                found = self.graph.check(one)
                mask[self.graph.source_index[found.source], self.graph.target_index[found.target]] = True
        return masks

    def metric(self, kept: Sequence[Iterable[EdgeLike]] | Masks, progress: bool = False) -> np.ndarray:
        """Metric of each prompt with each set kept: ``[sets, n]``.

        Sets whose parts read what they read in the whole model up to some layer begin there; those that begin late
        run together.

        Args:
            kept: sets of edges, or masks ``[sets, sources, targets]`` in the order of ``graph``.
            progress: show a bar.

        Raises:
            OptionError: masks of another shape.
        """
        masks = torch.as_tensor(kept if isinstance(kept, np.ndarray | Tensor) else self.masks(kept))
        if masks.shape[1:] != self.graph.exists.shape or masks.dtype != torch.bool:
            raise OptionError(
                f"Masks of shape {list(masks.shape)} and type {masks.dtype}",
                expected=f"booleans of shape [sets, {self.graph.exists.shape[0]}, {self.graph.exists.shape[1]}]",
            )
        values = np.empty((len(masks), len(self._task)), dtype=np.float32)
        at_once = max(1, _AT_ONCE // (4 * self._logits(1).numel() + masks[0].numel()))
        with progress_bar(values.size, "evaluating", "run", show=progress) as bar:
            for sets in torch.arange(len(masks)).split(at_once):
                logits = self._logits(len(sets))
                for rows, runs in self._groups:
                    for some, which, found in runs.keep(masks[sets], self._read_of(rows)):
                        logits[some[:, None], rows[which]] = found.to("cpu", torch.float32)
                        bar.update(len(some) * len(which))
                for number, one in zip(sets.tolist(), logits, strict=True):
                    values[number] = self._measure(one)
        return values

    def _started(self, values: Mapping[tuple[str, int], Tensor]) -> Iterator[tuple[Tensor, EdgeRuns]]:
        """Prompts that run together, and their base run."""
        for rows, window in self._windows():
            mine = {key: _part(value, rows, window) for key, value in values.items()}
            ablated = Ablated(mine, self._ablation == "resample", self.graph.ungrouped)
            tokens = self._task.clean[rows, : window.stop]
            yield rows, self._model.backend.keep_edges(tokens, window.start, ablated)


def _part(values: Tensor, rows: Tensor, window: slice) -> Tensor:
    """Of values ``[n, pos, ...]``, or of one for all, those of some prompts and positions."""
    return values[rows.to(values.device), window] if values.ndim else values


def _together(first: Tensor, lengths: Tensor, tokens: int) -> Iterator[Tensor]:
    """Prompts by their first position that runs and their length, like ones together.

    Args:
        first, lengths: of each prompt ``[n]``.
        tokens: how many one base run may be.
    """
    order = (first * (int(lengths.max()) + 1) + lengths).argsort(stable=True)
    group: list[int] = []
    needed = begin = end = 0
    for row in order.tolist():
        own = int(lengths[row] - first[row])
        low, high = (int(first[row]), int(lengths[row])) if not group else (begin, max(end, int(lengths[row])))
        wasted = (len(group) + 1) * (high - low) - needed - own
        if group and (wasted * _MORE > needed + own or (len(group) + 1) * high > tokens):
            yield torch.tensor(group)
            group, needed, low, high = [], 0, int(first[row]), int(lengths[row])
        group, needed, begin, end = [*group, row], needed + own, low, high
    yield torch.tensor(group)
