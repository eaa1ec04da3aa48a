"""What the circuit view shows: which nodes stand where, and which edges are drawn.

1. Nodes stand by layer. With a model and prompts, each stands at the position where patching it does most: at every
   position where all prompts share one template, else over the task's spans. Without them heads stand by their number.
2. A circuit of edges shows its own edges. A circuit of nodes, with a model and prompts, shows the edges among its nodes
   with the largest scores by EAP, and of each node its strongest one in and out, so that none stands alone.
3. With a model and prompts the view is live: what is cut is measured (``circuit_runs``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..circuits.circuit import row_places
from ..edge_scores import EdgeScores
from ..errors import MetricError, OptionError, UnsupportedError
from ..graph import EMBED, LOGITS, Edge, Graph
from ..patching.activation import patch
from ..patching.edges import edges as score_edges
from ..sites import Site
from .circuit_runs import CircuitRuns, check_circuit, is_ungrouped
from .circuit_view import CircuitView
from .widget import LiveView, linkable, linked

if TYPE_CHECKING:
    from ..circuits.circuit import Circuit
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task

_PLACED_BY = 4  # prompts, at most
_PATCHES = 4000  # about, with more than one prompt: a node at a position of a prompt each
_LEAST = 1e-6  # of the gap: what does less than this nowhere does most nowhere


def circuit_view(
    circuit: Circuit,
    model: Model | None = None,
    task: Task | None = None,
    *,
    ablation: Ablation = "mean",
    reference: Task | None = None,
    link: LiveView | Sequence[LiveView] = (),
) -> CircuitView:
    """The view; see ``Circuit.show``."""
    data = circuit_view_data(circuit, model, task)
    if model is None or task is None:
        view = CircuitView(circuit, data)
    else:
        runs = CircuitRuns(circuit, model, task, ablation, reference)
        view = CircuitView(circuit, data, runs.curve(), runs.run)
    linked(view, *linkable(link))
    return view


def circuit_view_data(
    circuit: Circuit, model: Model | None = None, task: Task | None = None, *, edges: int = 60
) -> dict[str, Any]:
    """Nodes, edges and columns as plain data, ready for JSON.

    Costs, with a model and prompts, patching every node at every position of at most four prompts; and of a circuit of
    nodes one gradient of the whole task.

    Args:
        circuit: of nodes or of edges.
        model, task: the model that it is of, and prompts: what says where nodes stand, and which edges are drawn among
            those of a circuit of nodes.
        edges: how many are drawn of a circuit of nodes, beside the strongest in and out of each node; those of a
            circuit of edges are all drawn.

    Returns:
        ``nodes``: ``site``, ``layer``, ``kind``, ``head``, ``column``, ``score`` and ``se`` (None where there is none),
        ``order`` (how many members come before it). ``edges``: ``edge``, ``source``, ``readers`` (the nodes of the
        circuit that it enters, and the logits), ``slot``, ``score``, ``order``. ``columns``: their names, from left to
        right. ``columns_by``, ``edges_by``: in words. ``title``. ``unit``, of the nodes' scores.

    Raises:
        OptionError: a model without a task or the reverse, a circuit of nothing or of another model, fewer than no
            edges, or a circuit of edges without a score.
        SiteError: nodes that the model has not.
    """
    if (model is None) != (task is None):
        raise OptionError(
            f"A {'task without a model' if model is None else 'model without a task'}",
            expected="both, for a live view; or neither",
        )
    if edges < 0:
        raise OptionError(f"edges = {edges}", expected="a number from 0")
    check_circuit(circuit, model)
    drawn, edges_by = _edges(circuit, model, task, edges)
    ends = {EMBED, LOGITS} if model else {one for pair in drawn for one in (pair.source, pair.target)}
    graph = (model.graph(is_ungrouped(circuit)) if model else circuit.graph) if drawn else None
    columns, columns_by, places = _columns(circuit.nodes, model, task)
    order, table = _orders(circuit), circuit.node_scores
    rows, records = row_places(table), table.frame.to_dict("records")
    first, last = ([one] if one in ends else [] for one in (EMBED, LOGITS))
    nodes = []
    for node in dict.fromkeys([*first, *circuit.nodes, *last]):
        row = records[rows[str(node)]] if str(node) in rows else {}
        nodes.append(
            {
                "site": str(node),
                "layer": int(node.layer),
                "kind": node.kind,
                "head": None if node.head is None else int(node.head),
                "column": len(columns) - 1 if node == LOGITS else places.get(node, 0),
                "order": order.get(node, 0),
                **{name: _number(row.get(name)) for name in ("score", "se")},
            }
        )
    return {
        "nodes": nodes,
        "edges": _rows(circuit, drawn, order, graph),
        "columns": columns,
        "columns_by": columns_by,
        "edges_by": edges_by,
        "unit": circuit.scores.unit,
        "title": _title(circuit, model, task),
    }


def _title(circuit: Circuit, model: Model | None, task: Task | None) -> str:
    known = {**circuit.scores.meta, **circuit.meta}
    found_on = known.get("task")
    names = (found_on.get("name") if isinstance(found_on, Mapping) else found_on, known.get("model"))
    shown = (task.name if task else None, model.name if model else None)
    count = f"Circuit of {len(circuit)} {circuit.level}{'' if len(circuit) == 1 else 's'}"
    return ", ".join([count, *(str(one or other) for one, other in zip(names, shown, strict=True) if one or other)])


def _orders(circuit: Circuit) -> dict[Site, int]:
    """How many members come before each node, or before the first edge that touches it."""
    order: dict[Site, int] = {}
    for i, member in enumerate(circuit.members):
        if isinstance(member, Site):
            order.setdefault(member, i)
            continue
        assert circuit.graph is not None
        for node in (member.source, *circuit.graph.readers(member.target)):
            order.setdefault(node, i)
    return order


def _edges(circuit: Circuit, model: Model | None, task: Task | None, most: int) -> tuple[dict[Edge, float | None], str]:
    """Which edges are drawn, with their scores, the strongest (or first) first; and how they were chosen."""
    if isinstance(circuit.scores, EdgeScores):
        values = circuit.frame["score"]
        return {one: _number(value) for one, value in zip(circuit.edges, values, strict=True)}, ""
    if model is None or task is None:
        return {}, "A circuit of nodes says nothing of edges; circuit.show(model, task) scores them."
    try:
        graph = model.graph(is_ungrouped(circuit))
        scores = score_edges(model, task, method="eap", ungroup=graph.ungrouped, progress=False)
    except (MetricError, UnsupportedError) as error:  # all else can be shown without
        return {}, f"No edges are drawn, as EAP cannot score them: {error}"
    among = graph.between(circuit.nodes)
    values = dict(zip(among, scores.only(among).frame["score"].tolist(), strict=True))
    ranked = sorted(among, key=lambda one: -abs(values[one]))
    chosen = {*ranked[:most]}
    out, into = {}, {}
    for one in reversed(ranked):  # the strongest is written last
        out[one.source] = one
        into.update(dict.fromkeys(graph.readers(one.target), one))
    for node in (*circuit.nodes, EMBED, LOGITS):
        chosen |= {found[node] for found in (out, into) if node in found}
    told = f"Lines: {len(chosen)} of the {len(among)} edges among its parts, those with the largest scores by EAP."
    return {one: _number(values[one]) for one in ranked if one in chosen}, told


def _rows(
    circuit: Circuit, drawn: Mapping[Edge, float | None], order: Mapping[Site, int], graph: Graph | None
) -> list[dict[str, Any]]:
    inside, found = {*circuit.nodes, LOGITS}, []
    for i, (one, score) in enumerate(drawn.items()):
        assert graph is not None
        readers = [node for node in graph.readers(one.target) if node in inside]
        # An edge among nodes is there when its source is and the first of its readers.
        among = max(order.get(one.source, 0), min(order.get(node, 0) for node in readers))
        found.append(
            {
                "edge": str(one),
                "source": str(one.source),
                "readers": [str(node) for node in readers],
                "slot": one.target.kind,
                "score": score or 0.0,  # lines are added up, so one without a score counts nothing
                "order": i if circuit.level == "edge" else among,
            }
        )
    return found


def _columns(nodes: Sequence[Site], model: Model | None, task: Task | None) -> tuple[list[str], str, dict[Site, int]]:
    """Names of the columns, what they mean, and the column of each node."""
    if not nodes:  # edges from the embedding to the logits alone
        return ["all positions"], "", {}
    if model is None or task is None:
        heads = sorted({node.head for node in nodes if node.head is not None})
        names = [f"head {head}" for head in heads] + (["MLP"] if any(node.head is None for node in nodes) else [])
        places = {node: len(heads) if node.head is None else heads.index(node.head) for node in nodes}
        return names, "Columns: heads by their number.", places
    spans, names = _positions(model, task)
    few = task[: max(1, min(_PLACED_BY, len(task), _PATCHES // (len(nodes) * len(names))))]
    try:
        tables = [patch(model, few, nodes, positions=one, progress=False).frame for one in spans or ["each"]]
    except MetricError as error:
        return ["all positions"], f"Positions could not be told apart: {error}", dict.fromkeys(nodes, 0)
    sizes, row = np.zeros((len(nodes), len(names))), {str(node): i for i, node in enumerate(nodes)}
    for table in tables:
        at = table["position"].map(names.index) if spans else table["position"]
        sizes[table["site"].map(row).to_numpy(int), at.to_numpy(int)] = np.nan_to_num(table["score"].abs())
    best = np.where(sizes.max(1) > _LEAST, sizes.argmax(1), len(names) - 1)
    kept = sorted({*best.tolist(), len(names) - 1})  # the logits stand at the last
    places = {node: kept.index(int(at)) for node, at in zip(nodes, best, strict=True)}
    where = "span of the prompts" if spans else "position (named by the first prompt's tokens)"
    prompts = f"{len(few)} prompt{'' if len(few) == 1 else 's'}"
    return [names[i] for i in kept], f"Columns: the {where} where patching each part does most, in {prompts}.", places


def _positions(model: Model, task: Task) -> tuple[list[str], list[str]]:
    """Spans, none where every position can be taken by itself; and the names of either."""
    if bool((task.templates == task.templates[0]).all()):
        ids = task.clean[0, : int(task.lengths[0])].tolist()
        return [], [str(i) if model.tokenizer is None else model.to_text(i) for i in ids]
    first = {name: int(places[0, 0]) for name, places in task.spans.items()}
    names = sorted(first, key=lambda name: (name == "END", first[name]))
    return names, names


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
