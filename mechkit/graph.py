"""The graph of a transformer: what writes to the residual stream, what reads from it, and every edge between.

    sources    "embed", every head "9.9", every MLP "m9"                what they write to the stream
    targets    a head's "9.9.q", ".k", ".v", every MLP "m9", "logits"   what they read from it

1. An edge ``9.6->9.9.q`` stands for what head 9.6 writes and the query of head 9.9 reads. There is one wherever the
   source writes to the stream before the target reads from it.
2. Query heads that share a key and value share their edges: ``9.6->9.kv2.k``. The ungrouped graph has an edge for each
   query head instead, as tools that do not know grouped queries count them.
3. In a block whose attention and MLP run side by side (GPT-J, Phi), no head of a layer writes to the layer's MLP.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Syed et al. 2023 (arXiv 2310.10348), section 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from .errors import SiteError
from .sites import Site, SiteLike, site

ARROW = "->"
SLOTS = ("q", "k", "v")
EMBED, LOGITS = Site(-1, None, "embed"), Site(-1, None, "logits")


@dataclass(frozen=True, order=True)
class Edge:
    """What one part writes and another reads; ``str(edge)`` is ``"9.6->9.9.q"``.

    Attributes:
        source: ``embed``, a head or an MLP.
        target: q, k or v of a head or group, an MLP, or the logits.
    """

    source: Site
    target: Site

    def __str__(self) -> str:
        return f"{self.source}{ARROW}{self.target}"

    def __repr__(self) -> str:
        return f'edge("{self}")'


EdgeLike: TypeAlias = "str | Edge | tuple[SiteLike, SiteLike]"


def edge(address: EdgeLike) -> Edge:
    """Read one edge: ``"9.6->9.9.q"``, an Edge, or a (source, target) pair.

    Raises:
        SiteError: it is no edge, or its ends cannot be the ends of one.
    """
    if isinstance(address, Edge):
        return address
    ends = address.split(ARROW) if isinstance(address, str) else address
    if not isinstance(ends, tuple | list) or len(ends) != 2:
        raise SiteError(f"{address!r} is not an edge", expected='text such as "9.6->9.9.q" or "m3->logits"')
    source, target = site(ends[0]), site(ends[1])
    if not (source.kind in ("embed", "mlp") or source.is_head):
        raise SiteError(f'"{source}" as the source of an edge', expected='"embed", a head or an MLP')
    if target.kind not in (*SLOTS, "mlp", "logits"):
        raise SiteError(f'"{target}" as the target of an edge', expected='"9.9.q", "9.kv2.k", "m9" or "logits"')
    return Edge(source, target)


@dataclass(frozen=True)
class Graph:
    """Every source, target and edge of a model of some size.

    Attributes:
        n_layers, n_heads, n_kv_heads: of the model.
        parallel: the MLP of a layer does not read what the heads of the layer write.
        ungrouped: keys and values are counted for each query head.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool = False
    ungrouped: bool = False

    @property
    def grouped(self) -> bool:
        """True when keys and values are those of groups."""
        return self.n_kv_heads != self.n_heads and not self.ungrouped

    @cached_property
    def sources(self) -> tuple[Site, ...]:
        """``embed``, then of each layer its heads and its MLP."""
        found = [EMBED]
        for layer in range(self.n_layers):
            found += [*(Site(layer, head) for head in range(self.n_heads)), Site(layer, None, "mlp")]
        return tuple(found)

    @cached_property
    def targets(self) -> tuple[Site, ...]:
        """Of each layer its queries, keys, values and MLP; then the logits."""
        found: list[Site] = []
        shared = self.n_kv_heads if self.grouped else self.n_heads
        for layer in range(self.n_layers):
            found += [Site(layer, head, "q") for head in range(self.n_heads)]
            found += [Site(layer, head, kind, self.grouped) for kind in ("k", "v") for head in range(shared)]
            found.append(Site(layer, None, "mlp"))
        return (*found, LOGITS)

    @cached_property
    def source_index(self) -> dict[Site, int]:
        """Place of each source in ``sources``."""
        return {one: i for i, one in enumerate(self.sources)}

    @cached_property
    def target_index(self) -> dict[Site, int]:
        """Place of each target in ``targets``."""
        return {one: i for i, one in enumerate(self.targets)}

    @cached_property
    def exists(self) -> np.ndarray:
        """Which edges there are ``[sources, targets]``, boolean."""
        written = np.array([self._written(one) for one in self.sources])
        read = np.array([self._read(one) for one in self.targets])
        return written[:, None] < read[None]

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, by source, then by target."""
        return tuple(Edge(self.sources[i], self.targets[j]) for i, j in np.argwhere(self.exists).tolist())

    def __len__(self) -> int:
        return int(self.exists.sum())

    def check(self, one: EdgeLike) -> Edge:
        """The same edge, if this graph has it; a query head's key or value is read as its group's.

        Raises:
            SiteError: it has not.
        """
        found = edge(one)
        target = found.target
        if self.grouped and target.kind in ("k", "v") and not target.grouped and target.head is not None:
            target = Site(target.layer, target.head * self.n_kv_heads // self.n_heads, target.kind, True)
        i, j = self.source_index.get(found.source), self.target_index.get(target)
        if i is None or j is None or not self.exists[i, j]:
            raise SiteError(
                f'There is no edge "{found}" in {self.n_layers} layers of {self.n_heads} heads',
                expected="a source that writes to the stream before the target reads from it",
            )
        return Edge(found.source, target)

    def readers(self, target: Site) -> tuple[Site, ...]:
        """The nodes that a target belongs to: the head, every head of a group, the MLP, the logits."""
        if target.kind not in SLOTS:
            return (target,)
        if not target.grouped:
            return (Site(target.layer, target.head),)
        per_group = self.n_heads // self.n_kv_heads
        assert target.head is not None
        return tuple(Site(target.layer, target.head * per_group + i) for i in range(per_group))

    def slots(self, node: Site) -> tuple[Site, ...]:
        """What a node reads from the stream: q, k, v of a head (k and v of its group), an MLP or the logits itself."""
        if not node.is_head:
            return (node,) if node in self.target_index else ()
        assert node.head is not None
        shared = node.head * self.n_kv_heads // self.n_heads if self.grouped else node.head
        kv = [Site(node.layer, shared, kind, self.grouped) for kind in ("k", "v")]
        return (Site(node.layer, node.head, "q"), *kv)

    def alive(self, edges: Iterable[Edge]) -> tuple[Edge, ...]:
        """The edges that lie on a path from the embedding to the logits, in the order given."""
        edges = tuple(edges)
        reached = {EMBED}
        for one in sorted(edges, key=lambda e: self._written(e.source)):
            if one.source in reached:
                reached.update(self.readers(one.target))
        leading = {LOGITS}
        for one in sorted(edges, key=lambda e: -self._read(e.target)):
            if leading.intersection(self.readers(one.target)):
                leading.add(one.source)
        both = reached & leading
        return tuple(one for one in edges if one.source in both and leading.intersection(self.readers(one.target)))

    def between(self, nodes: Iterable[Site]) -> tuple[Edge, ...]:
        """Every edge among nodes, the embedding and the logits."""
        chosen = {*nodes, EMBED, LOGITS}
        return tuple(e for e in self.edges if e.source in chosen and chosen.intersection(self.readers(e.target)))

    def _written(self, source: Site) -> int:
        """When a source writes: embed at 0, heads of layer l at 2l + 1, its MLP at 2l + 2."""
        return 0 if source.kind == "embed" else 2 * source.layer + (2 if source.kind == "mlp" else 1)

    def _read(self, target: Site) -> int:
        """When a target reads: after everything that was written before this number."""
        if target.kind == "logits":
            return 2 * self.n_layers + 1
        return 2 * target.layer + (2 if target.kind == "mlp" and not self.parallel else 1)
