"""Two circuits side by side: overlap beside chance, and what changed between checkpoints.

1. Overlap: the number shared, and its share of both together (Jaccard) and of each.
2. Its p-value is that of a permutation test: the share of random pairs that share at least as much, (1 + such pairs) /
   (1 + draws). A random circuit has as many heads in each layer as the real one, drawn evenly from the layer, so that
   two circuits that both live in late layers share nothing by that alone. A layer has one MLP: MLPs count in the
   overlap and stay where they are in the draws.
3. A random circuit of edges has as many edges between the same two layers, of the same kind of source and the same
   slot of target. The p-value is of edges beyond what layers explain; two circuits that share heads share edges of
   those heads, and the test does not take that away.
4. What two random sets of a layer share has the hypergeometric distribution, so that number itself is drawn, layer by
   layer, and no set is.
5. Difference: what the later circuit kept, what is emergent in it, what it lost, with the scores of both.

Merullo et al. 2023 (arXiv 2310.08744) for the reuse of components between tasks; "Thinking Sparks" (arXiv 2509.25758)
for the circuits of a model before and after training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..errors import OptionError, SiteError
from ..graph import Edge, edge
from ..results import as_html
from ..sites import HeadSet, Site, site
from .algebra import check_alike
from .circuit import Circuit, row_places

Change = Literal["kept", "emergent", "lost"]
_CHANGES: tuple[Change, ...] = ("kept", "emergent", "lost")


@dataclass(frozen=True, eq=False)
class Overlap:
    """What two circuits have in common.

    Attributes:
        both: the edges, or nodes, of both, in the left one's order.
        n_left, n_right: sizes of the two.
        expected: mean number shared by random pairs.
        p: share of random pairs that share at least as much.
        draws: number of random pairs.
        level: ``"node"`` or ``"edge"``.
    """

    both: tuple[Site | Edge, ...]
    n_left: int
    n_right: int
    expected: float
    p: float
    draws: int
    level: Literal["node", "edge"]

    @property
    def shared(self) -> int:
        """Number in both."""
        return len(self.both)

    @property
    def jaccard(self) -> float:
        """Share of those in either that are in both; NaN of two empty circuits."""
        return _share(self.shared, self.n_left + self.n_right - self.shared)

    @property
    def of_left(self) -> float:
        """Share of the left circuit that is in the right one too; NaN of an empty one."""
        return _share(self.shared, self.n_left)

    @property
    def of_right(self) -> float:
        """Share of the right circuit that is in the left one too; NaN of an empty one."""
        return _share(self.shared, self.n_right)

    @property
    def frame(self) -> pd.DataFrame:
        """One row: every number."""
        names = ("shared", "n_left", "n_right", "jaccard", "of_left", "of_right", "expected", "p", "draws")
        return pd.DataFrame([{name: getattr(self, name) for name in names}])

    def __repr__(self) -> str:
        return (
            f"Overlap: {self.shared} {self.level}s shared of {self.n_left} and {self.n_right} "
            f"(Jaccard {self.jaccard:.2f}); {self.expected:.1f} by chance, p = {self.p:.2g}"
        )

    def _repr_html_(self) -> str:
        return as_html(self.frame, f"Overlap of two circuits of {self.level}s")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def overlap(left: Circuit, right: Circuit, *, draws: int = 10_000, seed: int = 0) -> Overlap:
    """How much two circuits have in common, beside random circuits of the same layers; see the module.

    Args:
        left, right: circuits of the same level, in models of the same dimensions.
        draws: number of random pairs; the p-value is never below 1 / (draws + 1).
        seed: of the draws.

    Raises:
        OptionError: circuits that cannot be compared, draws below 1, or a number of heads that is not known.
        SiteError: a head that the model has not.
    """
    check_alike(left, right)
    if not isinstance(draws, int) or draws < 1:
        raise OptionError(f"draws = {draws!r}", expected="a whole number from 1")
    dimensions = {**right.dimensions, **left.dimensions}
    width = {_place(one): _width(one, dimensions) for one in (*left.members, *right.members)}
    first, second = (Counter(_place(one) for one in circuit.members) for circuit in (left, right))
    generator = np.random.default_rng(seed)
    shared, expected = np.zeros(draws, int), 0.0
    for place in sorted(first.keys() & second.keys()):
        a, b, of = first[place], second[place], width[place]
        shared += generator.hypergeometric(a, of - a, b, size=draws)
        expected += a * b / of
    theirs = {*right.members}
    both = tuple(one for one in left.members if one in theirs)
    p = (1 + int((shared >= len(both)).sum())) / (1 + draws)
    return Overlap(both, len(left), len(right), expected, p, draws, left.level)


def _place(one: Site | Edge) -> tuple:
    """What stays in a random circuit: the layer and the kind, of both ends of an edge."""
    if isinstance(one, Edge):
        return (*_place(one.source), *_place(one.target))
    return (one.layer, one.kind, one.grouped)


def _width(one: Site | Edge, dimensions: Mapping[str, Any]) -> int:
    """How many sites, or edges, have the same place; edges of one place all exist or none does."""
    if isinstance(one, Edge):
        return _width(one.source, dimensions) * _width(one.target, dimensions)
    if one.head is None:
        return 1
    name = "n_kv_heads" if one.grouped else "n_heads"
    if name not in dimensions:
        raise OptionError(
            f"The circuits do not know {name}, of which random ones are drawn",
            fix=f'Put "{name}" into the meta of one, or take circuits that mechkit found',
        )
    if one.head >= dimensions[name]:
        raise SiteError(f'"{one}" in a model with {name} {dimensions[name]}', expected=f"0 to {dimensions[name] - 1}")
    return dimensions[name]


@dataclass(frozen=True, eq=False)
class CircuitDiff:
    """What two checkpoints' circuits have, side by side.

    Attributes:
        nodes: a row a node of either: ``node``, ``layer``, ``head``, ``kind``, ``change`` (``"kept"``, ``"emergent"``,
            ``"lost"``), ``score_before``, ``score_after`` (NaN where it was not scored).
        edges: a row an edge of either: ``source``, ``target`` and the same; empty at node level.
        level: of the two circuits.
        n_heads: of a layer of the model, where known.
        meta: how the two circuits were found, and the units of their scores.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    level: Literal["node", "edge"]
    n_heads: int | None
    meta: Mapping[str, Any]

    @property
    def frame(self) -> pd.DataFrame:
        """The edges, or the nodes at node level."""
        return self.edges if self.level == "edge" else self.nodes

    @property
    def kept(self) -> tuple[Site, ...] | tuple[Edge, ...]:
        """In both."""
        return self._of("kept")

    @property
    def emergent(self) -> tuple[Site, ...] | tuple[Edge, ...]:
        """In the later circuit only."""
        return self._of("emergent")

    @property
    def lost(self) -> tuple[Site, ...] | tuple[Edge, ...]:
        """In the earlier circuit only."""
        return self._of("lost")

    def heads(self, change: Change) -> HeadSet:
        """The heads that were kept, are emergent, or were lost.

        Raises:
            OptionError: another word.
        """
        if change not in _CHANGES:
            raise OptionError(f"change = {change!r}", expected="one of " + ", ".join(_CHANGES))
        rows = self.nodes[(self.nodes["change"] == change) & (self.nodes["kind"] == "z")]
        return HeadSet(rows["node"].tolist(), self.n_heads)

    def _of(self, change: Change) -> tuple[Site, ...] | tuple[Edge, ...]:
        rows = self.frame[self.frame["change"] == change]
        if self.level == "edge":
            return tuple(edge(pair) for pair in zip(rows["source"], rows["target"], strict=True))
        return tuple(site(text) for text in rows["node"])

    def __repr__(self) -> str:
        parts = [("nodes", self.nodes)] + ([("edges", self.edges)] if self.level == "edge" else [])
        text = "; ".join(
            f"{what}: " + ", ".join(f"{(table['change'] == change).sum()} {change}" for change in _CHANGES)
            for what, table in parts
        )
        return f"CircuitDiff of {text}"

    def _repr_html_(self) -> str:
        return as_html(self.frame, repr(self))


