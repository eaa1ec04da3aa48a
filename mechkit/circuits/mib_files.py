"""The files of MIB's circuit track, as arrays: see ``circuits.mib`` for what they mean."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnsupportedError, first_line
from ..graph import ARROW, EMBED, Graph
from ..sites import Site


@dataclass(eq=False)
class MibFile:
    """What a file says.

    Attributes:
        cfg: dimensions of the model, in the file's words.
        extra: what mechkit adds; other readers pass over it.
        edges: which are in the circuit ``[sources, targets]``, boolean.
        edge_scores: the same shape; NaN where there is none.
        nodes: which are in the circuit ``[sources]``, boolean.
        node_scores: the same shape; NaN where there is none.
        graph: whose sources and targets they are: keys and values are those of every query head.
    """

    cfg: dict[str, Any]
    extra: dict[str, Any]
    edges: np.ndarray
    edge_scores: np.ndarray
    nodes: np.ndarray
    node_scores: np.ndarray
    graph: Graph

    @classmethod
    def empty(cls, cfg: dict[str, Any], extra: dict[str, Any]) -> MibFile:
        """Nothing in the circuit, nothing scored.

        Raises:
            KeyError, TypeError, ValueError: ``cfg`` has no dimensions, or none that a model can have.
        """
        sizes = [cfg["n_layers"], cfg["n_heads"], cfg.get("n_kv_heads", cfg["n_heads"])]
        if not all(type(size) is int and size > 0 for size in sizes) or sizes[1] % sizes[2]:
            raise ValueError(f"cfg with {cfg}")
        graph = Graph(sizes[0], sizes[1], sizes[1], bool(cfg["parallel_attn_mlp"]))
        shape, sources = graph.exists.shape, len(graph.sources)
        blank = (np.zeros(shape, bool), np.full(shape, np.nan), np.zeros(sources, bool), np.full(sources, np.nan))
        return cls(cfg, extra, *blank, graph)


def as_json(content: MibFile) -> bytes:
    """The ``.json`` file."""
    sources, targets = _names(content.graph)
    nodes: dict[str, dict[str, Any]] = {}
    for name, inside, score in zip(sources, content.nodes.tolist(), content.node_scores.tolist(), strict=True):
        nodes[name] = {"in_graph": inside} if np.isnan(score) else {"in_graph": inside, "score": score}
    nodes["logits"] = {"in_graph": True}
    at = np.nonzero(content.edges | ~np.isnan(content.edge_scores))
    columns = (*at, zeroed(content.edge_scores)[at], content.edges[at])
    edges = {
        f"{sources[i]}{ARROW}{targets[j]}": {"score": score, "in_graph": inside}
        for i, j, score, inside in zip(*(column.tolist() for column in columns), strict=True)
    }
    saved = {"cfg": content.cfg, "nodes": nodes, "edges": edges, "mechkit": content.extra}
    return json.dumps(saved).encode()


def as_pt(content: MibFile) -> bytes:
    """The ``.pt`` file."""
    import torch

    sources, targets = _names(content.graph)
    saved: dict[str, Any] = {
        "cfg": content.cfg,
        "src_nodes": sources,
        "dst_nodes": targets,
        "edges_scores": torch.from_numpy(zeroed(content.edge_scores)),
        "edges_in_graph": torch.from_numpy(content.edges),
        "nodes_in_graph": torch.from_numpy(content.nodes),
        "mechkit": json.dumps(content.extra),
    }
    if not np.isnan(content.node_scores).all():
        saved["nodes_scores"] = torch.from_numpy(content.node_scores)
    buffer = BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


def of_json(path: Path) -> MibFile:
    """Read a ``.json`` file.

    Raises:
        UnsupportedError: a circuit of single neurons.
        OSError, AttributeError, LookupError, TypeError, ValueError: what is amiss with the file.
    """
    saved = json.loads(path.read_text(encoding="utf-8"))
    content = MibFile.empty(saved["cfg"], saved.get("mechkit", {}))
    source, target = ({name: i for i, name in enumerate(names)} for names in _names(content.graph))
    for name, info in saved["nodes"].items():
        if "neurons" in info:
            raise UnsupportedError(f"{path} is a circuit of single neurons", expected="one of edges or of nodes")
        if name == "logits":  # always in, and the source of nothing
            continue
        if name not in source:
            raise ValueError(f"no node {name!r} in a model of {content.cfg}")
        content.nodes[source[name]] = _flag(name, info)
        content.node_scores[source[name]] = info.get("score", np.nan)
        if np.isinf(content.node_scores[source[name]]):
            raise ValueError(f"the node {name!r} with a score of {info['score']}")
    for name, info in saved["edges"].items():
        start, _, end = name.partition(ARROW)
        at = (source.get(start, -1), target.get(end, -1))
        if min(at) < 0 or not content.graph.exists[at]:
            raise ValueError(f"no edge {name!r} in a model of {content.cfg}")
        content.edges[at] = _flag(name, info)
        content.edge_scores[at] = info.get("score", np.nan)
        if not np.isfinite(content.edge_scores[at]) and "score" in info:
            raise ValueError(f"the edge {name!r} with a score of {info['score']}")
    missing = content.edges & np.isnan(content.edge_scores)
    if missing.any() and not np.isnan(content.edge_scores).all():
        i, j = np.argwhere(missing)[0]
        raise ValueError(f'the edge "{content.graph.sources[i]}->{content.graph.targets[j]}" has no score, others have')
    return content


def _flag(name: str, info: dict[str, Any]) -> bool:
    inside = info.get("in_graph", False)
    if inside not in (True, False):
        raise ValueError(f"{name!r} with in_graph = {inside!r}")
    return bool(inside)


def of_pt(path: Path) -> MibFile:
    """Read a ``.pt`` file, without running what may be in it; raises as ``of_json`` does."""
    from pickle import UnpicklingError

    import torch

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        raise ValueError(first_line(error)) from error
    content = MibFile.empty(saved["cfg"], json.loads(saved.get("mechkit", "{}")))
    if "neurons_in_graph" in saved:
        raise UnsupportedError(f"{path} is a circuit of single neurons", expected="one of edges or of nodes")
    for name, expected in zip(("src_nodes", "dst_nodes"), _names(content.graph), strict=True):
        if list(saved[name]) != expected:
            raise ValueError(f"{name} are not those of a model of {content.cfg}")
    content.edges = saved["edges_in_graph"].bool().numpy()
    content.edge_scores = np.where(content.graph.exists, saved["edges_scores"].double().numpy(), np.nan)
    content.nodes = saved["nodes_in_graph"].bool().numpy()
    if "nodes_scores" in saved:
        content.node_scores = saved["nodes_scores"].double().numpy()
    shapes = [array.shape for array in (content.edges, content.edge_scores, content.nodes, content.node_scores)]
    full, sources = content.graph.exists.shape, (len(content.graph.sources),)
    if shapes != [full, full, sources, sources]:
        raise ValueError(f"tensors of shapes {shapes}")
    if not np.isfinite(content.edge_scores[content.graph.exists]).all() or np.isinf(content.node_scores).any():
        raise ValueError("scores that are not finite")
    return content


def _names(graph: Graph) -> tuple[list[str], list[str]]:
    """What the file calls sources and targets."""

    def name(one: Site) -> str:
        if one.head is None:
            return "input" if one == EMBED else str(one)
        return f"a{one.layer}.h{one.head}" + ("" if one.is_head else f"<{one.kind}>")

    return [name(one) for one in graph.sources], [name(one) for one in graph.targets]


def zeroed(scores: np.ndarray) -> np.ndarray:
    """Scores with 0 where there is none."""
    return np.where(np.isnan(scores), 0.0, scores)
