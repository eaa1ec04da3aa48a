"""Vectors of heads, to put in or to add: what heads have where a task is done, and how that differs from its twin.

1. Task vector: the mean of z at one position, the last one by default, over prompts that show the task.
2. Steering vector: the mean of z over the clean prompts less that over the corrupt ones, at the answer position. With
   ``scaled`` its direction, times the standard deviation of all these z along it: how far heads move by themselves.

Both go into edits as they are: ``mk.patch_in(vectors, vectors)``, or ``mk.steer("9.9", vectors[mk.site("9.9")])``.

Todd et al. 2024 (arXiv 2310.15213) for task vectors by head; Li et al. 2023 (arXiv 2306.03341), section 3, for steering
along the mean difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import PromptError, TaskError
from ..prompts import as_batch, check_task
from ..sites import Site, SitesLike
from ..tasks.task import Task
from .passes import head_vectors

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts

_NOTHING = 1e-12


def task_vectors(
    model: Model, data: Prompts, *, heads: SitesLike | None = None, positions: int | str = -1
) -> dict[Site, Tensor]:
    """What each head has at a position, the mean over prompts.

    Args:
        model: any.
        data: text, texts, ids ``[batch, pos]``, or a task (its clean prompts).
        heads: only these; left out: all.
        positions: a position from 0, or from each prompt's end when negative; or, of a task, a span, over whose tokens
            the mean is taken too.

    Returns:
        ``[d_head]`` by head.

    Raises:
        PromptError: a position outside a prompt.
        TaskError: a span that the task does not have, or a span of no task.
        SiteError: a head that is not there.
    """
    chosen = list(model.heads(heads))
    tokens, lengths = as_batch(model, data)
    z = head_vectors(model, tokens, lengths, _placed(data, lengths, positions))  # [n, m, layers, heads, d_head]
    mean = z.nanmean(1).mean(0)
    return {one: mean[one.layer, one.head or 0] for one in chosen}


def steering_vectors(
    model: Model, task: Task, *, heads: SitesLike | None = None, scaled: bool = True
) -> dict[Site, Tensor]:
    """How each head's output at the answer position differs between clean and corrupt prompts.

    Args:
        model: any.
        task: whose pairs are compared.
        heads: only these; left out: all.
        scaled: the direction of the difference, as long as the standard deviation of z along it; else the difference.

    Returns:
        ``[d_head]`` by head; zeros where there is no difference.

    Raises:
        PromptError, SiteError: as of ``task_vectors``.
        TaskError: something that is no task.
    """
    chosen = list(model.heads(heads))
    clean, corrupt = pair_vectors(model, task)
    found = differences(clean, corrupt, scaled)
    return {one: found[one.layer, one.head or 0] for one in chosen}


def differences(clean: Tensor, corrupt: Tensor, scaled: bool) -> Tensor:
    """Point 2 of the module: ``[n, layers, heads, d_head]`` of both sides to ``[layers, heads, d_head]``."""
    mean = clean.mean(0) - corrupt.mean(0)
    if not scaled:
        return mean
    size = torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    direction = mean / size.clamp_min(_NOTHING)
    along = (torch.cat([clean, corrupt]) * direction).sum(-1)
    return direction * along.std(0)[..., None]


def pair_vectors(model: Model, task: Task, kind: str = "z") -> tuple[Tensor, Tensor]:
    """What heads have at the answer position, of clean and corrupt prompts ``[n, layers, heads, d_head]``.

    Raises:
        TaskError: something that is no task.
    """
    if not isinstance(task, Task):
        raise TaskError(f"{type(task).__name__} in place of a task", expected="pairs of prompts, as of mk.tasks.ioi")
    check_task(model, task)
    ends = task.answer_positions[:, None]
    clean, corrupt = (head_vectors(model, ids, task.lengths, ends, kind)[:, 0] for ids in (task.clean, task.corrupt))
    return clean, corrupt


def _placed(data: Prompts, lengths: Tensor, positions: int | str) -> Tensor:
    """Positions of each prompt ``[n, m]``, -1 where a prompt has fewer."""
    if isinstance(positions, str):
        if not isinstance(data, Task):
            raise TaskError(f'The span "{positions}" of prompts that are no task', expected="a task, or a position")
        where = data.span(positions)
        at = where[:, :1] + torch.arange(int((where[:, 1] - where[:, 0]).max()))
        return torch.where(at < where[:, 1:], at, -1)
    at = torch.full_like(lengths, positions) + (lengths if positions < 0 else 0)
    if bool(((at < 0) | (at >= lengths)).any()):
        raise PromptError(f"Position {positions} in a prompt of {int(lengths.min())} tokens")
    return at[:, None]
