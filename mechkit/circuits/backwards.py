"""Path patching again and again, from the logits backwards to the parts that were found.

1. Patch the paths from every part to the logits. Take those with the largest effects.
2. Their inputs (q, k and v of heads, what MLPs read) are the next receivers. Patch the paths to them from every part
   before them; take the largest that are not in yet.
3. Go on until there are as many parts as were asked for, or no sender moves the metric by ``floor`` of the gap.

Effects become smaller with every step, since a path to one set of receivers is one of many: those of a step are
compared with each other only. A part's score is its effect in the step with its largest one.

Wang et al. 2022 (arXiv 2211.00593), section 3; Merullo et al. 2023 (arXiv 2310.08744), section 4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..edge_scores import EdgeScores
from ..graph import LOGITS, Edge
from ..patching.exact_edges import edge_places
from ..patching.path import path_patch
from ..results import Scores
from ..sites import Site, site

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task

FLOOR = 0.005  # of the gap; below it a step's largest effect is not followed


def by_nodes(
    model: Model, task: Task, sites: str, size: int, width: int, min_share: float, **options: Any
) -> tuple[list[Site], Scores]:
    """The parts found, in order, and the scores of all; receivers of a step are patched together."""
    graph = model.graph()
    through = "mlps" not in sites.split()
    found: list[Site] = []
    receivers: list[Site] = [LOGITS]
    best: Scores | None = None
    while receivers and len(found) < size:
        scores = path_patch(model, task, receivers, sites, through, **options)
        best = scores if best is None else replace(best, frame=_larger(best.frame, scores.frame))
        new = _largest(scores.frame, found, min(width, size - len(found)), min_share)
        found += new
        receivers = [slot for node in new for slot in graph.slots(node) if _read_after_something(slot)]
        receivers = list(dict.fromkeys(receivers))
    assert best is not None
    return found, replace(best, frame=best.frame.reset_index(drop=True))


def by_edges(
    model: Model, task: Task, size: int, width: int, min_share: float, **options: Any
) -> tuple[list[Edge], EdgeScores]:
    """Direct paths between parts as edges, each receiver patched by itself; edges never looked at have score 0, n 0."""
    graph = model.graph()
    score, n = np.zeros(graph.exists.shape), np.zeros(graph.exists.shape, int)
    se = np.zeros(graph.exists.shape)
    taken: dict[Edge, None] = {}
    receivers: list[Site] = [LOGITS]
    seen: set[Site] = {LOGITS}
    scores: Scores | None = None
    while receivers and len(taken) < size:
        scores = path_patch(model, task, receivers, "embed heads mlps", False, each=True, **options)
        at, frame = edge_places(scores, graph), scores.frame
        for matrix, name in ((score, "score"), (se, "se"), (n, "n")):
            matrix[at] = frame[name].to_numpy()
        sizes = frame["score"].abs().to_numpy()
        order = np.argsort(-sizes, kind="stable")[: min(width * len(receivers), size - len(taken))]
        order = order[sizes[order] >= max(FLOOR, min_share * sizes.max())]
        new = [Edge(graph.sources[at[0][i]], graph.targets[at[1][i]]) for i in order]
        taken.update(dict.fromkeys(new))
        nodes = dict.fromkeys(one.source for one in new)
        receivers = [slot for node in nodes for slot in graph.slots(node) if slot not in seen]
        receivers = list(dict.fromkeys(receivers))
        seen.update(receivers)
    assert scores is not None
    return list(taken), EdgeScores.of_matrix(graph, score, scores.unit, scores.meta, se=se, n=n)


def _read_after_something(slot: Site) -> bool:
    return slot.layer > 0 or slot.kind == "mlp"


def _largest(frame: pd.DataFrame, found: list[Site], count: int, min_share: float) -> list[Site]:
    sizes = frame.set_index("site")["score"].abs().sort_values(ascending=False, kind="stable")
    sizes = sizes[sizes >= max(FLOOR, min_share * float(sizes.max()))]
    return [one for one in map(site, sizes.index) if one not in found and one.kind != "embed"][:count]


def _larger(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Of each site the row with the larger effect, in the order of ``old``."""
    both = pd.concat([old, new])
    both = both.assign(size=both["score"].abs()).sort_values("size", ascending=False, kind="stable")
    best = both.drop_duplicates("site").set_index("site", drop=False)
    return best.loc[old["site"]].drop(columns="size")
