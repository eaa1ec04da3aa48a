"""Scores and circuits of tiny models, for what evaluates them."""

from __future__ import annotations

import numpy as np

import mechkit as mk
from mechkit.edge_scores import EdgeScores
from mechkit.results import Scores


def edge_scores(model: mk.Model, seed: int = 0, ungrouped: bool = False) -> EdgeScores:
    graph = model.graph(ungrouped)
    drawn = np.random.default_rng(seed).normal(size=graph.exists.shape)
    return EdgeScores.of_matrix(graph, drawn, "effect", {"n_heads": model.n_heads}, n=4)


def node_scores(model: mk.Model, task: mk.Task, sites: str = "heads mlps") -> Scores:
    return mk.patch(model, task, sites, progress=False)


def edge_circuit(model: mk.Model, size: int = 60, seed: int = 0) -> mk.Circuit:
    scores = edge_scores(model, seed)
    return mk.Circuit.of_edges(scores.ranked()[:size], scores)