def diff(before: Circuit, after: Circuit) -> CircuitDiff:
    """What a later checkpoint's circuit kept, gained and lost, with the scores that both checkpoints gave it.

    Raises:
        OptionError: circuits that cannot be compared.
    """
    check_alike(before, after)
    earlier, later = before.as_nodes(), after.as_nodes()
    nodes = _changes(earlier.nodes, later.nodes, earlier.scores, later.scores)
    sites = nodes.pop("text").map(site)
    nodes.insert(0, "node", sites.map(str))
    nodes.insert(1, "layer", [one.layer for one in sites])
    nodes.insert(2, "head", pd.array([one.head for one in sites], dtype="Int64"))
    nodes.insert(3, "kind", [one.kind for one in sites])
    edges = _changes(before.edges, after.edges, before.scores, after.scores)
    found = [edge(text) for text in edges.pop("text")]
    edges.insert(0, "source", [str(one.source) for one in found])
    edges.insert(1, "target", [str(one.target) for one in found])
    meta = {
        name: {**circuit.meta, "unit": circuit.scores.unit} for name, circuit in (("before", before), ("after", after))
    }
    n_heads = {**after.dimensions, **before.dimensions}.get("n_heads")
    return CircuitDiff(nodes, edges, before.level, n_heads, meta)


def _changes(before: tuple, after: tuple, scores_before: Any, scores_after: Any) -> pd.DataFrame:
    """Columns ``text``, ``change``, ``score_before``, ``score_after``: kept, then emergent, then lost."""
    old, new = {*before}, {*after}
    parts: dict[Change, list] = {
        "kept": [one for one in before if one in new],
        "emergent": [one for one in after if one not in old],
        "lost": [one for one in before if one not in new],
    }
    rows = [(str(one), change) for change, part in parts.items() for one in part]
    table = pd.DataFrame(rows, columns=["text", "change"])
    for name, scores in (("score_before", scores_before), ("score_after", scores_after)):
        values, place = scores.frame["score"].to_numpy(float), row_places(scores)
        table[name] = [values[place[text]] if text in place else np.nan for text in table["text"]]
    return table
