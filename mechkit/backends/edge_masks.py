"""Which edges of a set do anything, for many sets at once.

A set of edges is a mask ``[sources, targets]`` in the order of ``Graph``. Heads of a layer, and its MLP, are stages,
in the order in which a model runs them; the logits are the last.

1. An edge into a part that no kept edges lead on from, to the logits, does nothing: from the last stage to the first.
2. Where what is ablated has the values of one other run, a part that the embedding does not reach through kept edges
   writes what it would have written there anyway, kept or not: from the first stage to the last.
3. What is left is what lies on a path from the embedding to the logits, as ``Graph.alive`` has it.
4. Some families (OLMo 2) norm the queries of all heads together, and the keys. There each head of a layer reads the
   queries and keys of every other, and an edge into one of them may do something by way of another head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..graph import Graph


@dataclass(frozen=True, eq=False)
class Stages:
    """Where the sources and targets of each stage are in the order of a graph.

    Attributes:
        graph: of the model.
        coupled: queries and keys of a layer go through one norm.
    """

    graph: Graph
    coupled: bool = False

    def __len__(self) -> int:
        return 2 * self.graph.n_layers + 1

    def layer(self, stage: int) -> int:
        """Of its heads or MLP; of the logits, one past the last."""
        return stage // 2

    def heads(self, stage: int) -> bool:
        """True where a stage is the heads of a layer, False for an MLP and for the logits."""
        return stage % 2 == 0 and stage < len(self) - 1

    def sources(self, stage: int) -> slice:
        """The sources of a stage; of the logits, none."""
        width = self.graph.n_heads + 1
        if stage == len(self) - 1:
            return slice(len(self.graph.sources), len(self.graph.sources))
        first = 1 + self.layer(stage) * width
        return slice(first, first + width - 1) if self.heads(stage) else slice(first + width - 1, first + width)

    def targets(self, stage: int) -> slice:
        """The targets of a stage: q, then k, then v of its heads; its MLP; or the logits."""
        width = self.graph.n_heads + 2 * self.n_shared + 1
        first = self.layer(stage) * width
        if stage == len(self) - 1:
            return slice(first, first + 1)
        return slice(first, first + width - 1) if self.heads(stage) else slice(first + width - 1, first + width)

    @property
    def n_shared(self) -> int:
        """Keys, and values, a layer."""
        return self.graph.n_kv_heads if self.graph.grouped else self.graph.n_heads

    @cached_property
    def exists(self) -> Tensor:
        """Which edges there are ``[sources, targets]``, boolean."""
        return torch.from_numpy(self.graph.exists)

    @cached_property
    def target_stages(self) -> Tensor:
        """Stage of each target ``[targets]``."""
        found = torch.empty(len(self.graph.targets), dtype=torch.long)
        for stage in range(len(self)):
            found[self.targets(stage)] = stage
        return found

    @cached_property
    def source_of(self) -> Tensor:
        """Which sources each target is a slot of ``[targets, sources]``, boolean; the logits are of none."""
        found = torch.zeros(len(self.graph.targets), len(self.graph.sources), dtype=torch.bool)
        for j, target in enumerate(self.graph.targets):
            if self.coupled and target.kind in ("q", "k"):
                found[j, self.sources(2 * target.layer)] = True
                continue
            for reader in self.graph.readers(target):
                if (i := self.graph.source_index.get(reader)) is not None:
                    found[j, i] = True
        return found

    def leading(self, kept: Tensor) -> Tensor:
        """Which targets lead on to the logits ``[sets, targets]`` by kept edges ``[sets, sources, targets]``."""
        lead = torch.zeros(len(kept), kept.shape[2], dtype=torch.bool, device=kept.device)
        lead[:, -1] = True
        source_of = self.source_of.to(kept.device)
        for stage in reversed(range(len(self) - 1)):
            here, slots = self.sources(stage), self.targets(stage)
            later = slice(slots.stop, None)
            nodes = (kept[:, here, later] & lead[:, None, later]).any(-1)
            lead[:, slots] = (source_of[slots, here][None] & nodes[:, None]).any(-1)
        return lead

    def fed(self, kept: Tensor) -> Tensor:
        """Which sources the embedding reaches ``[sets, sources]``, by kept edges ``[sets, sources, targets]``."""
        fed = torch.zeros(kept.shape[:2], dtype=torch.bool, device=kept.device)
        fed[:, 0] = True
        source_of = self.source_of.to(kept.device)
        for stage in range(len(self) - 1):
            here, slots = self.sources(stage), self.targets(stage)
            read = (kept[:, : here.start, slots] & fed[:, : here.start, None]).any(1)
            fed[:, here] = (source_of[slots, here][None] & read[..., None]).any(1)
        return fed

    def alive(self, kept: Tensor) -> Tensor:
        """The edges on a path from the embedding to the logits ``[sets, sources, targets]``."""
        return kept & self.fed(kept)[..., None] & self.leading(kept)[:, None]

    def begins(self, kept: Tensor, leading: Tensor) -> Tensor:
        """The first stage that reads something else than in the whole model ``[sets]``; the number of stages: none."""
        dropped = (self.exists.to(kept.device)[None] & ~kept).any(1) & leading
        stages = self.target_stages.to(kept.device)
        return torch.where(dropped, stages, len(self)).amin(1)
