"""What a backend does; the analyses know nothing else of it.

``forward`` is the whole contract: tokens in, logits and recorded activations out, edits in between; ``generate`` is
the same token after token. ``start`` is its economy: one base run, kept so that many variants of it can begin late
(skip layers, skip positions, batch variants, read little). Layouts, whatever the model:

    z, q            [batch, pos, n_heads, d_head]          mlp, resid, embed    [batch, pos, d_model]
    k, v            [batch, pos, n_kv_heads, d_head]       pattern, scores      [batch, n_heads, query, key]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import SiteError
from ..sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    from ..edits import Edit


@dataclass(frozen=True)
class ModelInfo:
    """A model's name and dimensions."""

    name: str
    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    n_ctx: int
    dtype: str
    device: str

    @property
    def grouped(self) -> bool:
        """True when several query heads share one key and value head."""
        return self.n_kv_heads != self.n_heads

    def check(self, site: Site) -> Site:
        """The same site, if this model has it.

        Raises:
            SiteError: layer, head or group out of range; the message gives the range.
        """
        shape = f"{self.name} has {self.n_layers} layers of {self.n_heads} heads"
        layers = self.n_layers + 1 if site.kind == "resid" else self.n_layers
        if site.layer >= layers:
            raise SiteError(f'"{site}" is in layer {site.layer}, but {shape}', expected=f"0 to {layers - 1}")
        if site.head is not None:
            count = self.n_kv_heads if site.grouped else self.n_heads
            if site.grouped:
                shape += f" and {self.n_kv_heads} key/value groups"
            if site.head >= count:
                raise SiteError(f'"{site}" has index {site.head}, but {shape}', expected=f"0 to {count - 1}")
        return site

    def group_of(self, head: int) -> int:
        """Key/value group of a query head."""
        return head * self.n_kv_heads // self.n_heads

    def shared(self, site: Site) -> Site:
        """The site itself; of a query head's key or value on a grouped-query model, the group's that it shares."""
        if self.grouped and site.kind in ("k", "v") and site.head is not None and not site.grouped:
            return Site(site.layer, self.group_of(site.head), site.kind, True)
        return site

    def slot(self, site: Site) -> int:
        """Index of a site's head along the head axis of its tensor; see the module's layouts."""
        assert site.head is not None
        return self.group_of(site.head) if site.kind in ("k", "v") and not site.grouped else site.head


@dataclass(frozen=True, eq=False)
class Read:
    """Which logits to compute.

    Attributes:
        positions: one position a prompt ``[batch]``.
        columns: token ids ``[batch, k]``; None for the whole vocabulary.
    """

    positions: Tensor
    columns: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Forward:
    """What a run gave.

    Attributes:
        logits: ``[batch, pos, vocab]``; with a ``Read``, ``[batch, k]`` or ``[batch, vocab]``.
        recorded: whole tensors by (kind, layer), in the layouts of the module.
    """

    logits: Tensor
    recorded: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Write:
    """Variants that replace the same kind of site of the same layer, one row each, for ``Replay.resume``.

    Attributes:
        kind: ``z``, ``q``, ``k``, ``v``, ``pattern``, ``scores``, ``mlp`` or ``resid``.
        layer: block in which the replacement is made.
        rows: base prompt of each variant ``[rows]``.
        values: new values ``[rows, pos, width]``, for the replayed positions only; of patterns and scores
            ``[rows, query, key]``, with the keys of every position.
        where: which positions (queries) to replace ``[rows, pos]``, boolean.
        heads: head, or key/value group, of each variant ``[rows]``; None for ``mlp`` and ``resid``.
    """

    kind: str
    layer: int
    rows: Tensor
    values: Tensor
    where: Tensor
    heads: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Paths:
    """Where the paths that are patched lead, for ``Replay.via``.

    Attributes:
        receivers: the logits, with others only where ``each``; q, k, v, pattern or z of heads, and MLPs.
        through_mlps: paths may run through the MLPs between; otherwise these keep their base values too.
        each: every receiver by itself, not all of them together.
    """

    receivers: tuple[Site, ...]
    through_mlps: bool = True
    each: bool = False


