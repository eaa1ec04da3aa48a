"""A base run kept so that variants of it begin late: skip layers, skip positions, batch variants, read little.

1. The positions before ``first`` run once, and once for prompts that begin alike, and leave their keys and values in
   the Hub's own cache.
2. The positions from ``first`` run once on top of that cache, the model building its own masks and rotations. What
   each block was given is noted; the residual entering each block is kept.
3. A variant that changes something in block ``l`` is the noted residual of ``l``, changed, through blocks
   ``l, l+1, ...``, each called with what it was given in the base run, rows repeated as needed. No
   architecture is known here.
4. Variants of all layers make one sweep through the blocks: those of block ``l`` join the batch there, so each
   block is called once, on everything that began before it.
5. Each block sees the prefix's keys and values through a cache that hands out rows and keeps nothing.
6. Before a base run of a new shape is used, two of its prompts go through the blocks in this way with nothing changed.
   What comes out must be the base run's own; a family for which it is not is refused, not guessed at. The same two
   tell how much memory a variant takes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .branches import Enough
from .hooks import TOLERANCE, Function
from .memory import OutputBytes, ran_out, rows_at_once
from .paths import via
from .protocol import Paths, Read, Write
from .window import Change, carried_out

if TYPE_CHECKING:
    from .lens import LensBackend


Always: TypeAlias = "Callable[[int, Tensor], Mapping[tuple[str, int], Change]]"

_COPIES = 6  # of a row of logits, that a metric of the whole vocabulary makes


class _PrefixCache:
    """What an attention module takes for its key/value cache: the prefix, rows picked, nothing kept."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], rows: Tensor):
        self._layers, self._rows = layers, rows

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Prefix and new keys and values, ``[rows, heads, pos, d_head]``."""
        before_k, before_v = self._layers[layer_idx]
        rows = self._rows.to(before_k.device)
        return (
            torch.cat([before_k[rows], keys], -2),
            torch.cat([before_v[rows], values], -2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of prefix positions."""
        return self._layers[layer_idx][0].shape[-2]


