"""Heads taken out one by one, each in a whole pass of the Hub's own model. Knows nothing of mechkit's engine."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .patching import run_changed

Heads = Iterable[tuple[int, int]]


def without(model: torch.nn.Module, tokens: Tensor, heads: Heads, how: str, given: dict | None = None) -> Tensor:
    """Logits ``[batch, pos, vocab]`` with some heads out; ``given`` has values ``[batch, pos, d_head]`` by head."""
    changes = {}
    for layer, head in heads:
        kind = {"uniform": "scores", "no query": "q"}.get(how, "z")
        before = changes.get((kind, layer))

        def change(own: Tensor, head=head, layer=layer, before=before) -> Tensor:
            own = own if before is None else before(own)
            if how == "uniform":  # every score that is not the mask's the same
                seen = own[:, head] > torch.finfo(own.dtype).min / 2
                own[:, head] = torch.where(seen, torch.zeros_like(own[:, head]), own[:, head])
            elif given is None:
                own[:, :, head] = 0
            else:
                own[:, :, head] = given[layer, head]
            return own

        changes[kind, layer] = change
    return run_changed(model, tokens, changes)


def mean_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token loss of each prompt ``[batch]``, position by position."""
    logp = logits.log_softmax(-1)
    n, length = tokens.shape
    losses = [[-logp[i, t, tokens[i, t + 1]] for t in range(length - 1)] for i in range(n)]
    return torch.tensor(losses).mean(1)


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(base || other) of next-token distributions given by logits ``[batch, vocab]``."""
    p, q = base.softmax(-1), other.softmax(-1)
    return (p * (p / q).log()).sum(-1)


@torch.no_grad()
def largest_angle(a: Tensor, b: Tensor, rank: int, side: str) -> float:
    """Degrees between the top singular subspaces of two matrices, by the cosines of the principal angles."""
    u, v = (torch.linalg.svd(x.double()) for x in (a, b))
    p, q = (s.U[:, :rank] if side == "samples" else s.Vh[:rank].T for s in (u, v))
    cosines = torch.linalg.svdvals(p.T @ q).clamp(max=1)
    return float(torch.rad2deg(torch.acos(cosines.min())))