class Replay(Protocol):
    """A base run from which variants begin late."""

    first: int
    """First replayed position; earlier ones are the base run's in every variant."""

    def rows(self, whole: bool = False, positions: int | None = None) -> int:
        """How many variants fit in memory side by side.

        Args:
            whole: all of their logits are read.
            positions: how many positions of each run; None: all.
        """
        ...

    def recorded(self, kind: str, layer: int) -> Tensor:
        """The base run's own values at the replayed positions, in the layouts of the module."""
        ...

    def ends(self, read: Read) -> Tensor:
        """The base run's own logits ``[batch, k]``."""
        ...

    def resume(self, writes: Sequence[Write], read: Read) -> Tensor:
        """Logits ``[rows, k]`` of every variant of every write, in the order given: layers must not fall."""
        ...

    def via(self, writes: Sequence[Write], paths: Paths, read: Read) -> Tensor:
        """As ``resume``, but what is written reaches nothing but the receivers: ``[rows, outcomes, k]``.

        Every head but the one that is written keeps its base values until the receivers have read; they alone then
        get what reached them. Outcomes are the receivers where ``paths.each``, else one.
        """
        ...


@dataclass(frozen=True, eq=False)
class Keep:
    """Sets of heads and MLPs, each to be left in by itself while every other head, or MLP, is replaced.

    Attributes:
        kept: which heads stay ``[sets, layers, heads]``, boolean.
        values: what the others get, a tensor a layer, ``[batch, pos, heads, d_head]`` or what broadcasts to it.
        mlps: which MLPs stay ``[sets, layers]``, boolean; None for all of them.
        mlp_values: what the others get, a tensor a layer, ``[batch, pos, d_model]`` or what broadcasts to it.
        first: the first position that runs, and that the values have; nothing differs before it.
    """

    kept: Tensor
    values: Sequence[Tensor]
    mlps: Tensor | None = None
    mlp_values: Sequence[Tensor] = ()
    first: int = 0


@dataclass(frozen=True, eq=False)
class Ablated:
    """What every source of the graph writes where its edges are not kept, for ``Backend.keep_edges``.

    Attributes:
        values: by (kind, layer): ``("resid", 0)``, which is all that the embedding writes, and ``z`` and ``mlp`` of
            every layer, for the replayed positions ``[batch, pos, ...]`` or what broadcasts to them.
        one_run: they are all of one run of the model, of prompts that agree with the others before the first
            replayed position; a part that reads nothing else then writes nothing else.
        ungrouped: each query head has edges to a key and a value of its own, where heads share them.
    """

    values: Mapping[tuple[str, int], Tensor]
    one_run: bool = False
    ungrouped: bool = False


class EdgeRuns(Protocol):
    """A base run, and runs of it in which only some edges carry what their source writes."""

    def keep(self, kept: Tensor, read: Read) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Sets of edges ``[sets, sources, targets]``, boolean, in the order of ``Graph``.

        Yields:
            Which sets ran ``[some]``, on which prompts ``[rows]``, and their logits ``[some, rows, k]``, in an order
            of its own.
        """
        ...


class Backend(Protocol):
    """Runs a model."""

    info: ModelInfo

    @property
    def parallel(self) -> bool:
        """True when the MLP of a layer does not read what the heads of the layer write."""
        ...

    def forward(
        self,
        tokens: Tensor,
        edits: Sequence[Edit] = (),
        record: Sequence[Site] = (),
        read: Read | None = None,
        lengths: Tensor | None = None,
    ) -> Forward:
        """One run over ``tokens [batch, pos]``, padded at the right where ``lengths [batch]`` says so."""
        ...

    def generate(self, tokens: Tensor, edits: Sequence[Edit], options: Mapping[str, Any]) -> Tensor:
        """Prompts of one length continued, edits active at every step: ``[batch, pos + new]``.

        The result is that of running the whole text again with the edits for every new token. ``options`` are those
        of the Hub's ``generate``.
        """
        ...

    def start(self, tokens: Tensor, first: int, record: Sequence[tuple[str, int]] = ()) -> Replay:
        """A base run whose variants all agree with it before position ``first``."""
        ...

    def base_tokens(self) -> int:
        """How many tokens one base run may be; all of its residuals are kept."""
        ...

    def keep_only(self, tokens: Tensor, keep: Keep, read: Read) -> Tensor:
        """Logits ``[sets, batch, k]`` of runs in which only the heads, and MLPs, of a set are left in."""
        ...

    def keep_edges(self, tokens: Tensor, first: int, ablated: Ablated) -> EdgeRuns:
        """A base run from which only some edges are left in; nothing differs before position ``first``."""
        ...
