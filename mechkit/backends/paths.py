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

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sites import Site
from .branches import Enough
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
    with torch.inference_mode():
        journey = _Journey(replay, writes, paths, read)
        arrived = journey.run()
        if paths.receivers[0].kind == "logits":
            return replay.logits_of(arrived[paths.receivers[0]], read.columns)[:, None]
        if not paths.each:
            return _together(replay, journey, arrived, read)[:, None]
        return _each(replay, journey, arrived, read)


@dataclass
class _Group:
    """Variants of one write: which rows of the whole they are, and where in the window they change."""

    write: Write
    rows: Tensor  # of the base run
    at: Tensor  # positions in the window [rows, changed]
    place: slice  # among all variants


class _Journey:
    """Senders' changes on their way."""

    def __init__(self, replay: LensReplay, writes: Sequence[Write], paths: Paths, read: Read):
        self.replay, self.paths = replay, paths
        self.branches = replay.backend.branches
        device = replay.stream(0).device
        self.rows = torch.cat([write.rows for write in writes]).to(device)
        self.where = torch.cat([write.where for write in writes]).to(device)
        self.at = self._positions(read)
        self.groups: list[_Group] = []
        begin = 0
        for write in writes:
            place = slice(begin, begin + len(write.rows))
            self.groups.append(_Group(write, self.rows[place], self.at[place], place))
            begin = place.stop
        self._attention: dict[int, Tensor] = {}

    def run(self) -> dict[Site, Tensor]:
        """What reaches each receiver: ``[rows, pos, width]``; at the logits, the stream ``[rows, d_model]``."""
        info = self.replay.backend.info
        logits = self.paths.receivers[0].kind == "logits"
        last = info.n_layers if logits else max(one.layer for one in self.paths.receivers)
        carry = _Through(self) if self.paths.through_mlps else _Direct(self)
        arrived: dict[Site, Tensor] = {}
        for layer in range(min(g.write.layer for g in self.groups), last + (not logits)):
            here = [one for one in self.paths.receivers if one.layer == layer]
            carry.join_at(layer)
            self._take(layer, [one for one in here if one.kind != "mlp"], carry, arrived)
            mlps = [one for one in here if one.kind == "mlp"]
            if layer < last or mlps:
                carry.pass_block(layer, mlps, arrived)
        if logits:
            carry.join_at(last)
            arrived[self.paths.receivers[0]] = carry.streams(last)[:, 0]
        return arrived

    def base(self, tensor: Tensor, place: slice | Tensor = slice(None)) -> Tensor:
        """Of a tensor of the base run ``[batch, pos, ...]``, what belongs to some variants ``[rows, changed, ...]``."""
        return tensor[self.rows[place][:, None], self.at[place]]

    def attention_out(self, layer: int) -> Tensor:
        """What the attention module of a layer put out in the base run ``[batch, pos, d_model]``."""
        if layer not in self._attention:
            self._attention[layer] = self.branches.attention_out(layer, self.replay.recorded("z", layer))
        return self._attention[layer]

    def changed(self, group: _Group) -> Tensor:
        """The base run's values of what a write changes, and with the write: both ``[rows, changed, ...]``."""
        write = group.write
        whole = self.replay.stream(0) if write.kind == "resid" else self.replay.recorded(write.kind, write.layer)
        old = whole[group.rows[:, None], group.at]
        index = torch.arange(len(group.rows), device=old.device)[:, None], group.at
        part = Write(write.kind, write.layer, write.rows, write.values[index], write.where[index], write.heads)
        return torch.stack([old, carried_out(old.clone(), part)])

    def _positions(self, read: Read) -> Tensor:
        """Which positions of the window to run ``[rows, changed]``: those that change; of these, what is read."""
        if self.paths.receivers[0].kind == "logits":
            return (read.positions.to(self.where.device) - self.replay.first)[:, None]
        width = int(self.where.sum(1).max())
        # Rows with fewer of them repeat one that they have; the same value is then put back twice.
        order = self.where.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        return torch.where(self.where.gather(1, order), order, order[:, :1])

    def _take(self, layer: int, receivers: Sequence[Site], carry: _Through | _Direct, arrived: dict) -> None:
        """Values of the receivers of a layer that read the stream before its attention."""
        if not receivers:
            return
        stream = carry.streams(layer)
        normed = self.branches.norm(layer, stream)
        for kind in ("q", "k", "v"):
            chosen = [one for one in receivers if one.kind == kind]
            if not chosen:
                continue
            info = self.replay.backend.info
            values = self.branches.project(kind, layer, normed, [info.slot(one) for one in chosen])
            for i, one in enumerate(chosen):
                arrived[one] = self._spread(values[:, :, i])
        if by_attention := [one for one in receivers if one.kind not in _POSITIONWISE]:
            arrived.update(self._attended(layer, stream, by_attention))

    def _spread(self, values: Tensor) -> Tensor:
        """Values at the changed positions laid on the window ``[rows, pos, width]``; 0 elsewhere."""
        full = values.new_zeros(len(values), self.where.shape[1], values.shape[-1])
        return full.scatter_(1, self.at[..., None].expand_as(values), values)

    def _attended(self, layer: int, stream: Tensor, receivers: Sequence[Site]) -> dict[Site, Tensor]:
        """Patterns and z of a layer, its attention run on the stream."""
        whole = self.replay.stream(layer)[self.rows]
        whole = whole.scatter(1, self.at[..., None].expand_as(stream), stream)
        found: dict[str, Tensor] = {}

        def keep(kind: str) -> Change:
            def function(tensor: Tensor) -> Tensor:
                found[kind] = tensor.clone()
                if kind == "z":
                    raise Enough
                return tensor

            return function

        kinds = {one.kind for one in receivers} | {"z"}
        with self.replay.backend.hooks({(kind, layer): keep(kind) for kind in kinds}), suppress(Enough):
            self.replay.block(layer, whole, self.rows)
        return {
            one: found[one.kind][:, one.head] if one.kind in BY_HEAD else found[one.kind][:, :, one.head]
            for one in receivers
        }

    def mlp(self, layer: int, values: Tensor, receivers: Sequence[Site], arrived: dict) -> None:
        """Note what an MLP puts out, where it is a receiver."""
        for one in receivers:
            arrived[one] = self._spread(values)


