"""Numbers of a pattern that are no weighted sums of it: entropy, rank, shape.

    entropy          mean over queries of -sum p log p, in nats
    effective_rank   exp of the entropy of the pattern's singular values, divided by their sum
    top_singular     the largest singular value's share of their sum
    diagonal, vertical, horizontal   of the entries above a threshold, the share whose neighbour (one query and one key
                     on; the next query; the next key) is above it too

Roy and Vetterli 2007 for the effective rank; arXiv 2604.12128 for its use; for shapes, the head filter of
Attention-Aware Intervention. All of them depend on how long the prompt is: compare prompts of one length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SINGULAR = ("effective_rank", "top_singular")
SHAPES = ("diagonal", "vertical", "horizontal")


def entropy(pattern: Tensor, queries: Tensor) -> Tensor:
    """Nats ``[n, heads]`` of patterns ``[n, heads, query, key]``, mean over ``queries [n, query]``."""
    each = torch.special.entr(pattern).sum(-1)
    count = queries.sum(-1)
    return (each * queries[:, None]).sum(-1) / torch.where(count > 0, count, torch.nan)[:, None]


def singular(pattern: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """``effective_rank`` and ``top_singular`` ``[n, heads]``, each of the prompt's own square."""
    found: list[tuple[Tensor, Tensor]] = []
    for one, length in zip(pattern, lengths.tolist(), strict=True):
        values = torch.linalg.svdvals(one[:, :length, :length].float())
        share = values / values.sum(-1, keepdim=True)
        found.append((torch.special.entr(share).sum(-1).exp(), share[:, 0]))
    ranks, tops = zip(*found, strict=True)
    return {"effective_rank": torch.stack(ranks), "top_singular": torch.stack(tops)}


def shapes(pattern: Tensor, real: Tensor, threshold: float) -> dict[str, Tensor]:
    """Shares ``[n, heads]`` by shape; NaN where nothing is above the threshold."""
    large = (pattern >= threshold) & real[:, None, :, None]
    total = large.sum((-1, -2))
    count = torch.where(total > 0, total, torch.nan)
    pairs: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "diagonal": lambda: (large[..., 1:, 1:], large[..., :-1, :-1]),
        "vertical": lambda: (large[..., 1:, :], large[..., :-1, :]),
        "horizontal": lambda: (large[..., 1:], large[..., :-1]),
    }
    found = {}
    for name, halves in pairs.items():
        one, other = halves()
        found[name] = (one & other).sum((-1, -2)) / count
    return found
