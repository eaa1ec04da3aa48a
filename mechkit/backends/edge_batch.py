"""One batch of sets of edges on its way through a model; see ``keep_edges``.

1. What the batch shares, what was written before any of its sets reads something of its own, is there once.
2. Stage by stage, heads of a layer and its MLP: what each slot reads is summed up, the part runs, and what it writes,
   less what it writes when ablated, is kept for the stages after it.
3. The logits read one position a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .protocol import Read

if TYPE_CHECKING:
    from .keep_edges import LensEdgeRuns


class EdgeBatch:
    """Some sets of edges, on some prompts, on their way through the stages.

    Args:
        runs: whose.
        kept: ``[sets, sources, targets]``.
        start: the first stage in which any of them reads something of its own.
        prompts: rows of the base run.
        base: keeps what was written before the first stage for the next batch of the same prompts.
    """

    def __init__(self, runs: LensEdgeRuns, kept: Tensor, start: int, prompts: Tensor, base: dict[str, Tensor]):
        self._runs, self._kept, self._start, self._prompts = runs, kept, start, prompts
        self._writes = kept.any(-1)  # [sets, sources]: something reads them
        self._stages = runs.stages
        used = self._writes.any(0).nonzero()[:, 0]
        split = self._stages.sources(start).start
        self._before, self._own = used[used < split], used[used >= split]
        # What was written before the first stage, once; and by each set from there on; always less the ablated.
        if "wrote" not in base or not torch.equal(base["sources"], self._before):
            base.update(sources=self._before, wrote=runs.base_writes(self._before, prompts))
        self._base = base["wrote"]
        self._wrote = self._base.new_zeros(len(kept), len(self._own), *self._base.shape[1:])

    def run(self, read: Read) -> Tensor:
        """Logits ``[sets, prompts, k]``."""
        stages = self._stages
        for stage in range(self._start, len(stages) - 1):
            here = stages.sources(stage)
            needed = self._writes[:, here]
            sets, nodes = needed.any(1).nonzero()[:, 0], needed.any(0).nonzero()[:, 0]
            if len(sets):
                wrote = self._attention(stage, sets, nodes) if stages.heads(stage) else self._mlp(stage, sets)
                first = int(torch.searchsorted(self._own, here.start))
                self._wrote[sets, first : first + len(nodes)] = wrote
        at = (read.positions.to(self._prompts.device) - self._runs.replay.first)[self._prompts]
        every = torch.arange(len(self._kept), device=at.device)
        ends = self._read(len(stages) - 1, every, every.new_tensor([len(stages.graph.targets) - 1]), at)
        columns = None if read.columns is None else read.columns.to(at.device)[self._prompts].repeat(len(every), 1)
        logits = self._runs.replay.logits_of(ends.flatten(0, 3), columns)
        return logits.unflatten(0, (len(every), len(self._prompts)))

    def _attention(self, stage: int, sets: Tensor, heads: Tensor) -> Tensor:
        """What heads of a layer write ``[sets, heads, prompts, pos, d_model]``."""
        runs, graph, layer = self._runs, self._stages.graph, self._stages.layer(stage)
        info, branches = runs.backend.info, runs.branches
        per_group, wanted = info.n_heads // info.n_kv_heads, heads
        if self._stages.coupled:
            heads = torch.arange(info.n_heads, device=heads.device)
        shared = heads if not graph.grouped else (heads // per_group).unique()
        groups = shared if graph.grouped else shared // per_group
        first = self._stages.targets(stage).start
        keys = first + info.n_heads + shared
        targets = torch.cat([first + heads, keys, keys + self._stages.n_shared])
        normed = branches.norm(layer, self._read(stage, sets, targets))
        values: dict[str, Tensor] = {}
        which = {"q": heads, "k": groups, "v": groups}
        for kind, part in zip("qkv", normed.split([len(heads), len(shared), len(shared)], 1), strict=True):
            weight, bias = branches.weight(kind, layer)[which[kind]], branches.bias(kind, layer)
            out = torch.einsum("stnpd,tde->snpte", part, weight)
            values[kind] = (out if bias is None else out + bias[which[kind]]).flatten(0, 1)
        rows = self._prompts.repeat(len(sets))
        if graph.grouped or per_group == 1:
            z = runs.attend(layer, rows, {kind: (which[kind], values[kind]) for kind in "qkv"})
        else:  # each query head with a key and a value of its own: one head of every group at a time
            z = values["q"].new_zeros(*values["q"].shape[:2], info.n_heads, info.d_head)
            for number in (heads % per_group).unique():
                some = (heads % per_group == number).nonzero()[:, 0]
                given = {kind: (which[kind][some], values[kind][:, :, some]) for kind in "kv"}
                given["q"] = (heads, values["q"])
                z[:, :, heads[some]] = runs.attend(layer, rows, given)[:, :, heads[some]]
        difference = z.unflatten(0, (len(sets), -1)) - runs.ablated["z", layer][self._prompts]
        return runs.write(layer, difference[..., wanted, :], wanted).transpose(0, 1)

    def _mlp(self, stage: int, sets: Tensor) -> Tensor:
        """What the MLP of a layer writes ``[sets, 1, prompts, pos, d_model]``."""
        layer = self._stages.layer(stage)
        stream = self._read(stage, sets, sets.new_tensor([self._stages.targets(stage).start]))
        out = self._runs.branches.mlp(layer, stream.flatten(0, 2)).view(stream.shape)
        return out - self._runs.ablated["mlp", layer][self._prompts]

    def _read(self, stage: int, sets: Tensor, targets: Tensor, at: Tensor | None = None) -> Tensor:
        """What targets of a stage read ``[sets, targets, prompts, pos, d_model]``; ``at``: one position a prompt."""

        def picked(tensor: Tensor) -> Tensor:
            if at is None:
                return tensor
            return tensor[..., torch.arange(len(at), device=at.device), at, :][..., None, :]

        runs, stages = self._runs, self._stages
        count = int(torch.searchsorted(self._own, stages.sources(stage).start))
        own = self._wrote[:, :count] if len(sets) == len(self._wrote) else self._wrote[sets, :count]
        base, own = picked(self._base), picked(own)
        stream = picked(runs.streams[stage][self._prompts])
        kept = self._kept[sets][:, :, targets].mT.to(stream.dtype)  # [sets, targets, sources]
        before, after = kept[..., self._before], kept[..., self._own[:count]]
        if not runs.branches.norm_after:
            return _sum(stream, before, base, after, own)
        total = _sum(stream, before * ~self._heads(self._before), base, after * ~self._heads(self._own[:count]), own)
        for layer in range((stage + 1) // 2):
            of = stages.sources(2 * layer)
            b, o = (
                slice(*torch.searchsorted(x, torch.tensor([of.start, of.stop], device=x.device)).tolist())
                for x in (self._before, self._own[:count])
            )
            out = picked(runs.outs[layer][self._prompts])
            changed = _sum(out, before[..., b], base[b], after[..., o], own[:, o])
            total += runs.branches.written(layer, changed) - runs.branches.written(layer, out)
        return total

    def _heads(self, sources: Tensor) -> Tensor:
        """Which sources are heads: the embedding, and a layer's MLP after its heads, come once in so many."""
        return sources % (self._stages.graph.n_heads + 1) != 0


def _sum(onto: Tensor, before: Tensor, base: Tensor, after: Tensor, own: Tensor) -> Tensor:
    """Kept sources on top of a stream, for each set and target: ``[sets, targets, prompts, pos, d_model]``.

    Args:
        onto: the stream ``[prompts, pos, d_model]``.
        before, base: which sources are kept ``[sets, targets, sources]``, and what they write, the same for all sets.
        after, own: the same of those that write something else in each set ``[sets, sources, ...]``.
    """
    total = (before.flatten(0, 1) @ base.flatten(1)).unflatten(0, before.shape[:2])
    total += onto.flatten()
    if own.shape[1]:
        total = torch.baddbmm(total, after, own.flatten(2))
    return total.unflatten(-1, onto.shape)
