"""Path patching on a base run: what is written reaches the receivers alone.

With the output z of every other head kept at its base value, attention carries nothing from one position to another.
So:

1. What a sender changes stays at the positions at which it was changed, and only those are run. Of these, the logits
   read one.
2. Paths through MLPs: from the sender's layer on, the stream at those positions goes through the blocks with their
   attention taken as known from the base run. Senders of all layers make one sweep, joining at their layer.
3. Direct paths: what the sender adds to the stream arrives unchanged. No block is run at all.
4. Receivers in layer l read the stream that enters block l: its norm and the columns of W_Q, W_K or W_V that belong to
   them, or, of patterns and z, the attention of block l on the whole prompt. Their values are taken before they are
   themselves kept at the base.
5. The logits are the final norm and a few columns. Any other receivers are set to what arrived, in a variant of the
   base run that begins in their layer.

Wang et al. 2022 (arXiv 2211.00593), appendix B; Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sites import Site
from .branches import Enough
from .carry import Direct, Senders, Through
from .protocol import Paths, Read, Write
from .window import BY_HEAD, Change, carried_out

if TYPE_CHECKING:
    from .replay import LensReplay

_POSITIONWISE = ("q", "k", "v", "mlp")


def via(replay: LensReplay, writes: Sequence[Write], paths: Paths, read: Read) -> Tensor:
    """Logits ``[rows, outcomes, k]``; see ``protocol.Replay.via``.

    Args:
        replay: the base run, with z of every layer recorded, and the MLPs that are written.
        writes: what the senders write, one kind and layer each, layers in order.
        paths: where to.
        read: which logits, of each variant.
    """
    logits = [one for one in paths.receivers if one.kind == "logits"]
    if rest := [one for one in paths.receivers if logits and one.kind != "logits"]:  # each by itself
        found = dict(
            zip(logits, via(replay, writes, replace(paths, receivers=tuple(logits)), read).unbind(1), strict=True)
        )
        found |= zip(rest, via(replay, writes, replace(paths, receivers=tuple(rest)), read).unbind(1), strict=True)
        return torch.stack([found[one] for one in paths.receivers], 1)
    with torch.inference_mode():
        senders = Senders(replay, writes, paths, read)
        arrived = _arrivals(senders)
        if paths.receivers[0].kind == "logits":
            return replay.logits_of(arrived[paths.receivers[0]], read.columns)[:, None]
        if not paths.each:
            return _together(replay, senders, arrived, read)[:, None]
        return _each(replay, senders, arrived, read)


def _arrivals(senders: Senders) -> dict[Site, Tensor]:
    """What reaches each receiver: ``[rows, pos, width]``; at the logits, the stream ``[rows, d_model]``."""
    info = senders.replay.backend.info
    logits = senders.paths.receivers[0].kind == "logits"
    last = info.n_layers if logits else max(one.layer for one in senders.paths.receivers)
    carry = Through(senders) if senders.paths.through_mlps else Direct(senders)
    arrived: dict[Site, Tensor] = {}
    for layer in range(min(g.write.layer for g in senders.groups), last + (not logits)):
        here = [one for one in senders.paths.receivers if one.layer == layer]
        carry.join_at(layer)
        _take(senders, layer, [one for one in here if one.kind != "mlp"], carry, arrived)
        mlps = [one for one in here if one.kind == "mlp"]
        if layer < last or mlps:
            carry.pass_block(layer, mlps, arrived)
    if logits:
        carry.join_at(last)
        arrived[senders.paths.receivers[0]] = carry.streams(last)[:, 0]
    return arrived


def _take(senders: Senders, layer: int, receivers: Sequence[Site], carry: Through | Direct, arrived: dict) -> None:
    """Values of the receivers of a layer that read the stream before its attention."""
    if not receivers:
        return
    stream = carry.streams(layer)
    normed = senders.branches.norm(layer, stream)
    for kind in ("q", "k", "v"):
        chosen = [one for one in receivers if one.kind == kind]
        if not chosen:
            continue
        info = senders.replay.backend.info
        values = senders.branches.project(kind, layer, normed, [info.slot(one) for one in chosen])
        for i, one in enumerate(chosen):
            arrived[one] = senders.spread(values[:, :, i])
    if by_attention := [one for one in receivers if one.kind not in _POSITIONWISE]:
        arrived.update(_attended(senders, layer, stream, by_attention))


def _attended(senders: Senders, layer: int, stream: Tensor, receivers: Sequence[Site]) -> dict[Site, Tensor]:
    """Patterns and z of a layer, its attention run on the stream."""
    whole = senders.replay.stream(layer)[senders.rows]
    whole = whole.scatter(1, senders.at[..., None].expand_as(stream), stream)
    found: dict[str, Tensor] = {}

    def keep(kind: str) -> Change:
        def function(tensor: Tensor) -> Tensor:
            found[kind] = tensor.clone()
            if kind == "z":
                raise Enough
            return tensor

        return function

    kinds = {one.kind for one in receivers} | {"z"}
    with senders.replay.backend.hooks({(kind, layer): keep(kind) for kind in kinds}), suppress(Enough):
        senders.replay.block(layer, whole, senders.rows)
    return {
        one: found[one.kind][:, one.head] if one.kind in BY_HEAD else found[one.kind][:, :, one.head]
        for one in receivers
    }


def _reads(receiver: Site, write: Write, parallel: bool) -> bool:
    """Whether what is written is in the stream when a receiver reads it."""
    if write.kind == "resid":
        return True
    same_layer = receiver.kind == "mlp" and write.kind == "z" and not parallel
    return write.layer < receiver.layer + same_layer


def _set(senders: Senders, receiver: Site, values: Tensor, rows: slice | Tensor) -> Write:
    """A receiver set to what reached it, in some variants."""
    info = senders.replay.backend.info
    everywhere = receiver.kind in (*BY_HEAD, "z")
    where = torch.ones_like(senders.where) if everywhere else senders.where
    of = senders.rows[rows]
    heads = None if receiver.head is None else torch.full((len(of),), info.slot(receiver), device=of.device)
    return Write(receiver.kind, receiver.layer, of, values[rows], where[rows], heads)


def _together(replay: LensReplay, senders: Senders, arrived: Mapping[Site, Tensor], read: Read) -> Tensor:
    """Logits ``[rows, k]`` with all receivers set; a variant begins at the first receiver that its sender reaches."""
    backend, last = replay.backend, replay.backend.info.n_layers - 1
    receivers: dict[int, list[Site]] = defaultdict(list)
    for receiver in sorted(arrived, key=lambda one: one.layer):
        receivers[receiver.layer].append(receiver)
    begins = torch.empty_like(senders.rows)
    for group in senders.groups:  # by layer, so that those that begin later stand later
        begins[group.place] = min(one.layer for one in arrived if _reads(one, group.write, backend.parallel))
    at = read.positions.to(begins.device) - replay.first
    stream, ends = replay.stream(0)[:0], replay.stream(0)[:0, 0]
    for layer in range(int(begins.min()), last + 1):
        before, now = len(stream), int((begins <= layer).sum())
        stream = torch.cat([stream, replay.stream(layer)[senders.rows[before:now]]])
        writes = [_set(senders, one, arrived[one], slice(now)) for one in receivers[layer]]
        changes = {kind: _all([w for w in writes if w.kind == kind]) for kind in {w.kind for w in writes}}
        with backend.hooks({(kind, layer): change for kind, change in changes.items()}):
            if layer < last:
                stream = replay.block(layer, stream, senders.rows[:now])
            elif "mlp" in changes:
                ends = replay.block(layer, stream, senders.rows)[torch.arange(now, device=at.device), at]
            else:
                ends = replay.last_block(stream, senders.rows, at)
    return replay.logits_of(ends, read.columns)


def _all(writes: Sequence[Write]) -> Change:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        for write in writes:
            tensor = carried_out(tensor, write)
        return tensor

    return change


def _each(replay: LensReplay, senders: Senders, arrived: Mapping[Site, Tensor], read: Read) -> Tensor:
    """Logits ``[rows, receivers, k]`` with one receiver set; the base run's own where the sender does not reach it."""
    receivers, device = senders.paths.receivers, senders.rows.device
    at = read.positions.to(device) - replay.first
    own = replay.logits_of(replay.stream(replay.backend.info.n_layers)[senders.rows, at], read.columns)
    logits = own[:, None].repeat(1, len(receivers), 1)
    pairs: list[tuple[int, Tensor]] = []
    for i in sorted(range(len(receivers)), key=lambda i: receivers[i].layer):
        reaching = [g.place for g in senders.groups if _reads(receivers[i], g.write, replay.backend.parallel)]
        if reaching:
            pairs.append((i, torch.cat([torch.arange(place.start, place.stop, device=device) for place in reaching])))
    at_once = replay.rows(whole=read.columns is None)
    while pairs:
        some = [pairs.pop(0)]
        while pairs and sum(len(rows) for _, rows in some) + len(pairs[0][1]) <= at_once:
            some.append(pairs.pop(0))
        writes = [_set(senders, receivers[i], arrived[receivers[i]], rows) for i, rows in some]
        every = torch.cat([rows for _, rows in some])
        columns = None if read.columns is None else read.columns.to(device)[every]
        done = replay.resume(writes, Read(read.positions.to(device)[every], columns))
        for (i, rows), part in zip(some, done.split([len(rows) for _, rows in some]), strict=True):
            logits[rows, i] = part
    return logits