class _Through:
    """The streams of the senders' variants, taken through the blocks."""

    def __init__(self, journey: _Journey):
        self._journey = journey
        self._places: list[slice] = []
        self._streams: list[Tensor] = []

    def join_at(self, layer: int) -> None:
        """Those that write the stream that enters a block."""
        for group in self._journey.groups:
            if group.write.kind == "resid" and group.write.layer == layer:
                self._add(group, self._journey.changed(group)[1])

    def streams(self, layer: int) -> Tensor:
        """The streams that enter a block, of all variants: those that have not begun are the base run's."""
        journey = self._journey
        full = journey.base(journey.replay.stream(layer))
        for place, stream in zip(self._places, self._split(), strict=True):
            full[place] = stream
        return full

    def pass_block(self, layer: int, receivers: Sequence[Site], arrived: dict) -> None:
        """Take the streams through a block; heads of it, and its MLP, join."""
        journey, branches = self._journey, self._journey.branches
        own = journey.attention_out(layer)
        attention = [journey.base(own, place) for place in self._places]
        joining = [group for group in journey.groups if group.write.layer == layer]
        for group in joining:
            if group.write.kind != "z":
                continue
            old, new = journey.changed(group)
            self._add(group, journey.base(journey.replay.stream(layer), group.place))
            attention.append(journey.base(own, group.place) + _heads_out(branches, layer, new - old, group.write))
        mlp: dict[str, Tensor] = {}
        if self._streams:
            hooks: Mapping = {("mlp", layer): lambda value: mlp.update(out=value.clone())} if receivers else {}
            with journey.replay.backend.hooks(hooks):
                self._streams = [branches.block(layer, torch.cat(self._streams), torch.cat(attention))]
        if receivers:
            values = journey.base(journey.replay.recorded("mlp", layer))
            if self._streams:
                own_values = mlp["out"].view(self._streams[0].shape)
                for place, value in zip(self._places, own_values.split(self._sizes), strict=True):
                    values[place] = value
            journey.mlp(layer, values, receivers, arrived)
        for group in joining:
            if group.write.kind != "mlp":
                continue
            old, new = journey.changed(group)
            self._add(group, journey.base(journey.replay.stream(layer + 1), group.place) + (new - old))

    def _add(self, group: _Group, stream: Tensor) -> None:
        self._places.append(group.place)
        self._streams.append(stream)

    def _split(self) -> Sequence[Tensor]:
        if not self._streams:
            return []
        return torch.cat(self._streams).split(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [place.stop - place.start for place in self._places]


class _Direct:
    """What each sender adds to the stream, the same in every later layer."""

    def __init__(self, journey: _Journey):
        self._journey = journey
        self._added = torch.zeros_like(journey.base(journey.replay.stream(0)))
        for group in journey.groups:
            self._added[group.place] = self._of(group)

    def join_at(self, layer: int) -> None:
        """Nothing to do: nothing is carried."""

    def streams(self, layer: int) -> Tensor:
        """The streams that enter a block, with what was added before."""
        return self._with_added(layer, lambda write: write.kind == "resid" or write.layer < layer)

    def pass_block(self, layer: int, receivers: Sequence[Site], arrived: dict) -> None:
        """Blocks are not run; what an MLP makes of the stream is asked for where it is a receiver."""
        if not receivers:
            return
        journey, branches = self._journey, self._journey.branches
        same_layer = not branches.parallel
        stream = self._with_added(
            layer, lambda write: write.kind == "resid" or write.layer < layer + (same_layer and write.kind == "z")
        )
        if same_layer:
            stream = stream + journey.base(branches.written(layer, journey.attention_out(layer)))
        journey.mlp(layer, branches.mlp(layer, stream), receivers, arrived)

    def _with_added(self, layer: int, begun: Callable[[Write], bool]) -> Tensor:
        stream = self._journey.base(self._journey.replay.stream(layer))
        for group in self._journey.groups:
            if begun(group.write):
                stream[group.place] += self._added[group.place]
        return stream

    def _of(self, group: _Group) -> Tensor:
        journey, branches, layer = self._journey, self._journey.branches, group.write.layer
        old, new = journey.changed(group)
        if group.write.kind != "z":
            return new - old
        base = journey.base(journey.attention_out(layer), group.place)
        added = _heads_out(branches, layer, new - old, group.write)
        if branches.norm_after:
            return branches.written(layer, base + added) - branches.written(layer, base)
        return branches.written(layer, added)


def _heads_out(branches, layer: int, difference: Tensor, write: Write) -> Tensor:
    """What a change of one head's z ``[rows, changed, heads, d_head]`` does to what attention puts out."""
    assert write.heads is not None
    rows = torch.arange(len(difference), device=difference.device)
    heads = write.heads.to(difference.device)
    of_head = difference[rows, :, heads]  # [rows, changed, d_head]
    return torch.einsum("rpe,red->rpd", of_head, branches.weight("o", layer)[heads])


def _writes(journey: _Journey, receiver: Site, values: Tensor, rows: Tensor) -> Write:
    """A receiver set to what reached it."""
    info = journey.replay.backend.info
    everywhere = receiver.kind in (*BY_HEAD, "z")
    where = torch.ones_like(journey.where) if everywhere else journey.where
    heads = None if receiver.head is None else torch.full((len(rows),), info.slot(receiver), device=rows.device)
    return Write(receiver.kind, receiver.layer, journey.rows[rows], values[rows], where[rows], heads)


def _together(replay: LensReplay, journey: _Journey, arrived: Mapping[Site, Tensor], read: Read) -> Tensor:
    every = torch.arange(len(journey.rows), device=journey.rows.device)
    parts: dict[tuple[str, int], list[Write]] = {}
    for receiver, values in arrived.items():
        parts.setdefault((receiver.kind, receiver.layer), []).append(_writes(journey, receiver, values, every))

    def change(writes: Sequence[Write]) -> Change:
        def function(tensor: Tensor) -> Tensor:
            tensor = tensor.clone()
            for write in writes:
                tensor = carried_out(tensor, write)
            return tensor

        return function

    changes = {key: change(writes) for key, writes in parts.items()}
    return replay.vary(min(one.layer for one in arrived), journey.rows, changes, read)


def _each(replay: LensReplay, journey: _Journey, arrived: Mapping[Site, Tensor], read: Read) -> Tensor:
    rows = len(journey.rows)
    every = torch.arange(rows, device=journey.rows.device)
    order = sorted(range(len(journey.paths.receivers)), key=lambda i: journey.paths.receivers[i].layer)
    at_once = max(1, replay.rows(whole=read.columns is None) // rows)
    found: dict[int, Tensor] = {}
    for begin in range(0, len(order), at_once):
        some = order[begin : begin + at_once]
        receivers = [journey.paths.receivers[i] for i in some]
        writes = [_writes(journey, one, arrived[one], every) for one in receivers]
        columns = None if read.columns is None else read.columns.repeat(len(some), 1)
        logits = replay.resume(writes, Read(read.positions.repeat(len(some)), columns))
        found.update(zip(some, logits.split(rows), strict=True))
    return torch.stack([found[i] for i in range(len(order))], 1)
