"""Scores of heads by what they put out, one prompt and one head at a time, from the Hub's own modules with taps."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from .taps import tapped

Seen = dict[tuple[str, int], Tensor]


@torch.no_grad()
def seen(hub: torch.nn.Module, ids: Tensor, kinds: str = "resid mlp pattern z v") -> Seen:
    """Everything of one prompt ``[pos]``, by kind and layer, in float64, without the batch axis."""
    layers, out = hub.config.num_hidden_layers, {}

    def note(kind: str, layer: int):
        def tap(value: Tensor) -> Tensor:
            out[kind, layer] = value[0].double().clone()
            return value

        return tap

    with ExitStack() as stack:
        for kind in kinds.split():
            for layer in range(layers + (kind == "resid")):
                stack.enter_context(tapped(hub, kind, layer, note(kind, layer)))
        hub(input_ids=ids[None], use_cache=False)
    return out


def group_of(hub: torch.nn.Module, head: int, groups: int) -> int:
    return head * groups // hub.config.num_attention_heads


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def attention_received(pattern: Tensor, key: int) -> float:
    """Mean over heads and later queries; ``[heads, query, key]``."""
    later = [pattern[head, query, key] for head in range(len(pattern)) for query in range(key + 1, pattern.shape[1])]
    return float(torch.stack(later).mean()) if later else float("nan")
