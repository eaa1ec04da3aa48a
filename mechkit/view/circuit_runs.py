"""What of a behaviour is left when a circuit's first members are left in, less what is cut.

1. Nodes, nothing but nodes cut: everything else is ablated, as ``Circuit.evaluate`` does it.
2. Nodes, and edges cut: the same circuit as a set of edges, every edge whose source is left in, less the cut ones. With
   none cut this is the same circuit and gives the same number.
3. Edges: the first edges, less those that are cut and those that leave a cut node, without dead ends; so nothing enters
   a cut node either.
4. What is left is put beside the whole model and the empty circuit: faithfulness, and its interval over prompts.
5. What was measured once is kept, and so is what measures: edges of a circuit of nodes need a base run of their own,
   which is made when the first one is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..circuits.curve import keeper_of, pruned
from ..circuits.keep import EdgeKeeper, Keeper
from ..circuits.statistics import drawn_faithfulness, faithfulness, interval
from ..errors import OptionError, SiteError
from ..graph import ARROW, Edge, Graph
from ..sites import Site, site

if TYPE_CHECKING:
    from ..circuits.circuit import Circuit
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task

_NODES = 16  # circuits of at most so many nodes are measured at every size
_POINTS = 10  # of the curve of larger ones, and of circuits of edges
_DIMENSIONS = ("n_layers", "n_heads", "d_model")

_Left: TypeAlias = "tuple[int, frozenset[Site | Edge]]"  # how many members are left in, and what of them is cut


class CircuitRuns:
    """Measures a circuit, and what is left of it.

    Args:
        circuit: of nodes (heads, MLPs) or of edges.
        model, task: the model that it is of, and held-out prompts.
        ablation: ``"mean"``, ``"zero"`` or ``"resample"``: what takes the place of everything else.
        reference: whose corrupt prompts give means and resampled values; left out: ``task``.

    Raises:
        MetricError: the model does no better than with nothing left in.
        OptionError: a circuit of nothing or of another model, or an unknown ablation.
        SiteError: nodes that the model has not.
        UnsupportedError: nodes that are neither heads nor MLPs.
    """

    def __init__(
        self, circuit: Circuit, model: Model, task: Task, ablation: Ablation = "mean", reference: Task | None = None
    ):
        check_circuit(circuit, model)
        self._circuit, self._keeper = circuit, keeper_of(circuit.scores, model, task, ablation, reference)
        self._made = (model, task, ablation, reference)
        self._known: dict[_Left, np.ndarray] = {}
        self._empty = self._measured([(0, frozenset())])[0]
        faithfulness(self._keeper.model_metric, self._empty, self._empty)  # is a fraction defined?

    def run(self, size: int, cuts: Sequence[str] = ()) -> dict[str, Any]:
        """Measure the first ``size`` members less ``cuts``.

        Args:
            size: members that are left in, from 0 to all of them.
            cuts: edges (``"9.6->9.9.q"``; of a circuit of nodes, any edge of the model) and nodes of the circuit
                (``"9.6"``, ``"m10"``). What is cut beyond the first ``size`` members changes nothing.

        Returns:
            ``faithfulness`` with ``low`` and ``high`` (its 95% bootstrap interval over prompts; left out where there
            is none, as of a single prompt), and mean metrics: ``metric`` of what is left, ``model`` with everything,
            ``empty`` with nothing.

        Raises:
            OptionError: a size that the circuit has not.
            SiteError: a cut that is no node and no edge of the circuit.
        """
        total = len(self._circuit)
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or not 0 <= size <= total:
            raise OptionError(f"size = {size!r}", expected=f"a whole number from 0 to {total}")
        (values,) = self._measured([(int(size), frozenset(self._read(one) for one in cuts))])
        full = self._keeper.model_metric
        found = {
            "faithfulness": faithfulness(full, values, self._empty),
            "metric": float(values.mean()),
            "model": float(full.mean()),
            "empty": float(self._empty.mean()),
        }
        if len(full) < 2:
            return found
        # Draws of one prompt alone may have no gap; what is not finite is no JSON.
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = interval(drawn_faithfulness(full, values[None], self._empty, 0))[:, 0].tolist()
        return {**found, "low": low, "high": high} if np.isfinite([low, high]).all() else found

    def curve(self) -> list[dict[str, Any]]:
        """Faithfulness of the circuit's first members: ``{"size", "faithfulness"}``, nothing to all of it."""
        total = len(self._circuit)
        if self._circuit.level == "node" and total <= _NODES:
            sizes = list(range(total + 1))
        else:
            sizes = sorted({0, *(round(one) for one in np.geomspace(1, total, _POINTS)), total})
        values = self._measured([(size, frozenset()) for size in sizes])
        full = self._keeper.model_metric
        shares = [faithfulness(full, one, self._empty) for one in values]
        return [{"size": size, "faithfulness": share} for size, share in zip(sizes, shares, strict=True)]

    def _measured(self, wanted: Sequence[_Left]) -> list[np.ndarray]:
        """Metric of each prompt ``[n]`` of each, together where they are measured alike."""
        new = [one for one in dict.fromkeys(wanted) if one not in self._known]
        by_edge = [one for one in new if self._circuit.level == "edge" or any(isinstance(o, Edge) for o in one[1])]
        by_node = [one for one in new if one not in by_edge]
        if by_edge:
            masks = np.concatenate([self._mask(self._edge_keeper, *one) for one in by_edge])
            self._known.update(zip(by_edge, self._edge_keeper.metric(masks), strict=True))
        if by_node:
            assert isinstance(self._keeper, Keeper)
            kept = [[node for node in self._circuit.nodes[:size] if node not in cuts] for size, cuts in by_node]
            self._known.update(zip(by_node, self._keeper.metric(kept), strict=True))
        return [self._known[one] for one in wanted]

    @cached_property
    def _edge_keeper(self) -> EdgeKeeper:
        if isinstance(self._keeper, EdgeKeeper):
            return self._keeper
        model, task, ablation, reference = self._made
        return EdgeKeeper(model, task, ablation, reference, is_ungrouped(self._circuit))

    @cached_property
    def _graph(self) -> Graph:
        if isinstance(self._keeper, EdgeKeeper):
            return self._keeper.graph
        return self._made[0].graph(is_ungrouped(self._circuit))

    def _read(self, cut: str) -> Site | Edge:
        """What is cut, if it can be."""
        one = self._graph.check(cut) if ARROW in cut else site(cut)
        of_nodes = isinstance(one, Edge) and self._circuit.level == "node"
        if not of_nodes and one not in (self._circuit.edges if isinstance(one, Edge) else self._circuit.nodes):
            raise SiteError(f'"{one}" is not in the circuit', expected="one of its nodes, or an edge between them")
        return one

    def _mask(self, keeper: EdgeKeeper, size: int, cuts: Iterable[Site | Edge]) -> np.ndarray:
        """The edges that are left, as a mask ``[1, sources, targets]``."""
        graph = keeper.graph
        gone = _cut_edges(graph, cuts)
        if self._circuit.level == "edge":
            return pruned(keeper.masks([self._circuit.edges[:size]]) & ~gone, graph)
        assert isinstance(self._keeper, Keeper)
        ablated = {*self._keeper.parts} - {*self._circuit.nodes[:size]}
        kept = np.array([one not in ablated for one in graph.sources])
        return (graph.exists & kept[:, None] & ~gone)[None]


