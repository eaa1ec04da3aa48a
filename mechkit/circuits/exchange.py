"""Circuits as files and as graphs of networkx.

JSON, version 2: nodes and edges as text, the provenance, and the whole table of scores with its type. Version 1 had
nodes only.

networkx:

1. Nodes carry their names (``"9.9"``, ``"m10"``, ``"embed"``, ``"logits"``) and ``kind``, ``layer``, ``head`` where
   there is one, ``score`` where there is one.
2. A head reads by three slots, so that two heads may have three edges: the graph is a ``MultiDiGraph``, which is a
   ``DiGraph``. Its keys are the targets, ``"9.9.q"``; edges carry ``slot`` (``q``, ``k``, ``v``, ``mlp``, ``logits``),
   ``edge`` (``"9.6->9.9.q"``), ``rank`` (the place in the circuit), ``score`` and what else its row has.
3. What a key/value group reads, all its heads read: ``9.6->9.kv2.k`` is there once for each head of the group.
4. A circuit of nodes has an edge, without rank or score, wherever the model has one among its nodes, the embedding and
   the logits. It has none where neither the circuit's scores nor a model say what the model's dimensions are.
5. Attributes are numbers and text, so that networkx can write the graph in any of its formats.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..edge_scores import EdgeScores, node_sites
from ..errors import OptionError, StorageError
from ..graph import EMBED, LOGITS, Edge, Graph, edge
from ..results import Scores, write_whole
from ..sites import Site, site
from .circuit import Circuit, row_places

if TYPE_CHECKING:
    from networkx import MultiDiGraph

    from ..model import Model

FORMAT, VERSION = "mechkit circuit", 2
_TABLES = {"Scores": Scores, "EdgeScores": EdgeScores}
_OURS = ("edge", "slot", "rank")
MEMBERSHIP = "membership (1: in the circuit)"


def to_json(circuit: Circuit, path: Path) -> Path:
    """Write a circuit; see ``Circuit.to_json``."""
    table = circuit.scores.frame
    content = {
        "format": FORMAT,
        "version": VERSION,
        "nodes": [str(one) for one in circuit.nodes],
        "edges": [str(one) for one in circuit.edges],
        "meta": dict(circuit.meta),
        "scores": {
            "type": type(circuit.scores).__name__,
            "unit": circuit.scores.unit,
            "meta": dict(circuit.scores.meta),
            "columns": {str(column): str(kind) for column, kind in table.dtypes.items()},
            "rows": table.astype(object).where(table.notna(), None).to_dict("split")["data"],
        },
    }
    # A line a number is easy to read, but tables of edges have tens of thousands.
    text = json.dumps(content, indent=1 if circuit.level == "node" else None)
    return write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))


def from_json(path: Path) -> Circuit:
    """Read a circuit; see ``Circuit.from_json``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["version"] not in (1, VERSION):
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        if content["version"] == 1:
            content = {**content, "edges": [], "scores": {"type": "Scores", **content["scores"]}}
        saved = content["scores"]
        table = pd.DataFrame(saved["rows"], columns=list(saved["columns"])).astype(saved["columns"])
        scores = _TABLES[saved["type"]](table, saved["unit"], saved["meta"])
        nodes, edges = tuple(map(site, content["nodes"])), tuple(map(edge, content["edges"]))
        return Circuit(nodes, scores, content["meta"], edges)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{path} could not be read as a circuit: {error}",
            expected="a file that Circuit.to_json wrote",
        ) from error


def to_networkx(circuit: Circuit, model: Model | None = None) -> MultiDiGraph:
    """The circuit as a directed graph; see the module.

    Args:
        circuit: of nodes or of edges.
        model: says which edges there are among the nodes of a circuit that does not know its model's dimensions.

    Raises:
        OptionError: nodes or edges without a score.
    """
    import networkx

    rows: list[dict[Any, Any]] = circuit.frame.to_dict("records")
    scores = circuit.scores
    extra = {"meta": dict(circuit.meta), "scores_meta": dict(scores.meta)}
    made = networkx.MultiDiGraph(level=circuit.level, unit=scores.unit, mechkit=json.dumps(extra))
    graph = circuit.graph or (model.graph() if model else None)
    edges = circuit.edges if circuit.level == "edge" else graph.between(circuit.nodes) if graph else ()
    attributes = [{"rank": i, **_plain(row)} for i, row in enumerate(rows)] if circuit.level == "edge" else []
    ends = [one for one in (EMBED, LOGITS) if any(one in (e.source, e.target) for e in edges)]
    table, place = circuit.node_scores.frame, row_places(circuit.node_scores)
    for one in (*circuit.nodes, *(end for end in ends if end not in circuit.nodes)):
        row = {"score": table["score"].iloc[place[str(one)]]} if str(one) in place else {}
        chosen = circuit.level == "edge" or one in circuit.nodes
        head = {} if one.head is None else {"head": one.head}
        made.add_node(str(one), kind=one.kind, layer=one.layer, **head, **(_plain(row) if chosen else {}))
    for i, one in enumerate(edges):
        assert graph is not None
        for reader in graph.readers(one.target):
            if str(reader) in made:
                more = {"slot": one.target.kind, "edge": str(one), **(attributes[i] if attributes else {})}
                made.add_edge(str(one.source), str(reader), key=str(one.target), **more)
    return made


