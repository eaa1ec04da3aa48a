"""Addresses inside a transformer: heads, sites, and ordered sets of heads.

How a site is written (layers and heads count from 0):

    "9.9"  "9.9.z"           output of attention head 9 of layer 9, before W_O          [batch, pos, d_head]
    "9.9.q" "9.9.k" "9.9.v"  its query, key, value, before any rotation                 [batch, pos, d_head]
    "9.kv2.k" "9.kv2.v"      key or value of a group, on a grouped-query model          [batch, pos, d_head]
    "9.9.pattern"            attention after the softmax                                [batch, query, key]
    "9.9.scores"             attention before the softmax                               [batch, query, key]
    "9.9.result"             what the head writes to the residual stream, z W_O         [batch, pos, d_model]
                             (a norm after attention, as in Gemma 2, sees the sum of these)
    "m10"                    output of the MLP of layer 10                              [batch, pos, d_model]
    "resid.4"                residual stream entering block 4; resid.<n_layers> leaves the last block
    "embed"                  token embedding                                            [batch, pos, d_model]
    "logits"                 the readout                                                [batch, pos, vocab]
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import TypeAlias, cast

from .errors import OptionError, SiteError

HEAD_KINDS = ("z", "q", "k", "v", "pattern", "scores", "result")
GROUP_KINDS = ("k", "v")
_FORMS = '"9.9", "9.9.q", "9.kv2.k", "9.9.pattern", "m10", "resid.4", "embed" or "logits"'
_PATTERN = re.compile(
    r"""(?: (?P<layer>\d+)\.(?P<group>kv)?(?P<head>\d+)(?:\.(?P<kind>[a-z]+))?
          | m(?P<mlp>\d+) | resid\.(?P<resid>\d+) | (?P<bare>embed|logits) )""",
    re.VERBOSE,
)


@dataclass(frozen=True, order=True)
class Site:
    """One address. Make it with ``mk.site("9.9.q")``; ``str(site)`` writes it back.

    Attributes:
        layer: block index from 0; -1 for ``embed`` and ``logits``.
        head: head index from 0, or group index when ``grouped``; None where there is no head.
        kind: ``z q k v pattern scores result`` for heads, ``mlp``, ``resid``, ``embed``, ``logits``.
        grouped: the address is a group of k/v heads.
    """

    layer: int
    head: int | None = None
    kind: str = "z"
    grouped: bool = False

    def __str__(self) -> str:
        if self.kind in ("embed", "logits"):
            return self.kind
        if self.kind == "mlp":
            return f"m{self.layer}"
        if self.kind == "resid":
            return f"resid.{self.layer}"
        head = f"{self.layer}.{'kv' if self.grouped else ''}{self.head}"
        return head if self.kind == "z" else f"{head}.{self.kind}"

    def __repr__(self) -> str:
        return f'site("{self}")'

    @property
    def is_head(self) -> bool:
        """True for a whole head, written ``"9.9"``."""
        return self.kind == "z" and self.head is not None


SiteLike: TypeAlias = "str | Site | tuple[int, int]"
SitesLike: TypeAlias = "SiteLike | HeadSet | Iterable[SiteLike]"


def site(address: SiteLike) -> Site:
    """Read one address.

    Args:
        address: text as in the module's table, a Site, or a (layer, head) pair.

    Raises:
        SiteError: the text is no address.
    """
    if isinstance(address, Site):
        return address
    if isinstance(address, tuple):
        if len(address) != 2 or not all(isinstance(i, int) and i >= 0 for i in address):
            raise SiteError(f"{address!r} is not a (layer, head) pair", expected="two whole numbers from 0")
        return Site(*address)
    if not isinstance(address, str):
        raise SiteError(f"{address!r} is not an address", expected=f"text such as {_FORMS}")
    match = _PATTERN.fullmatch(address.strip())
    if match is None:
        raise SiteError(f"{address!r} is not an address", expected=f"text such as {_FORMS}")
    part = match.groupdict()
    if part["bare"]:
        return Site(-1, None, part["bare"])
    if part["mlp"]:
        return Site(int(part["mlp"]), None, "mlp")
    if part["resid"]:
        return Site(int(part["resid"]), None, "resid")
    kind, grouped = part["kind"] or "z", bool(part["group"])
    kinds = GROUP_KINDS if grouped else HEAD_KINDS
    if kind not in kinds or (grouped and part["kind"] is None):
        raise SiteError(
            f"{address!r} asks for {kind!r} of a {'key/value group' if grouped else 'head'}",
            expected="one of " + ", ".join(kinds),
        )
    return Site(int(part["layer"]), int(part["head"]), kind, grouped)


def sites(addresses: SitesLike) -> tuple[Site, ...]:
    """Read several addresses: text with spaces or commas between them, one Site, or an iterable."""
    if isinstance(addresses, str):
        return tuple(site(word) for word in addresses.replace(",", " ").split())
    if isinstance(addresses, Site):
        return (addresses,)
    if isinstance(addresses, tuple) and len(addresses) == 2 and all(isinstance(i, int) for i in addresses):
        return (site(cast("tuple[int, int]", addresses)),)
    if not isinstance(addresses, Iterable):
        raise SiteError(f"{addresses!r} holds no addresses", expected=f"text such as {_FORMS}, or a list")
    return tuple(site(cast("SiteLike", address)) for address in addresses)


class HeadSet(Set):
    """An ordered set of whole heads, with set algebra that keeps the left side's order.

    ``a | b``, ``a & b``, ``a - b``, ``a ^ b``, ``"9.9" in a``, ``len(a)``; ``str(a)`` is ``"9.9 9.6"``.

    Args:
        heads: addresses of heads.
        heads_per_layer: how many heads each layer of the model has; known when the set came from a model.
    """

    def __init__(self, heads: SitesLike = (), heads_per_layer: int | None = None):
        unique = tuple(dict.fromkeys(sites(heads)))
        for head in unique:
            if not head.is_head:
                raise SiteError(
                    f'"{head}" is not a whole head',
                    expected='addresses such as "9.9"',
                    fix="Leave the rest out",
                )
        self._heads = unique
        self.heads_per_layer = heads_per_layer

    def __contains__(self, head: object) -> bool:
        return site(head) in self._heads if isinstance(head, str | tuple | Site) else False

    def __iter__(self) -> Iterator[Site]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    def __str__(self) -> str:
        return " ".join(map(str, self._heads))

    def __repr__(self) -> str:
        return f'heads("{self}")'

    def __hash__(self) -> int:
        return self._hash()

    def _from_iterable(self, it: Iterable[Site]) -> HeadSet:  # type: ignore[override]
        return HeadSet(tuple(it), self.heads_per_layer)

    def __or__(self, other: Iterable) -> HeadSet:
        right = other if isinstance(other, HeadSet) else HeadSet(other)
        return HeadSet((*self, *right), self.heads_per_layer or right.heads_per_layer)

    def __sub__(self, other: Iterable) -> HeadSet:
        right = other if isinstance(other, HeadSet) else HeadSet(other)
        return self._from_iterable(head for head in self if head not in right)

    def __and__(self, other: Iterable) -> HeadSet:
        right = other if isinstance(other, HeadSet) else HeadSet(other)
        return self._from_iterable(head for head in self if head in right)

    def __xor__(self, other: Iterable) -> HeadSet:
        right = other if isinstance(other, HeadSet) else HeadSet(other)
        return (self - right) | (right - self)

    def per_layer(self) -> dict[int, int]:
        """Number of heads of this set in each layer that has any."""
        return dict(sorted(Counter(head.layer for head in self).items()))

    def random_like(self, seed: int = 0, heads_per_layer: int | None = None) -> HeadSet:
        """A control: as many heads in each layer as this set has, drawn evenly from all heads of the layer.

        Heads of this set may be drawn too, so the draws are those of a permutation test.

        Args:
            seed: same seed, same draw.
            heads_per_layer: needed only where the set did not come from a model.

        Raises:
            OptionError: the number of heads in a layer is not known, or too small for this set.
        """
        width = heads_per_layer or self.heads_per_layer
        if width is None:
            raise OptionError(
                "This set does not know how many heads a layer has",
                fix="Pass heads_per_layer=model.n_heads, or build it with model.heads(...)",
            )
        draw = random.Random(seed)
        chosen: list[Site] = []
        for layer, count in self.per_layer().items():
            if count > width:
                raise OptionError(f"{count} heads in layer {layer}", expected=f"at most {width} heads a layer")
            chosen += [Site(layer, head) for head in sorted(draw.sample(range(width), count))]
        return HeadSet(chosen, width)


def heads(addresses: SitesLike) -> HeadSet:
    """An ordered set of heads: ``heads("9.9 9.6") | heads("10.7")``."""
    return HeadSet(addresses)
