"""A base run where code runs apart from the model's weights, and variants of it, each a whole pass; see ``envoys``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sites import Site
from .hooks import Function
from .protocol import Paths, Read, Write
from .window import Change, Key, carried_out

if TYPE_CHECKING:
    from .envoys import EnvoyBackend


class EnvoyReplay:
    """See ``protocol.Replay``; every variant is a whole pass."""

    def __init__(self, backend: EnvoyBackend, tokens: Tensor, first: int, record: Sequence[Key]):
        self.first, self._backend, self._tokens = first, backend, tokens
        self._store: dict[Key, Tensor] = {}
        self._record(record)

    def _record(self, keys: Iterable[Key]) -> None:
        """Keep the base run's values of what is not kept yet."""
        if missing := [key for key in keys if key not in self._store]:
            none = Read(torch.zeros(len(self._tokens), dtype=torch.long))
            self._backend.run(self._tokens, {key: noted(None, key, self._store) for key in missing}, none)

    def rows(self, whole: bool = False, positions: int | None = None) -> int:
        """How many variants go side by side."""
        del whole, positions
        return max(1, self._backend.base_tokens() // self._tokens.shape[1])

    def recorded(self, kind: str, layer: int) -> Tensor:
        """The base run's values at the replayed positions."""
        return self._store[kind, layer][:, self.first :]

    def ends(self, read: Read) -> Tensor:
        """The base run's own logits ``[batch, k]``."""
        return self._backend.run(self._tokens, {}, read)

    def resume(self, writes: Sequence[Write], read: Read) -> Tensor:
        """Logits ``[rows, k]`` of every variant of every write; see ``protocol.Replay``."""
        rows = torch.cat([write.rows for write in writes])
        functions = {key: self._written(parts) for key, parts in _places(writes).items()}
        return self._backend.run(self._tokens[rows], functions, read)

    def via(self, writes: Sequence[Write], paths: Paths, read: Read) -> Tensor:
        """Logits ``[rows, outcomes, k]`` of variants in which writes reach receivers alone; see ``protocol.Replay``."""
        rows, places = torch.cat([write.rows for write in writes]), _places(writes)
        arrived: dict[Key, Tensor] = {}
        frozen: dict[Key, Function] = {}
        receivers = {(one.kind, one.layer) for one in paths.receivers if one.kind != "logits"}
        kinds = ("z",) if paths.through_mlps else ("z", "mlp")
        held = {(kind, layer) for kind in kinds for layer in range(self._backend.info.n_layers)}
        self._record(held)
        for key in held | receivers | set(places):
            base = self._store[key][rows] if key in held else None
            frozen[key] = self._held(base, places.get(key, []), arrived if key in receivers else None, key)
        direct = self._backend.run(self._tokens[rows], frozen, read)
        groups = [[one] for one in paths.receivers] if paths.each else [list(paths.receivers)]
        found = []
        for group in groups:
            if group[0].kind == "logits":
                found.append(direct)
                continue
            sets: dict[Key, list[Site]] = defaultdict(list)
            for one in group:
                sets[one.kind, one.layer].append(one)
            functions = {key: self._received(sites, arrived[key]) for key, sites in sets.items()}
            found.append(self._backend.run(self._tokens[rows], functions, read))
        return torch.stack(found, 1)

    def _written(self, parts: Sequence[tuple[slice, Write]]) -> Change:
        def function(tensor: Tensor) -> Tensor:
            new = tensor.clone()
            for place, write in parts:
                new[place, self.first :] = carried_out(new[place, self.first :], _beside(write, new))
            return new

        return function

    def _held(
        self, base: Tensor | None, parts: Sequence[tuple[slice, Write]], arrived: dict[Key, Tensor] | None, key: Key
    ) -> Change:
        """What passes is noted where it arrives, kept at the base, and then written where a sender is."""

        def function(tensor: Tensor) -> Tensor:
            if arrived is not None:
                arrived[key] = tensor.clone()
            return self._written(parts)(tensor if base is None else base.to(tensor))

        return function

    def _received(self, sites: Sequence[Site], arrived: Tensor) -> Change:
        def function(tensor: Tensor) -> Tensor:
            new = tensor.clone()
            for one in sites:
                if one.head is None:
                    return arrived.to(new)
                slot = self._backend.info.slot(one)
                new[:, :, slot] = arrived[:, :, slot].to(new)
            return new

        return function


def _beside(write: Write, tensor: Tensor) -> Write:
    """A write where a tensor is."""
    heads = None if write.heads is None else write.heads.to(tensor.device)
    return replace(write, where=write.where.to(tensor.device), heads=heads)


def _places(writes: Sequence[Write]) -> dict[Key, list[tuple[slice, Write]]]:
    """Writes by the tensor they are in, each with its place among all variants."""
    found: dict[Key, list[tuple[slice, Write]]] = defaultdict(list)
    begin = 0
    for write in writes:
        place = slice(begin, begin + len(write.rows))
        found[write.kind, write.layer].append((place, write))
        begin = place.stop
    return found


def noted(edit: Function | None, key: Key, store: dict[Key, Tensor]) -> Function:
    """A function that keeps what passes, edited or not, in ``store``."""

    def function(tensor: Tensor) -> Tensor | None:
        edited = None if edit is None else edit(tensor)
        store[key] = (tensor if edited is None else edited).to("cpu", copy=True)
        return edited

    return function
