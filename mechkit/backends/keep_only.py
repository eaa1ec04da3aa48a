"""Runs in which only some heads are left in, many sets at once.

1. Up to the first layer in which any set keeps a head, all sets agree: every head is replaced. That part is run once.
2. From there on the sets stand side by side on the batch axis, each with its own mask at every layer.
3. Sets that begin late are run together, so that they share as long a beginning as they can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .memory import in_batches
from .protocol import Keep, Read
from .replay import LensReplay
from .window import Change

if TYPE_CHECKING:
    from .lens import LensBackend


def keep_only(backend: LensBackend, tokens: Tensor, keep: Keep, read: Read, rows: int) -> Tensor:
    """Logits ``[sets, batch, k]``, ``rows`` prompts at once; see ``protocol.Backend.keep_only``."""
    layers, batch = backend.info.n_layers, len(tokens)
    values = [value.to(tokens.device) for value in keep.values]
    kept = keep.kept.to(tokens.device)

    def replaced(layer: int) -> Change:
        return lambda z: values[layer].to(z).expand_as(z).clone()

    base = LensReplay(backend, tokens, 0, (), {("z", layer): replaced(layer) for layer in range(layers)})
    any_head = kept.any(-1)
    begins = torch.where(any_head.any(-1), any_head.int().argmax(-1), layers)  # first layer with a kept head
    results: list[Tensor | None] = [None] * len(kept)

    def run(sets: Tensor) -> Tensor:
        start = int(begins[sets].min())
        prompts = torch.arange(batch, device=tokens.device).repeat(len(sets))
        mine = kept[sets].repeat_interleave(batch, 0)  # [rows, layers, heads]

        def mixed(layer: int) -> Change:
            def change(z: Tensor) -> Tensor:
                other = values[layer].to(z).expand(batch, *z.shape[1:])[prompts]
                return torch.where(mine[:, layer][:, None, :, None], z, other)

            return change

        positions = read.positions.repeat(len(sets))
        columns = None if read.columns is None else read.columns.repeat(len(sets), 1)
        changes = {("z", layer): mixed(layer) for layer in range(start, layers)}
        return base.vary(start, prompts, changes, Read(positions, columns))

    for sets, logits, _ in in_batches(begins.argsort(descending=True), max(1, rows // batch), run):
        for one, block in zip(sets.tolist(), logits.split(batch), strict=True):
            results[one] = block
    return torch.stack([block for block in results if block is not None])
