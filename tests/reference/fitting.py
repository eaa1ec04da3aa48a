"""The objective of a fit, written out prompt by prompt, and its gradient by differences."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mechkit as mk
from mechkit.edits import Edit


def objective(model: mk.Model, task: mk.Task, edits: list[Edit], which: str, beta: float = 0.5) -> float:
    """Mean over prompts: the loss, minus the metric, or the preference over the model without edits."""
    total = 0.0
    for i in range(len(task)):
        prompt = task[[i]]
        needed = which == "preference" or prompt.metric.reads == "clean"
        edited = model.run(prompt, edits=edits).logits[0, -1].double()
        own = model.run(prompt).logits[0, -1].double() if needed else edited
        right, wrong = int(prompt.correct), int(prompt.wrong)
        if which == "loss":
            total += -float(edited.log_softmax(-1)[right])
        elif which == "metric":
            rows = edited[[right, wrong]] if prompt.metric.reads == "answers" else edited
            total += -float(prompt.metric(rows[None], prompt, own[None])[0])
        else:
            ratio, before = (float(one.log_softmax(-1)[right] - one.log_softmax(-1)[wrong]) for one in (edited, own))
            total += float(torch.tensor(1.0 + torch.e ** (-beta * (ratio - before))).log())
    return total / len(task)


def gradient(value: Callable[[torch.Tensor], float], at: torch.Tensor, step: float = 1e-2) -> torch.Tensor:
    """By central differences, a number at a time."""
    grad = torch.zeros_like(at)
    for i in range(at.numel()):
        ends = []
        for sign in (1, -1):
            moved = at.clone().reshape(-1)
            moved[i] += sign * step
            ends.append(value(moved.reshape(at.shape)))
        grad.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return grad
