"""Scores of patterns by loops over queries and keys, as their definitions read."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def previous_token(pattern: Tensor, tokens: list[int]) -> float:
    """``pattern [query, key]`` of one head on one prompt, here and below."""
    return _mean([float(pattern[t, t - 1]) for t in range(1, len(tokens))])


def duplicate_token(pattern: Tensor, tokens: list[int]) -> float:
    found = []
    for t in range(1, len(tokens)):
        before = [s for s in range(t) if tokens[s] == tokens[t]]
        if before:
            found.append(sum(float(pattern[t, s]) for s in before))
    return _mean(found)


def induction(pattern: Tensor, tokens: list[int]) -> float:
    found = []
    for t in range(1, len(tokens)):
        behind = [s + 1 for s in range(t) if tokens[s] == tokens[t] and s + 1 < t]
        if behind:
            found.append(sum(float(pattern[t, s]) for s in behind))
    return _mean(found)


def first_token(pattern: Tensor, tokens: list[int]) -> float:
    return _mean([float(pattern[t, 0]) for t in range(1, len(tokens))])


def distance(pattern: Tensor, tokens: list[int]) -> float:
    return _mean([sum(float(pattern[t, s]) * (t - s) for s in range(t)) for t in range(1, len(tokens))])


def share(pattern: Tensor, tokens: list[int], span: tuple[int, int]) -> float:
    return _mean([float(pattern[t, slice(*span)].sum()) for t in range(span[1], len(tokens))])


def entropy(pattern: Tensor, tokens: list[int]) -> float:
    rows = [[float(p) for p in pattern[t] if p > 0] for t in range(1, len(tokens))]
    return _mean([-sum(p * math.log(p) for p in row) for row in rows])


def effective_rank(pattern: Tensor, tokens: list[int]) -> float:
    values = torch.linalg.svdvals(pattern.double())
    shares = [float(p) for p in values / values.sum() if p > 0]
    return math.exp(-sum(p * math.log(p) for p in shares))


def top_singular(pattern: Tensor, tokens: list[int]) -> float:
    values = torch.linalg.svdvals(pattern.double())
    return float(values[0] / values.sum())


def shape(pattern: Tensor, tokens: list[int], step: tuple[int, int], threshold: float = 0.04) -> float:
    large = {(t, s) for t in range(len(tokens)) for s in range(len(tokens)) if pattern[t, s] >= threshold}
    return sum((t + step[0], s + step[1]) in large for t, s in large) / len(large)


STEPS = {"diagonal": (1, 1), "vertical": (1, 0), "horizontal": (0, 1)}


def literal(name: str, pattern: Tensor, tokens: list[int], span: tuple[int, int]) -> float:
    if name in STEPS:
        return shape(pattern, tokens, STEPS[name])
    return share(pattern, tokens, span) if name == "share" else globals()[name](pattern, tokens)


def waad(patterns: Tensor, response: range, share: float = 0.3, window: int = 10) -> list[float]:
    """Of ``patterns [heads, query, key]`` of one prompt; a number a token."""
    local = _by_distance(patterns, response)[: max(1, round(share * len(patterns)))]
    mean = patterns[local].mean(0)
    return [
        sum(float(mean[t, s]) * min(t - s, window) for s in range(t + 1)) if t in response else 0.0
        for t in range(len(mean))
    ]


def fai(
    patterns: Tensor, response: range, share: float = 0.3, near: int = 10, far: int = 50, skip: int = 1
) -> list[float]:
    far_heads = _by_distance(patterns, response)[-max(1, round(share * len(patterns))) :]
    mean = patterns[far_heads].mean(0)
    found = []
    for s in range(len(mean)):
        later = [float(mean[t, s]) for t in response if s + near <= t <= s + far]
        found.append(_mean(later) if later and s >= skip else 0.0)
    return found


def _by_distance(patterns: Tensor, response: range) -> list[int]:
    spans = [_mean([sum(float(one[t, s]) * (t - s) for s in range(t)) for t in response if t > 0]) for one in patterns]
    return sorted(range(len(spans)), key=spans.__getitem__)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
