"""One score an edge of the graph; see ``mechkit.graph`` for what the edges of a model are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from .errors import OptionError
from .graph import ARROW, Edge, Graph, edge
from .results import Scores, Table
from .sites import HeadSet, Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .view.scores_view import ScoresView
    from .view.widget import LiveView


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Table):
    """One score an edge.

    Attributes:
        frame: a row an edge: ``source``, ``target`` (as text), ``score``, ``se`` (its standard error over prompts,
            where there is one), ``n``.
        unit: of ``score``.
        meta: as of every table, and ``graph``: the fields of the ``Graph``.
    """

    _things: ClassVar[str] = "edges"

    @classmethod
    def of_matrix(
        cls, graph: Graph, scores: np.ndarray, unit: str, meta: Mapping[str, Any], **columns: np.ndarray | int
    ) -> EdgeScores:
        """The table of a matrix.

        Args:
            graph: whose edges they are.
            scores: ``[sources, targets]``; only where there is an edge.
            unit: of the scores.
            meta: how they were made.
            columns: further ones, such as ``se`` ``[sources, targets]`` and ``n``.
        """
        at = np.nonzero(graph.exists)
        frame = pd.DataFrame(
            {
                "source": np.array([str(one) for one in graph.sources])[at[0]],
                "target": np.array([str(one) for one in graph.targets])[at[1]],
                "score": scores[at],
            }
        )
        for name, values in columns.items():
            frame[name] = values[at] if isinstance(values, np.ndarray) else values
        return cls(frame, unit, {**meta, "graph": _fields(graph)})

    @property
    def graph(self) -> Graph:
        """The graph whose edges were scored."""
        return Graph(**self.meta["graph"])

    @property
    def edges(self) -> list[Edge]:
        """The edge of every row."""
        return [edge(pair) for pair in zip(self.frame["source"], self.frame["target"], strict=True)]

    def matrix(self, column: str = "score") -> np.ndarray:
        """A column as ``[sources, targets]`` of ``graph``; NaN where there is no edge or no score."""
        graph = self.graph
        rows = self.frame["source"].map({str(one): i for i, one in enumerate(graph.sources)})
        columns = self.frame["target"].map({str(one): i for i, one in enumerate(graph.targets)})
        full = np.full(graph.exists.shape, np.nan)
        full[rows.to_numpy(), columns.to_numpy()] = self.frame[column].to_numpy(float)
        return full

    def ranked(self) -> list[Edge]:
        """Every edge, the largest score in size first."""
        order = np.argsort(-self.frame["score"].abs().to_numpy(), kind="stable")
        edges = self.edges
        return [edges[i] for i in order.tolist()]

    def nodes(self) -> Scores:
        """One score a node: the sum over the edges that leave it, which to first order is the node's own effect."""
        graph = self.graph
        matrix = self.matrix()
        unscored = np.isnan(matrix).all(1)
        total = pd.Series(np.where(unscored, np.nan, np.nansum(matrix, 1)), index=list(map(str, graph.sources)))
        n = int(self.frame["n"].max()) if "n" in self.frame and len(self.frame) else 0
        frame = pd.DataFrame(
            {
                "site": total.index,
                "layer": [one.layer for one in graph.sources],
                "head": pd.array([one.head for one in graph.sources], dtype="Int64"),
                "kind": [one.kind for one in graph.sources],
                "score": total.to_numpy(),
                "n": n,
            }
        )
        return Scores(frame, self.unit, self.meta)

    def show(self, kind: str | None = None, link: LiveView | Sequence[LiveView] = ()) -> ScoresView:
        """A live map of ``nodes()``; see ``Scores.show``."""
        return self.nodes().show(kind, link)

    def heads(self, k: int = 10) -> HeadSet:
        """The k heads whose outgoing edges have the largest sum in size."""
        return self.nodes().heads(k)

    def only(self, edges: Iterable[Edge | str]) -> EdgeScores:
        """The rows of some edges, in that order.

        Raises:
            OptionError: an edge that was not scored.
        """
        place = {text: i for i, text in enumerate(self.frame["source"] + ARROW + self.frame["target"])}
        wanted = [str(edge(one)) for one in edges]
        if missing := [one for one in wanted if one not in place]:
            raise OptionError(f"Edges that were not scored: {', '.join(missing[:5])}", expected="edges of .frame")
        frame = self.frame.iloc[[place[one] for one in wanted]].reset_index(drop=True)
        return EdgeScores(frame, self.unit, self.meta)

    def plot(self) -> Figure:
        """The heads' sums over their outgoing edges, as a map of layers and heads."""
        from .view.figures import site_map

        return site_map(self.nodes().of_kind("z"))


def _fields(graph: Graph) -> dict[str, Any]:
    return {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "n_kv_heads": graph.n_kv_heads,
        "parallel": graph.parallel,
        "ungrouped": graph.ungrouped,
    }


def node_sites(edges: Iterable[Edge], graph: Graph) -> tuple[Site, ...]:
    """The heads and MLPs that edges leave or reach, in order of their place in the model."""
    found = {one.source for one in edges} | {node for one in edges for node in graph.readers(one.target)}
    return tuple(one for one in graph.sources if one in found and one.kind != "embed")
