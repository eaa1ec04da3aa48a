"""ACDC: take out, one after another, every edge that the behaviour does not need.

1. Begin with the whole model. Go through the edges from the logits backwards: targets that read late first, and of one
   target the sources that write late first.
2. Take the edge out (it then carries what its source writes on the corrupt twin). If the metric falls by less than
   ``threshold`` of the gap between the clean and the corrupt prompts, it stays out; otherwise it is put back.
3. Whole nodes go the same way, all edges that leave them at once.

The decisions depend on one another, so that one run an edge is the plain way. Here the next edges are tried side by
side, each on the assumption that all before it stay out, which is what most do; the results are used up to the first
edge for which that turns out wrong, and no further. The circuit is the one that trying them one by one gives.

Conmy et al. 2023 (arXiv 2304.14997), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..edge_scores import EdgeScores
from ..graph import Edge, Graph
from ..patching.sweep import metric_of
from ..results import Scores, provenance
from ..sites import Site
from .keep import EdgeKeeper

if TYPE_CHECKING:
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task

_MOST = 64  # tried side by side at most


def by_nodes(
    model: Model, task: Task, parts: Sequence[Site], threshold: float, ablation: Ablation, progress: bool
) -> tuple[list[Site], Scores]:
    """The parts that stay, those that the metric fell by most without first, and how much it fell without each."""
    keeper = EdgeKeeper(model, task, ablation)
    candidates = [one for one in reversed(keeper.graph.sources) if one in set(parts)]
    rows = [keeper.graph.source_index[one] for one in candidates]
    stays, falls = _tried(model, task, keeper, rows, threshold, progress)
    frame = pd.DataFrame(
        {
            "site": [str(one) for one in candidates],
            "layer": [one.layer for one in candidates],
            "head": pd.array([one.head for one in candidates], dtype="Int64"),
            "kind": [one.kind for one in candidates],
            "score": falls,
            "n": len(task),
        }
    )
    scores = Scores(frame, "fraction of the metric gap", provenance(model, task, "acdc", 0.0))
    return [candidates[i] for i in np.argsort(-np.abs(falls), kind="stable") if stays[i]], scores


def by_edges(
    model: Model, task: Task, threshold: float, ablation: Ablation, progress: bool
) -> tuple[list[Edge], EdgeScores]:
    """As ``by_nodes``, of every edge of the graph."""
    keeper = EdgeKeeper(model, task, ablation)
    graph, pairs = keeper.graph, backwards(keeper.graph)
    stays, falls = _tried(model, task, keeper, pairs, threshold, progress)
    matrix = np.zeros(graph.exists.shape)
    matrix[tuple(np.array(pairs).T)] = falls
    meta = provenance(model, task, "acdc", 0.0)
    scores = EdgeScores.of_matrix(graph, matrix, "fraction of the metric gap", meta, n=len(task))
    order = np.argsort(-np.abs(falls), kind="stable")
    return [Edge(graph.sources[pairs[i][0]], graph.targets[pairs[i][1]]) for i in order if stays[i]], scores


def _tried(
    model: Model, task: Task, keeper: EdgeKeeper, candidates: Sequence, threshold: float, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """``taken_out`` of candidates that are places in the mask of all edges: whole rows, or single edges."""
    whole = float(keeper.model_metric.mean())

    def measure(sets: list[list[int]]) -> np.ndarray:
        masks = np.repeat(keeper.graph.exists[None], len(sets), 0)
        for mask, out in zip(masks, sets, strict=True):
            for i in out:
                mask[candidates[i]] = False
        return keeper.metric(masks).mean(1)

    gap = whole - float(metric_of(model, task, task.corrupt).mean())
    return taken_out(len(candidates), measure, gap, whole, threshold, progress=progress)


def taken_out(
    count: int,
    measure: Callable[[list[list[int]]], np.ndarray],
    gap: float,
    whole: float,
    threshold: float,
    at_once: int | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``count`` candidates stay in, and by how much the metric fell without each when it was tried.

    Args:
        count: candidates, in the order in which they are tried.
        measure: mean metrics of several sets of candidates that are out.
        gap: metric of the clean prompts less that of the corrupt ones.
        whole: metric with nothing out.
        threshold: fraction of the gap that an edge must be worth.
        at_once: how many are tried side by side; None: as many as have lately proved right; 1: one by one.
        progress: show a bar.

    Returns:
        Booleans and fractions of the gap, ``[count]`` each.
    """
    stays, falls = np.zeros(count, bool), np.zeros(count)
    out: list[int] = []
    current, begin, width = whole, 0, at_once or 4
    with tqdm(total=count, desc="acdc", unit="edge", disable=not progress) as bar:
        while begin < count:
            tried = list(range(begin, min(begin + width, count)))
            values = measure([[*out, *tried[: i + 1]] for i in range(len(tried))])
            done = 0
            for one, value in zip(tried, values.tolist(), strict=True):
                falls[one] = (current - value) / gap
                done += 1
                if falls[one] >= threshold:
                    stays[one] = True
                    break  # what was tried after it was tried without it
                out.append(one)
                current = value
            if at_once is None:
                width = min(_MOST, 2 * width) if done == len(tried) and not stays[tried[-1]] else max(1, done)
            begin += done
            bar.update(done)
    return stays, falls


def backwards(graph: Graph) -> list[tuple[int, int]]:
    """Every edge as (source, target) indices of ``graph``, in the order in which it is tried."""
    pairs = np.argwhere(graph.exists)
    return [(int(i), int(j)) for i, j in pairs[np.lexsort((-pairs[:, 0], -pairs[:, 1]))]]
