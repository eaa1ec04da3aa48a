"""Which variants of a sweep run together.

1. Variants whose first changed position is the same, in prompts of the same length, share a base run from there on.
2. Two such groups are put together where running the positions that only one of them needs costs less than a base run
   of its own.
3. A group with more prompts than one base run takes is cut.
4. Within a group variants go by layer, so that a batch begins as late as it can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sites import Site
from .cells import Cell, Place

if TYPE_CHECKING:
    from ..tasks.task import Task

_SHARE = 8  # a base run takes about as long as this part of its largest size in variants' tokens


@dataclass(frozen=True, eq=False)
class Group:
    """Variants that run together.

    Attributes:
        first: the first position that runs.
        pairs: cell and prompt of each variant ``[variants, 2]``, by layer.
    """

    first: int
    pairs: Tensor


def written_at(site: Site) -> tuple[str, int]:
    """What is written, and where: the embedding is all there is in the first residual, the result all there is of z."""
    if site.kind == "embed":
        return ("resid", 0)
    return ("z" if site.kind == "result" else site.kind, site.layer)


def grouped(task: Task, cells: Sequence[Cell], masks: Mapping[Place, Tensor], base_tokens: int) -> list[Group]:
    """Variants by where they begin and how long their prompts are, few ones together."""
    active = {where: mask.any(1) for where, mask in masks.items()}
    begins = {where: mask.int().argmax(1) for where, mask in masks.items()}
    keys = torch.stack([torch.stack([begins[c.positions], task.lengths], 1) for c in cells])  # [cells, n, 2]
    pairs = torch.stack([active[cell.positions] for cell in cells]).nonzero()
    if not len(pairs):
        return []
    layers = torch.tensor([written_at(cell.site)[1] for cell in cells])
    pairs = pairs[(layers[pairs[:, 0]] * len(task) + pairs[:, 1]).argsort(stable=True)]
    found, which = keys[tuple(pairs.T)].unique(dim=0, return_inverse=True)
    groups: list[Group] = []
    first, longest, waiting = 0, 0, torch.zeros(len(pairs), dtype=torch.bool)
    for number, (begin, length) in enumerate(found.tolist()):  # begins come in order
        these = which == number
        more = max(0, length - longest) * int(waiting.sum())
        more += (max(longest, length) - first - (length - begin)) * int(these.sum())
        if bool(waiting.any()) and more > base_tokens // _SHARE:
            groups += _of_size(first, pairs[waiting], task, base_tokens)
            waiting = torch.zeros_like(waiting)
        if not bool(waiting.any()):
            first, longest = begin, 0
        longest, waiting = max(longest, length), waiting | these
    return groups + _of_size(first, pairs[waiting], task, base_tokens)


def _of_size(first: int, pairs: Tensor, task: Task, base_tokens: int) -> list[Group]:
    """A group, or several where its prompts are too many for one base run."""
    prompts = pairs[:, 1].unique()
    # Both twins of each prompt are in the base run.
    at_once = max(1, base_tokens // (2 * int(task.lengths[prompts].max())))
    return [Group(first, pairs[torch.isin(pairs[:, 1], some)]) for some in prompts.split(at_once)]
