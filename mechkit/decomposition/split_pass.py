"""One pass through a model that carries what is relevant to many sources.

1. Nothing is relevant before the first source: the pass begins at its block, from the base run's stream there, and at
   the first position at which a source is anything but its reference.
2. Where a source begins, what is relevant to it becomes the activation less its reference, and the reference is the
   rest. Sources stand on an axis of their own, over totals that they share; those of later blocks join it as the pass
   gets there. A source of several sites is set at each of them, whatever has arrived.
3. Where patterns are frozen, queries and keys have no relevant part, and are not computed for one.
4. Of the last block only the answer position runs, where nothing begins in it and nothing else is read from it.
5. What arrives is read as it passes, and nothing is kept. Without logits to read, the pass ends at the last target.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ..backends.branches import Enough
from ..errors import UnsupportedError
from ..sites import Site
from .modules import in_force
from .rules import stabilised
from .split import Rules, Split, widened

if TYPE_CHECKING:
    from ..backends.lens import LensBackend
    from ..backends.protocol import Read
    from ..backends.replay import LensReplay

Key: TypeAlias = "tuple[str, int]"
Tap: TypeAlias = "Callable[[Split], None]"
_ORDER = {"resid": 0, "q": 1, "k": 1, "v": 1, "z": 2, "mlp": 3}  # in which sites of a block come


@dataclass(frozen=True, eq=False)
class Source:
    """Sites whose activations are relevant together.

    Attributes:
        sites: heads, MLPs, the embedding.
        where: at which positions of each prompt ``[n, pos]``, boolean.
    """

    sites: tuple[Site, ...]
    where: Tensor


def begins(sites: Sequence[Site]) -> tuple[int, int]:
    """Where a source begins; sources of a pass come in this order."""
    return min(map(place, map(key_of, sites)))


def key_of(site: Site) -> Key:
    """Kind and layer of the tensor that a site is in; the embedding is all there is of the first stream."""
    return ("resid", 0) if site.kind == "embed" else (site.kind, site.layer)


def place(key: Key) -> tuple[int, int]:
    """Where a tensor is on the way through a model."""
    return key[1], _ORDER[key[0]]


def split_pass(
    backend: LensBackend,
    replay: LensReplay,
    rules: Rules,
    sources: Sequence[Source],
    references: Mapping[Key, Tensor],
    taps: Mapping[Key, Tap],
    read: Read | None,
) -> Split | None:
    """Carry what is relevant to sources through a base run.

    Args:
        backend: whose blocks run.
        replay: the base run of the prompts.
        rules: how parts are carried.
        sources: in the order in which they begin; their masks are of the replayed positions.
        references: of every tensor that a source is in, ``[n, pos, ...]`` for the replayed positions.
        taps: called with what passes, by kind and layer.
        read: which logits; None: none.

    Returns:
        The logits ``[n, k]``, their relevant part ``[sources, n, k]``; None without ``read``.

    Raises:
        UnsupportedError: an operation that the rules do not know.
    """
    first, layers = begins(sources[0].sites)[0], backend.info.n_layers
    last = layers if read is not None else max((layer for _, layer in taps), default=-1)
    rows = torch.arange(replay.batch, device=replay.stream(0).device)
    begin = _beginnings(sources, references, rules)
    streams = {key: functions for key, functions in _together(begin, taps).items() if key[0] == "resid"}
    waiting = {key for key in taps if key[1] == last and key[0] != "resid"} if read is None else set()
    inside = {key: functions for key, functions in _together(begin, taps).items() if key not in streams}
    hung: dict[Key, Any] = {
        key: _in_turn(functions, key, waiting) for key, functions in inside.items() if key[1] >= first
    }
    ends_alone = read is not None and _last_at_ends(backend, (*begin, *taps))
    blocks = backend.bridge.blocks
    mlps = [block.mlp for block in blocks if hasattr(block, "mlp")]
    with (
        torch.inference_mode(),
        in_force(rules, backend.hf, mlps, _unread(blocks, rules, taps), backend.bridge.cfg.eps),
        backend.hooks(hung),
        suppress(Enough),
    ):
        x = Split(replay.stream(first), None, rules)
        for layer in range(first, last + 1):
            x = _in_turn(streams.get(("resid", layer), ()))(x)
            if layer == layers or (read is None and layer == last and not waiting):
                break
            if layer == layers - 1 and ends_alone and read is not None:
                ends: Any = replay.last_block(x, rows, read.positions.to(rows.device) - replay.first)
                out: Any = replay.logits_of(_stable(ends), read.columns)
                return Split(out.total, widened(out.relevant, len(sources), out.total), rules)
            after: Any = replay.block(layer, x, rows)
            x = _stable(after)
        if read is not None:
            out = replay.logits(x, read)
            return Split(out.total, widened(out.relevant, len(sources), out.total), rules)
    return None


def _last_at_ends(backend: LensBackend, keys: Sequence[Key]) -> bool:
    """Whether the last block can run at the answer positions alone."""
    layers = backend.info.n_layers
    if any(layer >= layers - (kind == "mlp") for kind, layer in keys):
        return False
    try:
        return backend.branches is not None  # compared with the model when first asked for: before anything is hung up
    except UnsupportedError:
        return False


def _stable(x: Split) -> Split:
    if not x.rules.stabilise or x.relevant is None:
        return x
    return Split(x.total, stabilised(x.relevant, x.total), x.rules)


def _beginnings(
    sources: Sequence[Source], references: Mapping[Key, Tensor], rules: Rules
) -> dict[Key, Callable[[Split], Split]]:
    """What is done where sources begin."""
    found: dict[Key, list[tuple[int, int | None]]] = defaultdict(list)
    for row, source in enumerate(sources):
        for site in source.sites:
            found[key_of(site)].append((row, site.head))
    masks = torch.stack([source.where for source in sources])  # [sources, n, pos]
    begun = [begins(source.sites) for source in sources]
    return {
        key: _beginning(members, masks, sum(one <= place(key) for one in begun), references[key], rules)
        for key, members in found.items()
    }


def _beginning(
    members: Sequence[tuple[int, int | None]], masks: Tensor, begun: int, reference: Tensor, rules: Rules
) -> Callable[[Split], Split]:
    rows = torch.tensor([row for row, _ in members], device=reference.device)
    heads = None if members[0][1] is None else torch.tensor([head for _, head in members], device=reference.device)
    where = masks.to(reference.device)[rows, ..., None]

    def begin(x: Split) -> Split:
        own = x.total - reference
        relevant = widened(x.relevant, begun, x.total).clone(memory_format=torch.contiguous_format)
        if heads is None:
            relevant[rows] = torch.where(where, own, relevant[rows])
        else:
            own = own[:, :, heads].permute(2, 0, 1, 3)
            relevant[rows, :, :, heads] = torch.where(where, own, relevant[rows, :, :, heads])
        return Split(x.total, relevant, rules)

    return begin


def _together(
    begin: Mapping[Key, Callable[[Split], Split]], taps: Mapping[Key, Tap]
) -> dict[Key, list[Callable[[Split], Split | None]]]:
    """Sources begin before what arrives is read."""
    every: dict[Key, list[Callable[[Split], Split | None]]] = defaultdict(list)
    for key, function in (*begin.items(), *taps.items()):
        every[key].append(function)
    return every


def _in_turn(
    functions: Sequence[Callable[[Split], Split | None]], key: Key | None = None, waiting: set[Key] | None = None
) -> Callable[[Split], Split]:
    """One function that calls several, and ends the pass after the last that was waited for."""

    def function(x: Split) -> Split:
        for one in functions:
            changed = one(x)
            x = x if changed is None else changed
        if waiting and key in waiting:
            waiting.discard(key)
            if not waiting:
                raise Enough
        return x

    return function


def _unread(blocks: Sequence[Any], rules: Rules, taps: Mapping[Key, Tap]) -> Iterator[nn.Module]:
    """Projections to queries and keys whose relevant part goes nowhere."""
    if rules.attention == "product":
        return
    for layer, block in enumerate(blocks):
        for kind in ("q", "k"):
            module = block.attn._modules.get(kind)
            if module is not None and (kind, layer) not in taps:
                yield module
