"""Weights of heads as in a textbook: dense ``d_model`` by ``d_model`` matrices, their SVD, and composition of these.

Takes the tensors W_Q, W_K, W_V and W_O of anything that has them; what is drawn at random is drawn, many times. All in
float64. Heads are (layer, head).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Head = tuple[int, int]


def group(weights: Any, head: Head) -> Head:
    """Where a head's key and value are."""
    layer, number = head
    share = weights.W_Q.shape[1] // weights.W_K.shape[1]
    return layer, number // share


def ov(weights: Any, head: Head) -> Tensor:
    """W_V W_O ``[d_model, d_model]``."""
    return weights.W_V[group(weights, head)].double() @ weights.W_O[head].double()


def qk(weights: Any, head: Head, turns: Tensor | None = None) -> Tensor:
    """W_Q T W_K^T ``[d_model, d_model]``, T of ``[layers, heads, d_head, d_head]``."""
    query, key = weights.W_Q[head].double(), weights.W_K[group(weights, head)].double()
    return query @ key.T if turns is None else query @ turns[head].double() @ key.T


def reader(weights: Any, head: Head, kind: str, turns: Tensor | None = None) -> Tensor:
    """What reads the stream on its left for a head's query, key or value."""
    if kind == "v":
        return ov(weights, head)
    matrix = qk(weights, head, turns)
    return matrix if kind == "q" else matrix.T


def rank_one(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The matrices ``s_i u_i v_i^T`` whose sum is a matrix, ``[rank, d, d]``, the largest first; and the s_i."""
    u, s, vh = torch.linalg.svd(matrix)
    return torch.stack([s[i] * torch.outer(u[:, i], vh[i]) for i in range(rank)]), s[:rank]


def composition(first: Tensor, second: Tensor) -> float:
    """``|A B| / (|A| |B|)``."""
    return float((first @ second).norm() / (first.norm() * second.norm()))


def by_component(first: Tensor, second: Tensor, rank: int) -> list[float]:
    """The same of each rank-one part of the first."""
    return [composition(part, second) for part in rank_one(first, rank)[0]]


def without_mean(d: int) -> Tensor:
    """An orthonormal basis of what has no mean, as rows ``[d - 1, d]``."""
    return torch.linalg.svd(torch.ones(1, d, dtype=torch.double))[2][1:]


def turned(d: int, n: int, draw: torch.Generator) -> Tensor:
    """Random orthogonal matrices, drawn evenly ``[n, d, d]``."""
    q, r = torch.linalg.qr(torch.randn(n, d, d, generator=draw, dtype=torch.double))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]


def of_random_directions(second: Tensor, n: int, seed: int = 0, basis: Tensor | None = None) -> Tensor:
    """``|v^T B|^2 / |B|^2`` of unit vectors drawn evenly from the sphere, or from what a basis spans ``[n]``."""
    d = len(second) if basis is None else len(basis)
    v = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    v = v / v.norm(dim=-1, keepdim=True)
    v = v if basis is None else v @ basis
    return (v @ second).square().sum(-1) / second.square().sum()


def of_random_matrices(first: Tensor, second: Tensor, n: int, seed: int = 0, basis: Tensor | None = None) -> Tensor:
    """``|A Q B|^2 / (|A|^2 |B|^2)`` of Q drawn evenly from the rotations of the space, or of what a basis spans."""
    if basis is not None:
        first, second = first @ basis.T, basis @ second
    q = turned(len(second), n, torch.Generator().manual_seed(seed))
    return (first @ q @ second).square().sum((-1, -2)) / (first.square().sum() * second.square().sum())
