"""What edits mean for one model and the prompts it is to run.

1. A query head's key or value is that of its group, on a model whose heads share them; this is said.
2. The name of a span becomes the positions at which it stands in each prompt of the task.
3. Means and resampled values are taken from their reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .edits import Ablate, Edit, at_masks, moved
from .errors import EditError, MechkitWarning
from .references import with_values

if TYPE_CHECKING:
    from .model import Model
    from .tasks.task import Task


def resolved(model: Model, edits: Sequence[Edit], task: Task | None) -> list[Edit]:
    """See ``Model.resolved``."""
    done = []
    for edit in [edits] if isinstance(edits, Edit) else edits:
        if not isinstance(edit, Edit):
            raise EditError(f"{edit!r} is no edit", expected="what mk.ablate, mk.scale and their like make")
        placed = at_masks(_of_groups(model, edit), partial(_span_mask, task))
        done.append(with_values(model, placed, task) if isinstance(placed, Ablate) else placed)
    return done


def _of_groups(model: Model, edit: Edit) -> Edit:
    own = {site: model.info.shared(model.info.check(site)) for site in edit.sites}
    shared = {site: group for site, group in own.items() if site != group}
    if not shared:
        return edit
    warnings.warn(
        f"Heads of {model.name} share their keys and values: editing "
        + ", ".join(f'"{site}" edits "{group}"' for site, group in shared.items()),
        MechkitWarning,
        stacklevel=5,
    )
    return moved(edit, own)


def _span_mask(task: Task | None, name: str) -> Tensor:
    """Where a span stands ``[n, pos]``, boolean."""
    if task is None:
        raise EditError(f'The span "{name}" in a run of free prompts', fix="Run a task, or give positions as numbers")
    first, last = task.span(name).T[..., None]
    positions = torch.arange(task.clean.shape[1])
    return (positions >= first) & (positions < last)
