"""Circuits as the circuit track of MIB exchanges them: the files of EAP-IG, ``.json`` and ``.pt``.

1. A file has ``cfg`` (layers, heads, ``parallel_attn_mlp``, ``d_model``), and says of every node and edge whether it is
   in the circuit (``in_graph``) and how important it is (``score``). Names are ``input``, ``a0.h1``, ``m0``, ``logits``
   and ``a0.h1->a1.h2<q>``. So one file is both of MIB's forms, importance scores and circuit.
2. A ``.pt`` holds the same as tensors: edges ``[sources, targets]`` and nodes ``[sources]``, in the order of
   ``mechkit.graph`` with keys and values of every query head.
3. MIB counts keys and values for each query head. An edge into a key/value group is written for every head of the
   group, its score in equal shares; when read, shares are summed and the edge is in if any of them is. The groups stand
   in ``cfg`` as ``n_kv_heads``, which other readers pass over.
4. A circuit of nodes has scores of nodes, and in the circuit every edge among its nodes. Nodes that were not scored
   (MLPs, where only heads were) have no score and are in: MIB's way to say that they always stay.
5. Edges that were not scored are left out of a ``.json``, where 0 is what other readers take them for. A ``.pt`` has
   a number for every edge: 0.

Mueller et al. 2025 (arXiv 2504.13151); the format is that of hannamw/EAP-IG and hannamw/MIB-circuit-track.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..edge_scores import EdgeScores
from ..errors import OptionError, StorageError, UnsupportedError, first_line
from ..graph import EMBED, LOGITS, Graph
from ..results import Scores, write_whole
from ..sites import Site
from .circuit import Circuit, row_places
from .exchange import MEMBERSHIP, node_rows
from .mib_files import MibFile, as_json, as_pt, of_json, of_pt, zeroed

if TYPE_CHECKING:
    from ..model import Model

_SUFFIXES = (".json", ".pt")


def to_mib(circuit: Circuit, path: Path, model: Model | None = None) -> Path:
    """Write a circuit for MIB; see the module. Standard errors and the like are not written.

    Args:
        circuit: of edges, or of heads and MLPs.
        path: ``.json`` or ``.pt``.
        model: whose dimensions they are, where the circuit's scores do not say.

    Raises:
        OptionError: another suffix, dimensions that are not known, or nodes or edges without a score.
        UnsupportedError: nodes that are no heads and no MLPs.
        StorageError: the place cannot be written.
    """
    if path.suffix not in _SUFFIXES:
        raise OptionError(f"Suffix {path.suffix!r}", expected=" or ".join(_SUFFIXES))
    graph = circuit.graph or (model.graph() if model else None)
    d_model = circuit.dimensions.get("d_model", model.d_model if model else None)
    if graph is None or d_model is None:
        raise OptionError("A circuit that does not know its model's dimensions", fix="Pass model=")
    if not np.isfinite(circuit.frame["score"].to_numpy(float)).all():
        raise OptionError("Scores in the circuit that are not finite", expected="a number of each")
    content = _filled(circuit, graph, d_model)
    saved = as_json(content) if path.suffix == ".json" else as_pt(content)
    return write_whole(path, lambda target: target.write_bytes(saved))


def _filled(circuit: Circuit, graph: Graph, d_model: int) -> MibFile:
    cfg = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": d_model,
        "n_kv_heads": graph.n_kv_heads,
        "ungrouped": graph.ungrouped,
    }
    extra = {"unit": circuit.scores.unit, "meta": dict(circuit.meta), "scores_meta": dict(circuit.scores.meta)}
    content = MibFile.empty(cfg, extra)
    if isinstance(circuit.scores, EdgeScores):
        group = _groups(content.graph, graph)
        inside = np.zeros(graph.exists.shape, bool)
        for one in circuit.edges:
            inside[graph.source_index[one.source], graph.target_index[one.target]] = True
        content.edges = inside[:, group]
        content.edge_scores = (circuit.scores.matrix() / np.bincount(group))[:, group]
        touched = {*circuit.nodes} | {one.source for one in circuit.edges}
        content.nodes = np.array([one in touched for one in graph.sources])
        return content
    if other := [str(node) for node in circuit.nodes if not (node.is_head or node.kind == "mlp")]:
        raise UnsupportedError(
            f"Nodes {', '.join(other)} in a file for MIB",
            expected="heads and MLPs",
            fix="Leave them out; the embedding and the logits are always in",
        )
    place = row_places(circuit.scores)
    values = circuit.scores.frame["score"].to_numpy(float)
    content.node_scores = np.array([values[place[str(one)]] if str(one) in place else np.nan for one in graph.sources])
    chosen = {*circuit.nodes, EMBED}
    content.nodes = np.array([one in chosen for one in graph.sources]) | np.isnan(content.node_scores)
    stays = {one for one, inside in zip(graph.sources, content.nodes, strict=True) if inside} | {LOGITS}
    reads = np.array([stays.issuperset(content.graph.readers(one)) for one in content.graph.targets])
    content.edges = content.graph.exists & content.nodes[:, None] & reads
    return content


def from_mib(path: Path, n_kv_heads: int | None = None, level: Literal["node", "edge"] | None = None) -> Circuit:
    """Read a file that MIB's circuit track reads; see the module.

    Its nodes or edges come in the order of the size of their scores. A file of importances alone gives an empty
    circuit with its scores: ``Circuit.of_edges(found.scores.ranked()[:200], found.scores).pruned()`` is one of 200
    edges. Where no edge and no node has a score, those in the circuit have 1.

    Args:
        path: ``.json`` or ``.pt``.
        n_kv_heads: key/value groups of the model, where its heads share keys and values and the file does not say so;
            left out there, every head has its own.
        level: left out, ``"node"`` where nodes have scores or no edge is named, else ``"edge"``.

    Raises:
        OptionError: another suffix, a level that is none, or groups that do not divide the heads.
        UnsupportedError: a circuit of single neurons.
        StorageError: no such file, or one that holds no such circuit.
    """
    if path.suffix not in _SUFFIXES:
        raise OptionError(f"Suffix {path.suffix!r}", expected=" or ".join(_SUFFIXES))
    if level not in (None, "node", "edge"):
        raise OptionError(f"level = {level!r}", expected='"node", "edge" or None')
    try:
        content = of_json(path) if path.suffix == ".json" else of_pt(path)
    except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else first_line(error)
        raise StorageError(
            f"{path} could not be read as a circuit of MIB: {reason}",
            expected="a graph as EAP-IG writes it",
        ) from error
    full, heads = content.graph, content.graph.n_heads
    shared = n_kv_heads if n_kv_heads is not None else content.cfg.get("n_kv_heads", heads)
    if not isinstance(shared, int) or shared < 1 or heads % shared:
        raise OptionError(f"n_kv_heads = {n_kv_heads!r} of {heads} heads", expected="a number that divides the heads")
    ungrouped = n_kv_heads is None and bool(content.cfg.get("ungrouped", False))
    graph = Graph(full.n_layers, heads, shared, full.parallel, ungrouped)
    told = {"method": "read from a file of MIB", "file": path.name}
    dimensions = {"n_layers": full.n_layers, "n_heads": heads, "n_kv_heads": shared, "graph": asdict(graph)}
    if "d_model" in content.cfg:
        dimensions["d_model"] = content.cfg["d_model"]
    meta = content.extra.get("meta", told)
    unit = content.extra.get("unit", "importance")
    scores_meta = {**content.extra.get("scores_meta", told), **dimensions}
    if level is None:
        named = content.edges.any() or not np.isnan(content.edge_scores).all()
        level = "edge" if named and np.isnan(content.node_scores).all() else "node"
    return (_nodes if level == "node" else _edges)(content, graph, unit, scores_meta, meta)


def _nodes(content: MibFile, graph: Graph, unit: str, scores_meta: dict, meta: dict) -> Circuit:
    scores = content.node_scores
    if np.isnan(scores).all():
        unit, scores = MEMBERSHIP, content.nodes.astype(float)
    rows = [i for i, score in enumerate(scores.tolist()) if not np.isnan(score)]
    frame = node_rows([graph.sources[i] for i in rows]).assign(score=scores[rows])
    inside = [i for i in rows if content.nodes[i] and graph.sources[i] != EMBED]
    nodes = tuple(graph.sources[i] for i in sorted(inside, key=lambda i: -abs(scores[i])))
    return Circuit(nodes, Scores(frame, unit, scores_meta), meta)


def _edges(content: MibFile, graph: Graph, unit: str, scores_meta: dict, meta: dict) -> Circuit:
    group = _groups(content.graph, graph)
    inside = np.zeros(graph.exists.shape, bool)
    np.logical_or.at(inside.T, group, content.edges.T)
    inside &= graph.exists  # a .pt may have marks where there is no edge
    known, summed = np.zeros(graph.exists.shape, bool), np.zeros(graph.exists.shape)
    np.logical_or.at(known.T, group, ~np.isnan(content.edge_scores).T)
    np.add.at(summed.T, group, zeroed(content.edge_scores).T)
    if not known.any():
        unit, known, summed = MEMBERSHIP, graph.exists, inside.astype(float)
    table = EdgeScores.of_matrix(graph, np.where(known, summed, np.nan), unit, scores_meta)
    scores = EdgeScores(table.frame.dropna(subset=["score"]).reset_index(drop=True), unit, table.meta)
    at = np.argwhere(inside)
    order = np.argsort(-np.abs(summed[inside]), kind="stable")
    return Circuit.of_edges(((graph.sources[i], graph.targets[j]) for i, j in at[order].tolist()), scores, meta)


def _groups(full: Graph, graph: Graph) -> np.ndarray:
    """Of each target of the ungrouped graph, which target of the other one it belongs to ``[targets]``."""
    found = []
    for one in full.targets:
        if graph.grouped and one.kind in ("k", "v"):
            assert one.head is not None
            one = Site(one.layer, one.head * graph.n_kv_heads // graph.n_heads, one.kind, True)
        found.append(graph.target_index[one])
    return np.array(found)
