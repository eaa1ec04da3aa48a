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


def written(hub: torch.nn.Module, model, layer: int, head: int, z: Tensor) -> Tensor:
    """z W_O of one head."""
    times = getattr(hub.config, "residual_multiplier", 1.0)
    return z @ model.bridge.blocks[layer].attn.W_O[head].detach().double() * times


def semantic_distances(hub: torch.nn.Module, model, ids: Tensor, window: int, keys: int, pool: int) -> Tensor:
    """Distance of what each head writes to the mean of its layer's ``[layers, heads]``, one number at a time."""
    own, rows, n = seen(hub, ids, "pattern v"), [], len(ids)
    for layer in range(model.n_layers):
        vectors = []
        for head in range(model.n_heads):
            weights = own["pattern", layer][head, max(0, n - window) :]  # [query, key]
            looked = weights.mean(0)
            near = [looked[max(0, j - pool // 2) : j + pool // 2 + 1].mean() for j in range(n)]
            best = sorted(range(n), key=lambda j: -near[j])[:keys]
            value = own["v", layer][:, group_of(hub, head, model.n_kv_heads)]
            moved = sum(looked[j] * value[j] for j in best)
            vectors.append(written(hub, model, layer, head, moved))
        centre = sum(vectors) / len(vectors)
        rows.append(torch.stack([(one - centre).norm() for one in vectors]))
    return torch.stack(rows)


def divergences(hub: torch.nn.Module, longer: Tensor, shorter: Tensor, last: int, distance: str) -> Tensor:
    """Distances ``[last, layers, heads]`` of z in two runs at their last tokens."""
    sides = [seen(hub, ids, "z") for ids in (longer, shorter)]
    layers, heads = hub.config.num_hidden_layers, hub.config.num_attention_heads
    out = torch.zeros(last, layers, heads, dtype=torch.double)
    for back in range(1, last + 1):
        for layer in range(layers):
            for head in range(heads):
                a, b = (side["z", layer][-back, head] for side in sides)
                found = {"l2": (a - b).norm(), "cosine": 1 - cosine(a, b), "relative": (a - b).norm() / a.norm()}
                out[last - back, layer, head] = found[distance]
    return out


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of ``[n, a]`` and ``[n, b]``."""
    x, y = (one - one.mean(0) for one in (x, y))
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """The distance, to base 2, of two distributions."""
    middle = (p + q) / 2
    parts = [sum(float(a * (a / m).log2()) for a, m in zip(one, middle, strict=True) if a > 0) for one in (p, q)]
    return max(0.0, sum(parts) / 2) ** 0.5


def likenesses(a: Tensor, b: Tensor, measure: str) -> float:
    """Of outputs ``[n, d_head]``, patterns ``[n, key]`` or matrices."""
    if measure == "cka":
        return cka(a, b)
    if measure == "js":
        return 1 - sum(jensen_shannon(p, q) for p, q in zip(a, b, strict=True)) / len(a)
    return cosine(a.flatten(), b.flatten())
