"""Edits as their definitions say, one prompt, head and query at a time, on recorded scores, patterns and z."""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

HIDDEN = -1e30


def previous(pattern: Tensor, scores: Tensor) -> Tensor:
    """Every query looks at the key before it, the first one at itself; so does one that does not see that key."""
    out = torch.zeros_like(pattern)
    for b, query in _rows(pattern):
        sees = query > 0 and scores[b, query, query - 1] > HIDDEN
        out[b, query, query - 1 if sees else query] = 1
    return out


def with_median(scores: Tensor, times: float, queries: list[int], keys: list[int]) -> Tensor:
    """Scores with the median of all that a prompt's queries see added at some places (the lower of two)."""
    out = scores.clone()
    for b in range(len(scores)):
        middle = statistics.median_low(value for value in scores[b].flatten().tolist() if value > HIDDEN)
        for query in queries:
            for key in keys:
                if scores[b, query, key] > HIDDEN:
                    out[b, query, key] += times * middle
    return out


def sink_tuned(pattern: Tensor, gamma: float, unseen: Tensor | None = None) -> Tensor:
    """Attention to key 0 times gamma, rows then made to add up to what they added up to.

    ``unseen`` is the attention of each row that goes to no key ``[batch, query]``, where there is a sink.
    """
    out = pattern.clone()
    for b, query in _rows(pattern):
        rest = 0.0 if unseen is None else float(unseen[b, query])
        row = pattern[b, query].clone()
        row[0] = row[0] * gamma
        out[b, query] = row / (float(row.sum()) + rest)
    return out


def redistributed(
    pattern: Tensor, keys: list[int], to: list[int], keep: float, least: float, most: float, queries: list[int]
) -> Tensor:
    """Part of the attention to ``keys`` given to the others of ``to``, in proportion to what they have."""
    out = pattern.clone()
    for b, query in _rows(pattern):
        row = pattern[b, query]
        looked = math.fsum(float(row[key]) for key in to)
        sunk = math.fsum(float(row[key]) for key in to if key in keys)
        gaining = [key for key in to if key not in keys]
        has = math.fsum(float(row[key]) for key in gaining)
        if query not in queries or has == 0 or looked < least or sunk / looked > most:
            continue
        freed = math.fsum((1 - keep) * float(row[key]) for key in keys)
        for key in keys:
            out[b, query, key] = keep * row[key]
        for key in gaining:
            out[b, query, key] = row[key] + freed * row[key] / has
    return out


def only_top(z: Tensor, written: Tensor, heads: list[int], k: int) -> Tensor:
    """z ``[batch, pos, heads, d_head]`` without all but the k heads whose ``written`` vector is longest."""
    out = z.clone()
    for b in range(z.shape[0]):
        for position in range(z.shape[1]):
            lengths = {head: float(written[b, position, head].norm()) for head in heads}
            for head in sorted(heads, key=lambda head: -lengths[head])[k:]:
                out[b, position, head] = 0
    return out


def _rows(pattern: Tensor):
    return ((b, query) for b in range(pattern.shape[0]) for query in range(pattern.shape[1]))
