"""From scores to a circuit: the largest ones, or grown from the logits.

``top``: the edges with the largest scores in size, then dead ends are pruned, so that fewer may be left. ``greedy``:
begin with what the logits read; again and again take the largest edge into what is already in, whose source is then
in too. What was taken leads to the logits by construction. Pruning then takes out what the embedding does not reach.

Hanna et al. 2024 (arXiv 2403.17806), section 3, for the greedy search.
"""

from __future__ import annotations

import heapq
from collections import defaultdict

import numpy as np

from ..edge_scores import EdgeScores
from ..graph import LOGITS, Edge, Graph
from ..sites import Site

SELECTIONS = ("top", "greedy")


def chosen_edges(scores: EdgeScores, size: int, selection: str, min_share: float = 0.0) -> list[Edge]:
    """At most ``size`` edges, in the order in which they are taken; edges without a score, or of 0, never."""
    values = scores.frame["score"].abs().to_numpy(float)
    finite = values[np.isfinite(values)]
    least = max(min_share * float(finite.max(initial=0.0)), np.finfo(float).tiny)
    strength = {
        one: value
        for one, value in zip(scores.edges, values.tolist(), strict=True)
        if np.isfinite(value) and value >= least
    }
    if selection == "greedy":
        return list(grown(strength, scores.graph, size))
    return sorted(strength, key=lambda one: -strength[one])[:size]


def grown(strength: dict[Edge, float], graph: Graph, size: int) -> list[Edge]:
    """The greedy search from the logits; ties go to the edge that stands first."""
    into: dict[Site, list[Edge]] = defaultdict(list)
    for one in strength:
        for node in graph.readers(one.target):
            into[node].append(one)
    order = {one: i for i, one in enumerate(strength)}
    taken: dict[Edge, None] = {}
    inside: set[Site] = set()
    queue: list[tuple[float, int, Edge]] = []

    def enter(node: Site) -> None:
        if node not in inside:
            inside.add(node)
            for one in into[node]:
                heapq.heappush(queue, (-strength[one], order[one], one))

    enter(LOGITS)
    while queue and len(taken) < size:
        one = heapq.heappop(queue)[2]
        if one not in taken:  # an edge into a group stands in the queue for each of its heads
            taken[one] = None
            enter(one.source)
    return list(taken)
