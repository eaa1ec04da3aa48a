"""What senders change, carried to those who read it, with attention held at the base run; see ``paths``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sites import Site
from .protocol import Paths, Read, Write
from .window import carried_out

if TYPE_CHECKING:
    from .replay import LensReplay


@dataclass
class Group:
    """Variants of one write: which rows of the whole they are, and where in the window they change."""

    write: Write
    rows: Tensor  # of the base run
    at: Tensor  # positions in the window [rows, changed]
    place: slice  # among all variants


class Senders:
    """Variants of a base run, each with what one sender writes.

    Attributes:
        replay: the base run.
        paths: where the paths lead.
        rows: base prompt of each variant ``[rows]``.
        where: which positions of the window its sender changes ``[rows, pos]``.
        at: which of them are run ``[rows, changed]``.
        groups: the variants by what is written.
    """

    def __init__(self, replay: LensReplay, writes: Sequence[Write], paths: Paths, read: Read):
        self.replay, self.paths = replay, paths
        self.branches = replay.backend.branches
        device = replay.stream(0).device
        self.rows = torch.cat([write.rows for write in writes]).to(device)
        self.where = torch.cat([write.where for write in writes]).to(device)
        self.at = self._positions(read)
        self.groups: list[Group] = []
        begin = 0
        for write in writes:
            place = slice(begin, begin + len(write.rows))
            self.groups.append(Group(write, self.rows[place], self.at[place], place))
            begin = place.stop
        self._attention: dict[int, Tensor] = {}

    def base(self, tensor: Tensor, place: slice | Tensor = slice(None)) -> Tensor:
        """Of a tensor of the base run ``[batch, pos, ...]``, what belongs to some variants ``[rows, changed, ...]``."""
        return tensor[self.rows[place][:, None], self.at[place]]

    def attention_out(self, layer: int) -> Tensor:
        """What the attention module of a layer put out in the base run ``[batch, pos, d_model]``."""
        if layer not in self._attention:
            self._attention[layer] = self.branches.attention_out(layer, self.replay.recorded("z", layer))
        return self._attention[layer]

    def changed(self, group: Group) -> Tensor:
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

    def spread(self, values: Tensor) -> Tensor:
        """Values at the changed positions laid on the window ``[rows, pos, width]``; 0 elsewhere."""
        full = values.new_zeros(len(values), self.where.shape[1], values.shape[-1])
        return full.scatter_(1, self.at[..., None].expand_as(values), values)


class Through:
    """The streams of the senders' variants, taken through the blocks."""

    def __init__(self, senders: Senders):
        self._senders = senders
        self._places: list[slice] = []
        self._streams: list[Tensor] = []

    def join_at(self, layer: int) -> None:
        """Those that write the stream that enters a block."""
        for group in self._senders.groups:
            if group.write.kind == "resid" and group.write.layer == layer:
                self._add(group, self._senders.changed(group)[1])

    def streams(self, layer: int) -> Tensor:
        """The streams that enter a block, of all variants: those that have not begun are the base run's."""
        senders = self._senders
        full = senders.base(senders.replay.stream(layer))
        for place, stream in zip(self._places, self._split(), strict=True):
            full[place] = stream
        return full

    def pass_block(self, layer: int, receivers: Sequence[Site], arrived: dict) -> None:
        """Take the streams through a block; heads of it, and its MLP, join."""
        senders, branches = self._senders, self._senders.branches
        own = senders.attention_out(layer)
        attention = [senders.base(own, place) for place in self._places]
        joining = [group for group in senders.groups if group.write.layer == layer]
        for group in joining:
            if group.write.kind != "z":
                continue
            old, new = senders.changed(group)
            self._add(group, senders.base(senders.replay.stream(layer), group.place))
            attention.append(senders.base(own, group.place) + branches.heads_out(layer, new - old))
        mlp: dict[str, Tensor] = {}
        if self._streams:
            hooks: Mapping = {("mlp", layer): lambda value: mlp.update(out=value.clone())} if receivers else {}
            with senders.replay.backend.hooks(hooks):
                self._streams = [branches.block(layer, torch.cat(self._streams), torch.cat(attention))]
        if receivers:
            values = senders.base(senders.replay.recorded("mlp", layer))
            if self._streams:
                own_values = mlp["out"].view(self._streams[0].shape)
                for place, value in zip(self._places, own_values.split(self._sizes), strict=True):
                    values[place] = value
            arrived.update({one: senders.spread(values) for one in receivers})
        for group in joining:
            if group.write.kind != "mlp":
                continue
            old, new = senders.changed(group)
            self._add(group, senders.base(senders.replay.stream(layer + 1), group.place) + (new - old))

    def _add(self, group: Group, stream: Tensor) -> None:
        self._places.append(group.place)
        self._streams.append(stream)

    def _split(self) -> Sequence[Tensor]:
        if not self._streams:
            return []
        return torch.cat(self._streams).split(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [place.stop - place.start for place in self._places]


class Direct:
    """What each sender adds to the stream, the same in every later layer."""

    def __init__(self, senders: Senders):
        self._senders = senders
        self._added = torch.zeros_like(senders.base(senders.replay.stream(0)))
        for group in senders.groups:
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
        senders, branches = self._senders, self._senders.branches
        same_layer = not branches.parallel
        stream = self._with_added(
            layer, lambda write: write.kind == "resid" or write.layer < layer + (same_layer and write.kind == "z")
        )
        if same_layer:
            stream = stream + senders.base(branches.written(layer, senders.attention_out(layer)))
        arrived.update({one: senders.spread(branches.mlp(layer, stream)) for one in receivers})

    def _with_added(self, layer: int, begun: Callable[[Write], bool]) -> Tensor:
        stream = self._senders.base(self._senders.replay.stream(layer))
        for group in self._senders.groups:
            if begun(group.write):
                stream[group.place] += self._added[group.place]
        return stream

    def _of(self, group: Group) -> Tensor:
        senders, branches, layer = self._senders, self._senders.branches, group.write.layer
        old, new = senders.changed(group)
        if group.write.kind != "z":
            return new - old
        base = senders.base(senders.attention_out(layer), group.place)
        added = branches.heads_out(layer, new - old)
        if branches.norm_after:
            return branches.written(layer, base + added) - branches.written(layer, base)
        return branches.written(layer, added)
