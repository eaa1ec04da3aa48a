"""Metrics: what a prompt's logits say about the task, one number a prompt.

    logit_diff   logit of the correct answer less that of the wrong one                 logits
    prob         probability of the correct answer                                      probability
    loss         minus the log-probability of the correct answer                        nats
    kl           KL divergence from the clean run's next-token distribution to this one's   nats

Every metric reads one row of logits a prompt: the one at its answer position. ``logit_diff`` needs two columns
of it, the others all of them; the engine reads no more than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from .errors import MetricError

if TYPE_CHECKING:
    from torch import Tensor

    from .tasks.task import Task

MetricFunction: TypeAlias = "Callable[[Tensor, Task], Tensor]"


@dataclass(frozen=True, eq=False)
class Metric:
    """A named function of a prompt's logits.

    Attributes:
        name: as in the module's table, or the function's own name.
        unit: of its values.
        reads: ``"answers"`` when it needs only the logits of the correct and wrong answers (in that order),
            ``"vocab"`` when it needs the whole row, ``"clean"`` when it needs the clean run's row as well.
        function: ``(logits, task[, clean_logits]) -> values``; logits are ``[n, 2]`` for ``"answers"``, else
            ``[n, vocab]``; values are ``[n]``.
    """

    name: str
    unit: str
    reads: Literal["answers", "vocab", "clean"]
    function: Callable[..., Tensor]

    def __call__(self, logits: Tensor, task: Task, clean: Tensor | None = None) -> Tensor:
        """Values ``[n]`` from the rows this metric reads; see ``reads``.

        Raises:
            MetricError: the function gave another shape, or a value that is not finite.
        """
        args = (logits, task, clean) if self.reads == "clean" else (logits, task)
        values = self.function(*args)
        if not isinstance(values, torch.Tensor) or values.shape != (len(task),):
            shape = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise MetricError(
                f'Metric "{self.name}" gave {shape} for {len(task)} prompts',
                expected=f"a tensor of shape [{len(task)}], one number a prompt",
                fix="Do not average inside the metric",
            )
        if not bool(torch.isfinite(values).all()):
            bad = int((~torch.isfinite(values)).nonzero()[0])
            raise MetricError(
                f'Metric "{self.name}" gave {values[bad].item()} on prompt {bad}', expected="finite numbers"
            )
        return values.float()


def _logit_diff(answers: Tensor, task: Task) -> Tensor:
    return answers[:, 0] - answers[:, 1]


def _prob(logits: Tensor, task: Task) -> Tensor:
    return logits.float().softmax(-1).gather(-1, task.correct[:, None].to(logits.device))[:, 0]


def _loss(logits: Tensor, task: Task) -> Tensor:
    return -logits.float().log_softmax(-1).gather(-1, task.correct[:, None].to(logits.device))[:, 0]


def _kl(logits: Tensor, task: Task, clean: Tensor) -> Tensor:
    here, there = logits.float().log_softmax(-1), clean.float().log_softmax(-1)
    return (there.exp() * (there - here)).sum(-1)


METRICS = {
    metric.name: metric
    for metric in (
        Metric("logit_diff", "logits", "answers", _logit_diff),
        Metric("prob", "probability", "vocab", _prob),
        Metric("loss", "nats", "vocab", _loss),
        Metric("kl", "nats", "clean", _kl),
    )
}


def metric(which: str | Metric | MetricFunction) -> Metric:
    """The metric of that name, or one made of a function ``(logits [n, vocab], task) -> values [n]``."""
    if isinstance(which, Metric):
        return which
    if isinstance(which, str):
        if which not in METRICS:
            raise MetricError(
                f"Metric {which!r}",
                expected="one of " + ", ".join(METRICS) + ", or a function (logits, task)",
            )
        return METRICS[which]
    if callable(which):
        return Metric(getattr(which, "__name__", "metric"), "", "vocab", which)
    raise MetricError(f"{which!r} is no metric", expected="a name or a function (logits, task)")


def answer_rows(logits: Tensor, task: Task) -> Tensor:
    """The row of logits at each prompt's answer position: ``[n, pos, vocab]`` to ``[n, vocab]``."""
    return logits[torch.arange(len(task), device=logits.device), task.answer_positions.to(logits.device)]


def _from_logits(name: str) -> MetricFunction:
    def values(logits: Tensor, task: Task) -> Tensor:
        rows = answer_rows(logits, task) if logits.ndim == 3 else logits
        chosen = METRICS[name]
        if chosen.reads == "answers":
            rows = rows.gather(-1, task.answers.to(rows.device))
        return chosen(rows, task)

    values.__name__ = name
    values.__doc__ = f"``{name}`` of each prompt ``[n]``, from logits ``[n, pos, vocab]`` or ``[n, vocab]``."
    return values


logit_diff, prob, loss = (_from_logits(name) for name in ("logit_diff", "prob", "loss"))


def kl(logits: Tensor, task: Task, clean: Tensor) -> Tensor:
    """``kl`` of each prompt ``[n]``; ``logits`` and ``clean`` are ``[n, pos, vocab]`` or ``[n, vocab]``."""
    here, there = (answer_rows(x, task) if x.ndim == 3 else x for x in (logits, clean))
    return METRICS["kl"](here, task, there)
