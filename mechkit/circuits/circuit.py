"""Circuit: the nodes, or the edges, that are said to carry out a behaviour, and the scores that say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from ..edge_scores import EdgeScores, node_sites
from ..errors import OptionError, UnsupportedError
from ..graph import ARROW, Edge, EdgeLike, Graph, edge
from ..results import Scores, as_html
from ..sites import HeadSet, Site, SiteLike, site
from .exchanged import Exchanged

if TYPE_CHECKING:
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task
    from ..view.circuit_view import CircuitView
    from ..view.widget import LiveView
    from .compare import CircuitDiff, Overlap
    from .evaluate import Evaluation

_DIMENSIONS = ("n_layers", "n_heads", "n_kv_heads", "parallel", "ungrouped", "d_model")
_SHOWN = 20


@dataclass(frozen=True, eq=False)
class Circuit(Exchanged):
    """A set of nodes, or of edges, in the order in which they were found.

    ``a | b``, ``a & b``, ``a - b``, ``a ^ b`` and ``a <= b`` are those of its edges, or of its nodes at node level;
    the left side's order is kept.

    Attributes:
        nodes: sites; ``str(node)`` is ``"23.3"`` for a head. With edges: the heads and MLPs that they touch.
        scores: the scores they were chosen by; ``EdgeScores`` where there are edges.
        meta: how the circuit was found.
        edges: none at node level; make a circuit of edges with ``Circuit.of_edges``.

    Raises:
        OptionError: scores that are not those of edges beside edges, or nodes that are not those of the edges.
    """

    nodes: tuple[Site, ...]
    scores: Scores | EdgeScores
    meta: Mapping[str, Any] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.scores, EdgeScores):
            if self.edges:
                raise OptionError(
                    f"A circuit of edges with {type(self.scores).__name__} of nodes", expected="EdgeScores"
                )
            return
        if not all(isinstance(one, Edge) for one in self.edges):
            raise OptionError("edges that are not of the type Edge", fix="Make the circuit with Circuit.of_edges")
        if {*self.nodes} != {*node_sites(self.edges, self.scores.graph)}:
            raise OptionError(
                f"{len(self.nodes)} nodes beside {len(self.edges)} edges with scores of edges",
                expected="the heads and MLPs that the edges touch",
                fix="Make a circuit of edges with Circuit.of_edges, or one of nodes with scores.nodes()",
            )

    @classmethod
    def of_edges(cls, edges: Iterable[EdgeLike], scores: EdgeScores, meta: Mapping[str, Any] | None = None) -> Circuit:
        """The circuit of some edges of the graph that was scored.

        Args:
            edges: ``"9.6->9.9.q"`` and the like; one that is named twice counts once.
            scores: of these edges, and of others.
            meta: how they were found.

        Raises:
            SiteError: an edge that the graph has not.
            OptionError: scores that are not those of edges.
        """
        if not isinstance(scores, EdgeScores):
            raise OptionError(f"Scores of the type {type(scores).__name__}", expected="EdgeScores")
        graph = scores.graph
        unique = tuple(dict.fromkeys(graph.check(one) for one in edges))
        return cls(node_sites(unique, graph), scores, dict(meta or {}), unique)

    # -- what it is made of -----------------------------------------------------------------------------------

    @property
    def level(self) -> Literal["node", "edge"]:
        """``"edge"`` where edges were scored, else ``"node"``."""
        return "edge" if isinstance(self.scores, EdgeScores) else "node"

    @property
    def members(self) -> tuple[Site, ...] | tuple[Edge, ...]:
        """The edges, or the nodes at node level: what its scores are of, and what ``len`` counts."""
        return self.edges if self.level == "edge" else self.nodes

    @property
    def heads(self) -> HeadSet:
        """The nodes that are heads."""
        return HeadSet([node for node in self.nodes if node.is_head], self.dimensions.get("n_heads"))

    @property
    def dimensions(self) -> dict[str, Any]:
        """What it knows of ``n_layers, n_heads, n_kv_heads, parallel, ungrouped, d_model`` of its model."""
        known = {**self.meta, **self.scores.meta}
        known.update(known.get("graph", {}))
        return {name: known[name] for name in _DIMENSIONS if name in known}

    @property
    def graph(self) -> Graph | None:
        """The graph of the model; None where a circuit of nodes does not know the model's dimensions."""
        known = {name: value for name, value in self.dimensions.items() if name != "d_model"}
        return Graph(**known) if {*_DIMENSIONS[:4]} <= {*known} else None

    @property
    def frame(self) -> pd.DataFrame:
        """The rows of ``scores`` that are its nodes (its edges, where it has them), in their order.

        Raises:
            OptionError: some of them were not scored.
        """
        place = row_places(self.scores)
        texts = [str(one) for one in self.members]
        if missing := [text for text in texts if text not in place]:
            raise OptionError(
                f"{self._what(len(missing))} without a score: {', '.join(missing[:5])}", expected="rows of .scores"
            )
        return self.scores.frame.iloc[[place[text] for text in texts]].reset_index(drop=True)

    @property
    def node_scores(self) -> Scores:
        """The scores of nodes: ``scores``, or of each node the sum over the edges that leave it."""
        return self.scores.nodes() if isinstance(self.scores, EdgeScores) else self.scores

    def as_nodes(self) -> Circuit:
        """The circuit of its nodes alone, with ``node_scores``."""
        return Circuit(self.nodes, self.node_scores, self.meta)

    def pruned(self) -> Circuit:
        """Without dead ends: only the edges that lie on a path from the embedding to the logits.

        Raises:
            UnsupportedError: a circuit of nodes, which says nothing of paths.
        """
        if not isinstance(self.scores, EdgeScores):
            raise UnsupportedError("Pruning a circuit of nodes", expected="a circuit of edges")
        return Circuit.of_edges(self.scores.graph.alive(self.edges), self.scores, self.meta)

    # -- beside the model, and beside other circuits ----------------------------------------------------------

    def evaluate(
        self,
        model: Model,
        task: Task,
        ablation: Ablation = "mean",
        reference: Task | None = None,
        controls: int = 20,
        curve: bool = True,
        areas: bool = False,
        seed: int = 0,
        progress: bool = True,
    ) -> Evaluation:
        """How much of the behaviour the circuit carries out by itself; see ``circuits.evaluate``."""
        from .evaluate import evaluate

        return evaluate(
            self,
            model,
            task,
            ablation=ablation,
            reference=reference,
            controls=controls,
            curve=curve,
            areas=areas,
            seed=seed,
            progress=progress,
        )

    def overlap(self, other: Circuit, draws: int = 10_000, seed: int = 0) -> Overlap:
        """How much two circuits have in common, beside random ones of the same layers; see ``circuits.compare``."""
        from .compare import overlap

        return overlap(self, other, draws=draws, seed=seed)

    def diff(self, later: Circuit) -> CircuitDiff:
        """What a later checkpoint's circuit kept, gained and lost; see ``circuits.compare``."""
        from .compare import diff

        return diff(self, later)

    def same_as(self, other: Circuit) -> bool:
        """True when nodes and edges are the same, in whatever order.

        Raises:
            OptionError: circuits of different levels or of models of different dimensions.
        """
        from .algebra import check_alike

        check_alike(self, other)
        return {*self.nodes} == {*other.nodes} and {*self.edges} == {*other.edges}

    def __le__(self, other: Circuit) -> bool:
        from .algebra import check_alike

        check_alike(self, other)
        return {*self.members} <= {*other.members}

    def __or__(self, other: Circuit) -> Circuit:
        return self._combine(other, "|")

    def __and__(self, other: Circuit) -> Circuit:
        return self._combine(other, "&")

    def __sub__(self, other: Circuit) -> Circuit:
        return self._combine(other, "-")

    def __xor__(self, other: Circuit) -> Circuit:
        return self._combine(other, "^")

    def _combine(self, other: Circuit, sign: Literal["|", "&", "-", "^"]) -> Circuit:
        from .algebra import combine

        return combine(self, other, sign)

    # -- to look at -------------------------------------------------------------------------------------------

    def show(
        self,
        model: Model | None = None,
        task: Task | None = None,
        *,
        ablation: Ablation = "mean",
        reference: Task | None = None,
        link: LiveView | Sequence[LiveView] = (),
    ) -> CircuitView:
        """The circuit as a live graph, layers upwards; see ``view.circuit_of``.

        Args:
            model, task: the model it was found in and held-out prompts: its nodes then stand at the positions where
                they do most, and cutting edges and nodes shows what that does to its faithfulness.
            ablation, reference: as of ``evaluate``.
            link: views that share what is chosen and in focus, such as ``mk.view.attention(...)``.

        Raises:
            OptionError: a model without a task, or an empty circuit.
            MetricError: the model does no better than the empty circuit, so that no fraction is defined.
        """
        from ..view.circuit_of import circuit_view

        return circuit_view(self, model, task, ablation=ablation, reference=reference, link=link)

    def __len__(self) -> int:
        return len(self.members)

    def __contains__(self, one: SiteLike | Edge) -> bool:
        if isinstance(one, Edge) or (isinstance(one, str) and ARROW in one):
            graph = self.graph
            return (graph.check(one) if graph else edge(one)) in self.edges
        return site(one) in self.nodes

    def __repr__(self) -> str:
        if self.level == "node":
            return f"Circuit of {len(self)} nodes: {' '.join(map(str, self.nodes))}"
        first = " ".join(map(str, self.edges[:_SHOWN])) + (" …" if len(self) > _SHOWN else "")
        return f"Circuit of {len(self)} edges among {len(self.nodes)} nodes: {first}"

    def _repr_html_(self) -> str:
        if self.level == "node":
            return as_html(self.frame, f"A circuit of {len(self)} nodes")
        caption = f"A circuit of {len(self)} edges among {len(self.nodes)} nodes"
        return as_html(self.frame.head(_SHOWN), caption + (f": the first {_SHOWN}" if len(self) > _SHOWN else ""))

    def _what(self, count: int) -> str:
        return f"{count} {self.level}{'' if count == 1 else 's'}"


def row_texts(scores: Scores | EdgeScores) -> list[str]:
    """The node or edge of every row of a table, as text."""
    frame = scores.frame
    return (frame["source"] + ARROW + frame["target"] if isinstance(scores, EdgeScores) else frame["site"]).tolist()


def row_places(scores: Scores | EdgeScores) -> dict[str, int]:
    """First row of each node or edge in a table, by its text."""
    texts = row_texts(scores)
    return dict(zip(reversed(texts), reversed(range(len(texts))), strict=True))
