"""Runs in which only some heads and MLPs are left in, many sets at once.

1. Up to the first layer in which any set keeps a part, all sets agree: every part is replaced. That is run once.
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
from .window import Change, Key

if TYPE_CHECKING:
    from .lens import LensBackend


def keep_only(backend: LensBackend, tokens: Tensor, keep: Keep, read: Read, rows: int) -> Tensor:
    """Logits ``[sets, batch, k]``, ``rows`` prompts at once; see ``protocol.Backend.keep_only``."""
    layers, batch = backend.info.n_layers, len(tokens)
    kept = {"z": keep.kept.to(tokens.device)}
    values = {"z": [value.to(tokens.device) for value in keep.values]}
    if keep.mlps is not None:
        kept["mlp"] = keep.mlps.to(tokens.device)[..., None]
        values["mlp"] = [value.to(tokens.device) for value in keep.mlp_values]
    any_part = torch.stack([mask.any(-1) for mask in kept.values()]).any(0)
    begins = torch.where(any_part.any(-1), any_part.int().argmax(-1), layers)  # first layer with a kept part

    def changes(prompts: Tensor, masks: dict[str, Tensor], first: int) -> dict[Key, Change]:
        """From a layer on, what is not kept replaced; masks are ``[rows, layers, heads or 1]``."""

        def change(kind: str, layer: int) -> Change:
            def function(own: Tensor) -> Tensor:
                # OPT's MLPs have all prompts' positions on one axis.
                by_prompt = own if kind == "z" else own.view(len(prompts), -1, own.shape[-1])
                new = values[kind][layer].to(own).expand(batch, *by_prompt.shape[1:])[prompts]
                mask = masks[kind][:, layer]
                mask = mask[:, None, :, None] if kind == "z" else mask[:, None]
                return torch.where(mask, by_prompt, new).view(own.shape)

            return function

        return {(kind, layer): change(kind, layer) for kind in masks for layer in range(first, layers)}

    every = torch.arange(batch, device=tokens.device)
    none = {kind: torch.zeros_like(mask[:1]).expand(batch, -1, -1) for kind, mask in kept.items()}
    base = LensReplay(backend, tokens, keep.first, (), changes(every, none, 0))
    results: list[Tensor | None] = [None] * len(begins)

    def run(sets: Tensor) -> Tensor:
        start = int(begins[sets].min())
        mine = {kind: mask[sets].repeat_interleave(batch, 0) for kind, mask in kept.items()}
        positions = read.positions.repeat(len(sets))
        columns = None if read.columns is None else read.columns.repeat(len(sets), 1)
        prompts = every.repeat(len(sets))
        return base.vary(start, prompts, changes(prompts, mine, start), Read(positions, columns))

    for sets, logits, _ in in_batches(begins.argsort(descending=True), max(1, rows // batch), run):
        for one, block in zip(sets.tolist(), logits.split(batch), strict=True):
            results[one] = block
    return torch.stack([block for block in results if block is not None])