def check_circuit(circuit: Circuit, model: Model | None) -> None:
    """Nothing, if there is something in the circuit, and the model, where there is one, can be its own.

    Raises:
        OptionError: a circuit of nothing, of a model of other dimensions, or of edges of another graph.
        SiteError: nodes that the model has not.
    """
    if not len(circuit):
        raise OptionError("A circuit of nothing", expected=f"at least one member: {circuit.level}s")
    if model is None:
        return
    theirs, mine = circuit.dimensions, {name: getattr(model, name) for name in _DIMENSIONS}
    if odd := [name for name in _DIMENSIONS if theirs.get(name, mine[name]) != mine[name]]:
        raise OptionError(
            "A circuit of a model with " + ", ".join(f"{name} {theirs[name]}" for name in odd),
            expected=", ".join(f"{name} {mine[name]}" for name in odd) + f", as {model.name} has",
            fix="Take the model that it was found in",
        )
    if circuit.level == "edge" and circuit.graph != (own := model.graph(is_ungrouped(circuit))):
        raise OptionError(f"A circuit of edges of {circuit.graph}", expected=f"of {own}, as {model.name} has")
    for node in circuit.nodes:
        model.info.check(node)


def is_ungrouped(circuit: Circuit) -> bool:
    """Whether keys and values are counted for each query head in what the circuit was chosen from."""
    return bool(circuit.dimensions.get("ungrouped", False))


def _cut_edges(graph: Graph, cuts: Iterable[Site | Edge]) -> np.ndarray:
    """What is cut, as a mask ``[sources, targets]``: edges, and of nodes every edge that leaves them.

    What enters a node that nothing leaves does nothing: of a circuit of edges it is a dead end, unless it is a key or
    value that other heads share and still read.
    """
    mask = np.zeros(graph.exists.shape, bool)
    for one in cuts:
        row = graph.source_index[one.source if isinstance(one, Edge) else one]
        mask[row, graph.target_index[one.target] if isinstance(one, Edge) else slice(None)] = True
    return mask
