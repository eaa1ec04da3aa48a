"""Several tasks' prompts as one task, padded at the right to one length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import TaskError
from .task import Task


def joined(tasks: Sequence[Task]) -> Task:
    """See ``Task.join``."""
    if not isinstance(tasks, Sequence) or not tasks or not all(isinstance(task, Task) for task in tasks):
        raise TaskError(f"{tasks!r} is no task", expected="a Task, or a list of them")
    if len(metrics := {task.metric.name for task in tasks}) > 1:
        raise TaskError(
            f"Tasks measured by {' and '.join(sorted(metrics))}", expected="one metric", fix="Use task.with_metric(...)"
        )
    if len(tasks) == 1:
        return tasks[0]
    width = max(task.clean.shape[1] for task in tasks)
    names = [name for name in tasks[0].spans if all(name in task.spans for task in tasks)]
    templates, after = [], 0
    for task in tasks:
        templates.append(task.templates + after)
        after = int(templates[-1].max()) + 1
    texts = [[text for task in tasks for text in task._texts[side]] for side in (0, 1)]
    whole = all(len(side) == sum(map(len, tasks)) for side in texts)
    return Task.from_tokens(
        torch.cat([_padded(task.clean, width) for task in tasks]),
        torch.cat([_padded(task.corrupt, width) for task in tasks]),
        torch.cat([task.correct for task in tasks]),
        torch.cat([task.wrong for task in tasks]),
        lengths=torch.cat([task.lengths for task in tasks]),
        spans={name: torch.cat([task.spans[name] for task in tasks]) for name in names},
        templates=torch.cat(templates),
        texts=(texts[0], texts[1]) if whole else ((), ()),
        metric=tasks[0].metric,
        name=" + ".join(task.name for task in tasks),
        meta={"tasks": [{"name": task.name, "n": len(task), **task.meta} for task in tasks]},
    )


def _padded(ids: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, width - ids.shape[1]))