class LensReplay:
    """See ``protocol.Replay``."""

    def __init__(
        self,
        backend: LensBackend,
        tokens: Tensor,
        first: int,
        record: Sequence[tuple[str, int]],
        changes: Mapping[tuple[str, int], Function] | None = None,
    ):
        self.backend, self.first, self.batch = backend, first, len(tokens)
        self._length = tokens.shape[1] - first
        self.row_bytes = 0  # of a variant; see check
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._residuals: list[Tensor] = []
        self._store: dict[tuple[str, int], Tensor] = {}
        self._prefix: list[tuple[Tensor, Tensor]] | None = None
        from transformers import DynamicCache

        with torch.inference_mode():
            options: dict[str, Any] = {"use_cache": False}
            if first > 0:
                # The Hub's default cache drops what a sliding window hides; patterns would lose those keys.
                cache = DynamicCache()
                # Twins are the same up to here: each beginning runs once.
                distinct, which = tokens[:, :first].unique(dim=0, return_inverse=True)
                backend.body(distinct, use_cache=True, past_key_values=cache)
                layers: Any = cache.layers
                for layer in layers:
                    each = which.to(layer.keys.device)
                    layer.keys, layer.values = layer.keys[each], layer.values[each]
                self._prefix = [(layer.keys, layer.values) for layer in layers]
                options = {"use_cache": True, "past_key_values": cache}
            last = ("resid", backend.info.n_layers)
            with (
                backend.hooks(changes or {}),
                backend.hooks(backend.sites.recording(self._store, [*record, last])),
                self._noting(),
            ):
                hidden: Tensor = backend.body(tokens[:, first:], **options).last_hidden_state
                self._hidden = hidden.to(backend.info.device)
            self._residuals.append(self._store[last])

    def check(self) -> int:
        """Compare two replayed prompts with the base run.

        Returns:
            The bytes that one variant takes.

        Raises:
            UnsupportedError: they differ, or the blocks cannot be called in this way.
        """
        info = self.backend.info
        rows = torch.tensor([self.batch - 1, 0], device=self._hidden.device)
        own = self._hidden[rows]
        try:
            with torch.inference_mode():
                resid = self.stream(0)[rows]
                with OutputBytes() as spent:
                    resid = self.block(0, resid, rows)
                row_bytes = spent.total // len(rows)
                for layer in range(1, info.n_layers):
                    resid = self.block(layer, resid, rows)
                off = float((self.backend.placed.normalised(resid) - own).abs().max())
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
            if ran_out(error):
                raise
            raise UnsupportedError(
                f"The blocks of {info.name} ({info.family}) cannot be run one by one: {error}",
                fix="Patch one site at a time with model.run(..., edits=[mk.patch_in(...)])",
            ) from error
        if not off <= TOLERANCE.get(own.dtype, 1e-4) * max(1.0, float(own.abs().max())):
            raise UnsupportedError(
                f"The blocks of {info.name} ({info.family}), run one by one, give another result than the model "
                f"(off by {off:.2g})",
                fix="Patch one site at a time with model.run(..., edits=[mk.patch_in(...)])",
            )
        return row_bytes

    def rows(self, whole: bool = False, positions: int | None = None) -> int:
        """How many variants fit in memory side by side; known once ``row_bytes`` is."""
        logits = _COPIES * 4 * self.backend.info.d_vocab if whole else 0
        run = positions or self._length
        return rows_at_once(self.row_bytes * run // self._length + logits, run, self._hidden.device)

    def recorded(self, kind: str, layer: int) -> Tensor:
        """The base run's values at the replayed positions."""
        return self._store[kind, layer]

    def ends(self, read: Read) -> Tensor:
        """The base run's own logits ``[batch, k]``."""
        at = read.positions.to(self._hidden.device) - self.first
        with torch.inference_mode():
            hidden = self._hidden[torch.arange(self.batch, device=self._hidden.device), at]
            return self.backend.readout(hidden, read.columns)

    def resume(self, writes: Sequence[Write], read: Read) -> Tensor:
        """Logits ``[rows, k]`` of every variant of every write, in the order given; see ``protocol.Replay``."""
        with torch.inference_mode():
            return self.logits(self.streams(writes), read)

    def streams(self, writes: Sequence[Write], always: Always | None = None) -> Tensor:
        """What leaves the last block in every variant of every write, in the order given: ``[rows, pos, d_model]``.

        Args:
            writes: as of ``resume``.
            always: what is changed in all variants besides, as it was in the base run: of a layer and the variants'
                base prompts ``[rows]``.
        """
        backend = self.backend
        with torch.inference_mode():
            resid = self.stream(0)[:0]
            rows = torch.empty(0, dtype=torch.long, device=resid.device)
            waiting = list(writes)
            for layer in range(writes[0].layer, backend.info.n_layers):
                changes: dict[tuple[str, int], list[tuple[slice, Write]]] = defaultdict(list)
                while waiting and waiting[0].layer == layer:
                    write = waiting.pop(0)
                    joining = write.rows.to(rows.device)
                    entering = self.stream(layer)[joining]
                    if write.kind == "resid":
                        entering = carried_out(entering, write)
                    else:
                        place = slice(len(rows), len(rows) + len(joining))
                        changes[write.kind, layer].append((place, write))
                    resid, rows = torch.cat([resid, entering]), torch.cat([rows, joining])
                before = {} if always is None else dict(always(layer, rows))
                written = {key: _change(parts, before.get(key)) for key, parts in changes.items()}
                with backend.hooks(before | written):
                    resid = self.block(layer, resid, rows)
            for write in waiting:  # the stream that leaves the last block
                entering = carried_out(self.stream(write.layer)[write.rows.to(rows.device)], write)
                resid, rows = torch.cat([resid, entering]), torch.cat([rows, write.rows.to(rows.device)])
            return resid

    def vary(self, layer: int, rows: Tensor, changes: Mapping[tuple[str, int], Change], read: Read) -> Tensor:
        """Logits ``[rows, k]`` of the base prompts ``rows`` from block ``layer`` on, with these changes made."""
        with torch.inference_mode(), self.backend.hooks(changes):
            resid = self.stream(layer)[rows]
            for later in range(layer, self.backend.info.n_layers):
                resid = self.block(later, resid, rows)
            return self.logits(resid, read)

    def via(self, writes: Sequence[Write], paths: Paths, read: Read) -> Tensor:
        """Logits ``[rows, outcomes, k]`` of variants in which writes reach receivers alone; see ``protocol.Replay``."""
        return via(self, writes, paths, read)

    def logits(self, resid: Tensor, read: Read) -> Tensor:
        """Logits ``[rows, k]`` of streams that leave the last block ``[rows, pos, d_model]``."""
        at = read.positions.to(resid.device) - self.first
        ends = resid[torch.arange(len(resid), device=resid.device), at]
        return self.logits_of(ends, read.columns)

    def logits_of(self, ends: Tensor, columns: Tensor | None) -> Tensor:
        """Logits ``[rows, k]`` of streams at the answer position ``[rows, d_model]``."""
        return self.backend.readout(self.backend.placed.normalised(ends[:, None])[:, 0], columns)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """While the base run is on, note what each block is given."""
        with ExitStack() as stack:
            for block in self.backend.bridge.blocks:
                stack.callback(block.register_forward_pre_hook(self._note, with_kwargs=True).remove)
            yield

    def _note(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        del module
        resid = args[0] if args else kwargs["hidden_states"]
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        self._residuals.append(resid.clone().to(self.backend.info.device))
        self._calls.append((args[1:], rest))

    def stream(self, layer: int) -> Tensor:
        """The stream entering a block of the base run, or leaving the last ``[batch, pos, d_model]``."""
        return self._residuals[layer]

    def block(self, layer: int, resid: Tensor, rows: Tensor) -> Tensor:
        """Streams ``[rows, pos, d_model]`` through a block, each as a variant of one of the base prompts ``rows``."""
        args, kwargs = self._calls[layer]
        given = {key: self._rows(value, rows, key) for key, value in kwargs.items()}
        there = self.backend.placed.there(layer, resid)
        out = self.backend.bridge.blocks[layer](there, *(self._rows(value, rows) for value in args), **given)
        return (out[0] if isinstance(out, tuple) else out).to(resid.device)

    def last_block(self, resid: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        """As the last ``block``, but only one position ``at [rows]`` of what leaves it: ``[rows, d_model]``."""
        branches, last = self.backend.branches, self.backend.info.n_layers - 1
        kept: list[Tensor] = []

        def keep(z: Tensor) -> None:
            kept.append(z.clone())
            raise Enough

        with self.backend.hooks({("z", last): keep}), suppress(Enough):
            self.block(last, resid, rows)
        every = torch.arange(len(resid), device=resid.device)
        out = branches.attention_out(last, kept[0][every, at])
        return branches.block(last, resid[every, at][:, None], out[:, None])[:, 0]

    def _rows(self, value: Any, rows: Tensor, name: str = "") -> Any:
        """What a block was given, for these rows: batch-sized tensors picked, the cache replaced."""
        if isinstance(value, Tensor):
            rows = rows.to(value.device)
            if name == "alibi" and value.ndim and value.shape[0] == self.batch * self.backend.info.n_heads:
                return value.unflatten(0, (self.batch, -1))[rows].flatten(0, 1)
            by_prompt = value.ndim > 1 and value.shape[0] == self.batch
            # Of one prompt, what is the same for all rows is left to broadcast; Falcon's alibi is viewed by rows.
            return value[rows] if by_prompt and (self.batch > 1 or name == "alibi") else value
        if isinstance(value, tuple | list):
            return type(value)(self._rows(one, rows) for one in value)
        if hasattr(value, "update") and hasattr(value, "get_seq_length"):
            return None if self._prefix is None else _PrefixCache(self._prefix, rows)
        return value


def _change(parts: list[tuple[slice, Write]], before: Change | None = None) -> Change:
    def function(tensor: Tensor) -> Tensor:
        new = tensor.clone() if before is None else before(tensor).clone()
        for place, write in parts:
            new[place] = carried_out(new[place], write)
        return new

    return function
