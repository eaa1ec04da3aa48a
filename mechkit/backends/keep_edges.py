"""Runs in which only some edges carry what their source writes, many sets of edges at once.

1. What a part reads is the stream of what every source before it writes when ablated, and on top of it, for each edge
   into it that is kept, what the source writes in this run less what it writes when ablated. So each of q, k, v of a
   head, each MLP and the logits read a stream of their own.
2. The sums over edges are products of matrices, ``[slots, sources] [sources, pos * d_model]`` a set and stage: no
   edge is looked at by itself.
3. q, k and v go through the norm and their projections, and attention runs with them in place: the model's own code,
   as far as z. An MLP runs on its stream.
4. With a norm behind attention, what the heads of a layer write is ``written(out)``: the kept heads of a layer are put
   in together, and then go through that norm, for each slot anew.
5. Sets stand side by side on the batch axis. They begin at the first stage in which any of them reads something else
   than in the whole model; what was written before is the base run's, once for all of them. A part that does nothing
   in any set is not run, and runs for the sets in which it does something (``edge_masks``). ``edge_batch`` takes a
   batch through the stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..graph import Graph
from .branches import Enough
from .edge_batch import EdgeBatch
from .edge_masks import Stages
from .memory import in_batches, rows_at_once
from .protocol import Ablated, Read
from .window import Change

if TYPE_CHECKING:
    from .lens import LensBackend
    from .replay import LensReplay

# Of what the sets of a batch write: more would leave the processor's caches, and be slower.
_BYTES_AT_ONCE = {"cpu": 1 << 27}
# What is done in a batch, at most, to what its sets need; a GPU would rather do more than be given little.
_WASTE = {"cpu": 1.25}
_COPIES = 5  # of a slot's stream, that its norm and the sum that it is made of take


class LensEdgeRuns:
    """See ``protocol.EdgeRuns``.

    Args:
        backend: what runs.
        replay: the base run, with ``written_keys`` recorded.
        ablated: what sources write where their edges are not kept, at the replayed positions.
    """

    def __init__(self, backend: LensBackend, replay: LensReplay, ablated: Ablated):
        info = backend.info
        self.backend, self.replay, self.branches = backend, replay, backend.branches
        graph = Graph(info.n_layers, info.n_heads, info.n_kv_heads, self.branches.parallel, ablated.ungrouped)
        self._one_run = ablated.one_run
        with torch.inference_mode():
            self.ablated = {
                key: value.to(replay.recorded(*key)).expand_as(replay.recorded(*key))
                for key, value in ablated.values.items()
            }
            self.outs = [self.branches.attention_out(at, self.ablated["z", at]) for at in range(info.n_layers)]
            self.streams = list(self._streams())
            self.stages = Stages(graph, self._coupled())
        if self.stages.coupled and graph.ungrouped and info.grouped:
            raise UnsupportedError(
                f"{info.name} ({info.family}) norms the keys of a layer together, each of them shared by several heads",
                expected="edges to the keys of groups",
                fix="Take model.graph() with ungrouped=False",
            )

    def keep(self, kept: Tensor, read: Read) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Which sets ran, on which prompts, and their logits, batch by batch; see ``protocol.EdgeRuns``."""
        replay, device = self.replay, self.streams[0].device
        kept = kept.to(device) & self.stages.exists.to(device)
        kept = self.stages.alive(kept) if self._one_run else kept & self.stages.leading(kept)[:, None]
        leading = self.stages.leading(kept)
        begins = self.stages.begins(kept, leading)
        whole = begins == len(self.stages)
        if bool(whole.any()):
            with torch.inference_mode():
                logits = replay.logits(replay.stream(self.backend.info.n_layers), read)
            found = whole.nonzero()[:, 0].cpu()
            yield found, torch.arange(replay.batch), logits.expand(len(found), *logits.shape)
        order = kept.sum((1, 2)).argsort(descending=True)
        order = order[begins[order].argsort(descending=True, stable=True)]  # late ones first; of these, large ones
        order = order[~whole[order]]
        if not len(order):
            return
        own = kept.any(-1) & self._from(begins)
        rows = self._rows(int(own.sum(1).max()))
        for prompts in torch.arange(replay.batch, device=device).tensor_split(-(-replay.batch // rows)):
            base: dict[str, Tensor] = {}

            @torch.inference_mode()
            def run(sets: Tensor, prompts: Tensor = prompts, base: dict[str, Tensor] = base) -> Tensor:
                return EdgeBatch(self, kept[sets], int(begins[sets].min()), prompts, base).run(read)

            for alike in self._alike(order, own, len(prompts)):
                for sets, logits, _ in in_batches(alike, len(alike), run):
                    yield sets.cpu(), prompts.cpu(), logits

    def write(self, layer: int, difference: Tensor, heads: Tensor) -> Tensor:
        """What heads write for a difference in z ``[..., heads, d_head]``: ``[heads, ..., d_model]``.

        Where a norm follows, it is what they add to what goes into the norm.
        """
        out = torch.einsum("...he,hed->h...d", difference, self.branches.weight("o", layer)[heads])
        return out if self.branches.norm_after else self.branches.written(layer, out)

    def base_writes(self, sources: Tensor, prompts: Tensor) -> Tensor:
        """What sources write in the base run less what they write when ablated ``[sources, prompts, pos, d_model]``."""
        parts = [self.streams[0].new_empty(0, len(prompts), *self.streams[0].shape[1:])]
        if bool((sources == 0).any()):
            parts.append((self.replay.recorded("resid", 0) - self.ablated["resid", 0])[prompts][None])
        for stage in range(len(self.stages) - 1):
            here, layer = self.stages.sources(stage), self.stages.layer(stage)
            chosen = sources[(sources >= here.start) & (sources < here.stop)] - here.start
            if not len(chosen):
                continue
            key = ("z" if self.stages.heads(stage) else "mlp", layer)
            difference = (self.replay.recorded(*key) - self.ablated[key])[prompts]
            if self.stages.heads(stage):
                parts.append(self.write(layer, difference[:, :, chosen], chosen))
            else:
                parts.append(difference[None])
        return torch.cat(parts)

    def attend(self, layer: int, rows: Tensor, given: Mapping[str, tuple[Tensor | slice, Tensor]]) -> Tensor:
        """z ``[rows, pos, heads, d_head]`` of a layer with some of its q, k, v given, as (which, values) of each."""
        found: list[Tensor] = []

        def put(which: Tensor | slice, values: Tensor) -> Change:
            def change(own: Tensor) -> Tensor:
                own = own.clone()
                own[:, :, which] = values
                return own

            return change

        def take(z: Tensor) -> Tensor:
            found.append(z)
            raise Enough

        functions: dict[tuple[str, int], Change] = {(kind, layer): put(*one) for kind, one in given.items()}
        stream = self.streams[0].new_zeros(len(rows), *self.streams[0].shape[1:])  # nothing of it is used
        with self.backend.hooks({**functions, ("z", layer): take}), suppress(Enough):
            self.replay.block(layer, stream, rows)
        return found[0]

    def _streams(self) -> Iterator[Tensor]:
        """What each stage reads when no edge into it is kept ``[batch, pos, d_model]``."""
        stream = self.ablated["resid", 0]
        for layer, out in enumerate(self.outs):
            after = stream + self.branches.written(layer, out)
            yield stream
            yield stream if self.branches.parallel else after
            stream = after + self.ablated["mlp", layer]
        yield stream

    def _coupled(self) -> bool:
        """Whether what one head attends to depends on the query of another, as where one norm is over all of them."""
        info, pos = self.backend.info, self.streams[0].shape[1]
        draw = torch.Generator().manual_seed(0)
        row, found = torch.zeros(1, dtype=torch.long, device=self.streams[0].device), []
        given = {
            kind: torch.randn(1, pos, heads, info.d_head, generator=draw).to(self.streams[0])
            for kind, heads in zip("qkv", (info.n_heads, info.n_kv_heads, info.n_kv_heads), strict=True)
        }
        for times in (1.0, 4.0):
            given["q"][:, :, 0] *= times
            every = {kind: (slice(None), values) for kind, values in given.items()}
            found.append(self.attend(0, row, every)[:, :, 1:])
        return not torch.equal(*found)

    def _from(self, stages: Tensor) -> Tensor:
        """Which sources write in those stages or later ``[sets, sources]``."""
        firsts = [self.stages.sources(stage).start for stage in range(len(self.stages))]
        first = torch.tensor([*firsts, firsts[-1]], device=stages.device)[stages]
        return torch.arange(len(self.stages.graph.sources), device=stages.device)[None] >= first[:, None]

    def _alike(self, order: Tensor, own: Tensor, prompts: int) -> Iterator[Tensor]:
        """Sets, in order, that run side by side.

        What one of them needs is done for all, so that sets that have little in common take longer together.
        """
        waste, at_once = _WASTE.get(own.device.type, 1 << 30), _BYTES_AT_ONCE.get(own.device.type, 1 << 60)
        sizes, group = own.sum(1).tolist(), []
        union, needed = torch.zeros_like(own[0]), 0
        for one in order.tolist():
            together = union | own[one]
            width = int(together.sum())
            count = len(group) + 1
            fits = count * prompts <= self._rows(width) and count * width * prompts * self._stream_bytes <= at_once
            if group and not (fits and count * width <= waste * (needed + sizes[one])):
                yield torch.tensor(group, device=order.device)
                group, together, needed = [], own[one], 0
            group, union, needed = [*group, one], together, needed + sizes[one]
        yield torch.tensor(group, device=order.device)

    def _rows(self, width: int) -> int:
        """How many prompts, of all sets, fit side by side where that many sources write something of their own."""
        slots = _COPIES * len(self.stages.graph.targets) // self.backend.info.n_layers
        row_bytes = self.replay.row_bytes + (width + slots) * self._stream_bytes
        return rows_at_once(row_bytes, self.streams[0].shape[1], self.streams[0].device)

    @property
    def _stream_bytes(self) -> int:
        """Of a stream of one prompt."""
        return self.streams[0][0].numel() * self.streams[0].element_size()


def written_keys(n_layers: int) -> list[tuple[str, int]]:
    """What has to be recorded: all that is written to the stream."""
    return [("resid", 0), *((kind, layer) for layer in range(n_layers) for kind in ("z", "mlp"))]
