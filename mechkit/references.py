"""Activations of a reference task's corrupt prompts, for mean and resample ablation.

1. Run the corrupt prompts once and record every site the edit names.
2. ``mean``: average the prompts of each template, position by position. When the run is of a task, each of its
   prompts gets the means of its own template; a free prompt gets the mean over all prompts and positions.
3. ``resample``: row i of the run gets the values of row i of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .backends.protocol import Read
from .backends.window import Window
from .edits import Ablate, Edit, PatchIn
from .errors import EditError
from .sites import Site

if TYPE_CHECKING:
    from .model import Model
    from .tasks.task import Task


@dataclass(frozen=True, eq=False)
class TemplateMeans:
    """Means over a task's corrupt prompts.

    Attributes:
        values: ``[templates, pos, ...]`` by (kind, layer), in the layouts of ``backends.protocol``.
        templates: the template numbers ``[templates]``, in the order of the first axis.
        lengths: tokens of the prompts of each template ``[templates]``.
        counts: prompts of each template ``[templates]``.
    """

    values: dict[tuple[str, int], Tensor]
    templates: Tensor
    lengths: Tensor
    counts: Tensor

    def rows(self, key: tuple[str, int], task: Task) -> Tensor:
        """The means for each prompt of ``task``: ``[n, pos, ...]``.

        Raises:
            EditError: a prompt's template is not in the reference, or its length differs.
        """
        means = self.values[key]
        match = task.templates[:, None] == self.templates[None]
        if not bool(match.any(1).all()):
            missing = int((~match.any(1)).nonzero()[0])
            raise EditError(
                f'Prompt {missing} of "{task.name}" has a template that the reference has no prompts of',
                fix="Take a reference with the same templates, such as the task itself",
            )
        which = match.int().argmax(1)
        if bool((self.lengths[which] != task.lengths).any()):
            odd = int((self.lengths[which] != task.lengths).nonzero()[0])
            raise EditError(
                f'Prompt {odd} of "{task.name}" has {int(task.lengths[odd])} tokens, and the reference prompts of its '
                f"template {int(self.lengths[which[odd]])}",
                expected="a reference made in the same way as the task",
            )
        return means[which.to(means.device), : task.clean.shape[1]]


def corrupt_activations(model: Model, task: Task, sites: list[Site]) -> dict[tuple[str, int], Tensor]:
    """Whole tensors ``[n, pos, ...]`` of the corrupt prompts, by (kind, layer)."""
    return dict(model.backend.forward(task.corrupt, record=sites, read=_nothing(task)).recorded)


def template_means(model: Model, task: Task, sites: list[Site]) -> TemplateMeans:
    """Means over the corrupt prompts of each template, at each position."""
    activations = corrupt_activations(model, task, sites)
    numbers, index = task.templates.unique(return_inverse=True)
    counts = index.bincount()
    means = {}
    for key, values in activations.items():
        total = values.new_zeros(len(numbers), *values.shape[1:]).index_add_(0, index.to(values.device), values)
        means[key] = total / counts.to(values).view(-1, *[1] * (values.ndim - 1))
    lengths = torch.stack([task.lengths[index == i].max() for i in range(len(numbers))])
    return TemplateMeans(means, numbers, lengths, counts)


def with_values(model: Model, edit: Ablate, task: Task | None) -> Edit:
    """The edit with its values: a ``PatchIn`` in place of a mean or resample ablation.

    Raises:
        EditError: means of patterns asked for a free prompt, or a resample of another number of rows.
    """
    if edit.mode in ("zero", "uniform") or edit.reference is None:
        return edit
    sites = list(edit.sites)
    for one in sites:
        model.info.check(one)
    if edit.mode == "resample":
        source = corrupt_activations(model, edit.reference, sites)
        if task is not None and len(task) != len(edit.reference):
            raise EditError(
                f"Resampling {len(task)} prompts from {len(edit.reference)}",
                expected="as many reference prompts",
            )
    else:
        means = template_means(model, edit.reference, sites)
        if task is None:
            source = {key: _over_everything(key, means) for key in means.values}
        else:
            source = {key: means.rows(key, task) for key in means.values}
    return PatchIn(edit.sites, edit.positions, {one: _of(source, one, edit, model, task) for one in sites})


def _of(source: dict[tuple[str, int], Tensor], site: Site, edit: Ablate, model: Model, task: Task | None) -> Tensor:
    tensor = source[site.kind, site.layer]
    if site.head is not None:
        slot = model.info.slot(site)
        tensor = tensor[:, slot] if site.kind in ("pattern", "scores") else tensor[..., slot, :]
    if not isinstance(edit.positions, tuple) or tensor.ndim < 3:
        return tensor  # a mask picks from values at every position
    lengths = task.lengths if task is not None else torch.full((len(tensor),), tensor.shape[1])
    rows, _ = Window(lengths, growing=True).rows(edit.positions, tensor.shape[1], f'"{site}"')
    return tensor[torch.arange(len(tensor))[:, None].to(tensor.device), rows.to(tensor.device)]


def _over_everything(key: tuple[str, int], means: TemplateMeans) -> Tensor:
    """One mean over all prompts and their positions: ``[heads, d_head]`` or ``[d_model]``."""
    if key[0] in ("pattern", "scores"):
        raise EditError(
            f"The mean {key[0]} of layer {key[1]} over prompts of other lengths",
            fix="Run the task's own prompts",
        )
    values = means.values[key]
    real = torch.arange(values.shape[1])[None] < means.lengths[:, None]
    weight = (means.counts[:, None] * real).to(values)
    return (values * weight.view(*weight.shape, *[1] * (values.ndim - 2))).sum((0, 1)) / weight.sum()


def _nothing(task: Task) -> Read:
    """The least a run can give: one column."""
    return Read(task.answer_positions, task.answers[:, :1])