def from_networkx(graph: Any, model: Model | None = None) -> Circuit:
    """A circuit of a directed graph that ``to_networkx`` made, or that you made in its likeness; see the module.

    The scores are those of what is in the graph; where none has a score, each has 1. A graph has the level of its
    attribute ``level``; without one, it is a circuit of edges if it has edges.

    Args:
        graph: nodes named as sites; at edge level, edges with ``edge`` or ``slot``. The edge into a key/value group is
            taken to be there if any of the group's heads has it.
        model: whose dimensions they are, where the graph does not say.

    Raises:
        SiteError: a name that is no site, or an edge that the model has not.
        OptionError: no directed graph, dimensions that are not known, edges that do not say what they read, nodes that
            no edge touches at edge level, or scores of only some.
    """
    if not (hasattr(graph, "is_directed") and graph.is_directed()):
        raise OptionError(f"A circuit of {type(graph).__name__}", expected="a DiGraph or MultiDiGraph of networkx")
    level = graph.graph.get("level", "edge" if graph.number_of_edges() else "node")
    if level not in ("node", "edge"):
        raise OptionError(f"A graph with level = {level!r}", expected='"node" or "edge"')
    extra = json.loads(graph.graph.get("mechkit", "{}"))
    meta = extra.get("meta", {"method": "read from networkx"})
    scores_meta = extra.get("scores_meta", {"method": "read from networkx"})
    if level == "node":
        found: dict[Any, dict] = {site(name): data for name, data in graph.nodes(data=True)}
        found = {one: data for one, data in found.items() if "score" in data or one not in (EMBED, LOGITS)}
        values, unit = _scores(found, graph)
        scores = Scores(node_rows(found).assign(score=values), unit, scores_meta)
        return Circuit(tuple(found), scores, meta)
    shape = Graph(**scores_meta["graph"]) if "graph" in scores_meta else model.graph() if model else None
    if shape is None:
        raise OptionError("A graph that does not say which model its edges are of", fix="Pass model=")
    found = {}
    for source, reader, data in graph.edges(data=True):
        found.setdefault(shape.check(data.get("edge") or _named(source, reader, data.get("slot"))), data)
    if alone := {site(name) for name in graph} - {*node_sites(found, shape), EMBED, LOGITS}:
        raise OptionError(
            f"Nodes that no edge touches: {', '.join(sorted(map(str, alone)))}",
            fix="Leave them out: graph.remove_nodes_from(list(networkx.isolates(graph)))",
        )
    found = dict(sorted(found.items(), key=lambda pair: pair[1].get("rank", len(found))))
    values, unit = _scores(found, graph)
    rows = [
        {"source": str(one.source), "target": str(one.target), "score": value}
        | {name: it for name, it in data.items() if name not in (*_OURS, "score")}
        for (one, data), value in zip(found.items(), values, strict=True)
    ]
    frame = pd.DataFrame(rows, columns=None if rows else ["source", "target", "score"])
    return Circuit.of_edges(found, EdgeScores(frame, unit, {**scores_meta, "graph": asdict(shape)}), meta)


def node_rows(nodes: Collection[Site]) -> pd.DataFrame:
    """Columns ``site``, ``layer``, ``head``, ``kind`` of a table of scores."""
    return pd.DataFrame(
        {
            "site": [str(one) for one in nodes],
            "layer": [one.layer for one in nodes],
            "head": pd.array([one.head for one in nodes], dtype="Int64"),
            "kind": [one.kind for one in nodes],
        }
    )


def _scores(found: dict[Any, dict], graph: Any) -> tuple[list[float], str]:
    values = [data["score"] for data in found.values() if "score" in data]
    if values and len(values) < len(found):
        first = next(one for one, data in found.items() if "score" not in data)
        raise OptionError(f'"{first}" has no score, others have', expected="a score of each or of none")
    if not all(isinstance(value, Real) for value in values):
        raise OptionError(f"Scores such as {values[0]!r}", expected="numbers")
    unit = graph.graph.get("unit", "score")
    return ([float(value) for value in values], unit) if values else ([1.0] * len(found), MEMBERSHIP)


def _named(source: Any, reader: Any, slot: Any) -> Edge:
    """The edge between two nodes of a graph that was made by hand."""
    one = site(reader)
    if one.is_head and slot not in ("q", "k", "v"):
        raise OptionError(
            f'The edge from "{source}" to "{reader}" with slot = {slot!r}', expected='a slot of "q", "k" or "v"'
        )
    return edge((source, f"{one}.{slot}" if one.is_head else one))


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    """What a row has, as numbers of Python; columns that name the edge are left out."""
    kept = {name: value for name, value in row.items() if name not in ("source", "target") and pd.notna(value)}
    return {name: value.item() if hasattr(value, "item") else value for name, value in kept.items()}
