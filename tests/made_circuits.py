"""Circuits of edges and of nodes, drawn at random for models that are never made."""

from __future__ import annotations

import numpy as np
import pandas as pd

import mechkit as mk
from mechkit.edge_scores import EdgeScores
from mechkit.graph import Graph
from mechkit.sites import site

GRAPHS = {
    "plain": Graph(3, 4, 4),
    "grouped": Graph(3, 4, 2),
    "one group": Graph(3, 4, 1, parallel=True),
    "ungrouped": Graph(3, 4, 2, ungrouped=True),
}


def edge_scores(graph: Graph, seed: int = 0, unit: str = "fraction of the gap") -> EdgeScores:
    values = np.random.default_rng(seed).normal(size=graph.exists.shape)
    meta = {"method": "made up", "n_layers": graph.n_layers, "n_heads": graph.n_heads, "d_model": 32}
    return EdgeScores.of_matrix(graph, values, unit, meta, se=np.abs(values) / 5, n=7)


def edge_circuit(graph: Graph, size: int = 12, seed: int = 0) -> mk.Circuit:
    chosen = np.random.default_rng(seed + 100).permutation(len(graph))[:size]
    return mk.Circuit.of_edges([graph.edges[i] for i in chosen], edge_scores(graph, seed), {"seed": seed})


def node_circuit(nodes: str, n_heads: int | None = 12, seed: int = 0, n_layers: int = 3) -> mk.Circuit:
    sites = [f"{layer}.{head}" for layer in range(n_layers) for head in range(n_heads or 12)]
    sites += [f"m{layer}" for layer in range(n_layers)]
    found = [site(text) for text in sites]
    frame = pd.DataFrame(
        {
            "site": sites,
            "layer": [one.layer for one in found],
            "head": pd.array([one.head for one in found], dtype="Int64"),
            "kind": [one.kind for one in found],
            "score": np.random.default_rng(seed).normal(size=len(sites)),
        }
    )
    meta = {"n_layers": n_layers, "n_heads": n_heads} if n_heads else {}
    return mk.Circuit(tuple(site(text) for text in nodes.split()), mk.Scores(frame, "fraction of the gap", meta))


def pair(level: str) -> tuple[mk.Circuit, mk.Circuit]:
    if level == "edge":
        return edge_circuit(GRAPHS["grouped"], 40, seed=1), edge_circuit(GRAPHS["grouped"], 50, seed=2)
    return node_circuit("2.1 0.3 m1 1.5 2.0", seed=1), node_circuit("0.3 2.2 1.5 m0 m1 0.1", seed=2)


def same_table(one: pd.DataFrame, other: pd.DataFrame, **options) -> None:
    """Equal scores of equal rows, in whatever order; columns that did not travel are left out."""
    keys = ["source", "target"] if "source" in one else ["site"]
    left, right = (table.set_index(keys)[["score"]].sort_index() for table in (one, other))
    pd.testing.assert_frame_equal(left, right, **options)
