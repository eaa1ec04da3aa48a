"""Every edge patched by itself: what first-order scores are measured against.

1. Run the base. What one source writes, as one target alone reads it, is taken from the source run; everything after
   the target runs as it will.
2. That is the direct path from the source to the target, so path patching with one receiver measures it: each edge
   costs what is left of the model after its target, at the positions that change.

Conmy et al. 2023 (arXiv 2304.14997), section 3, the interventions of ACDC.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..edge_scores import EdgeScores
from ..errors import Interrupted
from ..graph import Graph
from ..results import Scores, provenance
from .path import path_patch

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task


def exact_edges(
    model: Model, task: Task, direction: str, checkpoint: str | Path | None = None, progress: bool = True
) -> EdgeScores:
    """The effect of every edge; see ``mk.edges``.

    Raises:
        Interrupted: it was stopped; ``error.scores`` has the edges measured so far.
    """
    started, graph = time.perf_counter(), model.graph()

    def table(scores: Scores) -> EdgeScores:
        values = {name: np.full(graph.exists.shape, np.nan) for name in ("score", "metric", "se", "n")}
        at = edge_places(scores, graph)
        for name, matrix in values.items():
            matrix[at] = scores.frame[name].to_numpy(float)
        ends = {name: scores.meta["options"][name] for name in ("base_metric", "source_metric")}
        seconds = time.perf_counter() - started
        meta = provenance(model, task, "edges: exact", seconds, direction=direction, **ends)
        made = EdgeScores.of_matrix(graph, values.pop("score"), scores.unit, meta, **values)
        frame = made.frame.dropna(subset="score").astype({"n": int}).reset_index(drop=True)
        return EdgeScores(frame, made.unit, made.meta)

    try:
        return table(
            path_patch(
                model,
                task,
                receivers=graph.targets,
                senders="embed heads mlps",
                through_mlps=False,
                direction=direction,  # type: ignore[arg-type]
                each=True,
                checkpoint=checkpoint,
                progress=progress,
            )
        )
    except Interrupted as stopped:
        raise Interrupted(str(stopped), table(stopped.scores)) from stopped


def edge_places(scores: Scores, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Where in the graph's matrix ``[sources, targets]`` the paths of scores stand: two index arrays."""
    ends = []
    for column, places in (("sender", graph.source_index), ("receiver", graph.target_index)):
        numbers = {str(one): i for one, i in places.items()}
        ends.append(scores.frame[column].map(numbers).to_numpy(int))
    return ends[0], ends[1]
