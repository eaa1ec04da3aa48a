"""Metrics: what a prompt's logits say about the task, one number a prompt.

    logit_diff   logit of the correct answer less that of the wrong one                 logits
    prob         probability of the correct answer                                      probability
    loss         minus the log-probability of the correct answer                        nats
    kl           KL divergence from the clean run's next-token distribution to this one's   nats
    correct_rate 1 where the correct answer has the largest logit of the vocabulary, else 0    rate
    wrong_rate   1 where the wrong answer has it, else 0                                 rate

Every metric reads one row of logits a prompt: the one at its answer position. ``logit_diff`` needs two columns
of it, the others all of them; the engine reads no more than that.

Three more are made of the tokens that may be chosen, c, with p(c) their probability in the whole vocabulary:

    choice_mass(choices)      the sum of p(c): how much of the answer is a valid one     probability
    choice_accuracy(choices)  1 where the correct answer has the largest p(c), else 0    rate
    surface_bound(choices)    1 where 1 - mass < p(best c) - p(second c), else 0: even if all that went to
                              other words for the second had gone to it, the best would stay the best   rate

Wiegreffe et al. 2023 (arXiv 2305.14596) for the last three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


def _correct_rate(logits: Tensor, task: Task) -> Tensor:
    return (logits.argmax(-1) == task.correct.to(logits.device)).float()


def _wrong_rate(logits: Tensor, task: Task) -> Tensor:
    return (logits.argmax(-1) == task.wrong.to(logits.device)).float()


METRICS = {
    metric.name: metric
    for metric in (
        Metric("logit_diff", "logits", "answers", _logit_diff),
        Metric("prob", "probability", "vocab", _prob),
        Metric("loss", "nats", "vocab", _loss),
        Metric("kl", "nats", "clean", _kl),
        Metric("correct_rate", "rate", "vocab", _correct_rate),
        Metric("wrong_rate", "rate", "vocab", _wrong_rate),
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


# -- metrics of given choices -----------------------------------------------------------------------------------------


def choice_mass(choices: Tensor, prompts: Task | None = None) -> Metric:
    """A metric: the probability that the next token is one of the choices.

    Args:
        choices: token ids ``[k]``, the same for every prompt; or ``[n, k]``, a row a prompt of ``prompts``.
        prompts: the task whose prompts the rows belong to; parts of it find their own rows.

    Raises:
        MetricError: no choices, fewer than two, the same one twice, or rows without their prompts.
    """
    return _of_choices("choice_mass", "probability", _choice_mass, choices, prompts)


def choice_accuracy(choices: Tensor, prompts: Task | None = None) -> Metric:
    """A metric: 1 where the correct answer is the likeliest of the choices, else 0; see ``choice_mass``.

    Measuring raises a MetricError where the correct answer of a prompt is none of its choices.
    """
    return _of_choices("choice_accuracy", "rate", _choice_accuracy, choices, prompts)


def surface_bound(choices: Tensor, prompts: Task | None = None) -> Metric:
    """A metric: 1 where other words for the choices cannot have changed which is likeliest, else 0; see the module.

    Args and errors as of ``choice_mass``.
    """
    return _of_choices("surface_bound", "rate", _surface_bound, choices, prompts)


@dataclass(frozen=True, eq=False)
class _Choices:
    """Token ids that may be chosen: ``shared [k]`` by all prompts, or ``rows`` by the ids of a prompt."""

    shared: Tensor | None
    rows: dict[tuple[int, ...], Tensor]

    def of(self, task: Task) -> Tensor:
        """``[n, k]``."""
        if self.shared is not None:
            return self.shared.expand(len(task), -1)
        prompts = _ids(task)
        if strange := [i for i, ids in enumerate(prompts) if ids not in self.rows]:
            raise MetricError(
                f'Prompt {strange[0]} of "{task.name}" has no row of choices',
                expected="prompts of the task that the choices were given for",
            )
        return torch.stack([self.rows[ids] for ids in prompts])


def _ids(task: Task) -> list[tuple[int, ...]]:
    return [tuple(ids[:n]) for ids, n in zip(task.clean.tolist(), task.lengths.tolist(), strict=True)]


def _of_choices(name: str, unit: str, function: Callable[..., Tensor], choices: Tensor, prompts: Task | None) -> Metric:
    ids = torch.as_tensor(choices)
    if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool or ids.shape[-1] < 2:
        raise MetricError(f"Choices {ids.dtype} of shape {list(ids.shape)}", expected="two token ids or more a prompt")
    if any(len(row.unique()) < len(row) for row in ids.reshape(-1, ids.shape[-1])):
        raise MetricError(f"{name} of choices with the same token twice", expected="each token once")
    if ids.ndim == 1:
        return Metric(name, unit, "vocab", partial(function, _Choices(ids, {})))
    if prompts is None or len(prompts) != len(ids):
        given = "no prompts" if prompts is None else f"{len(prompts)} prompts"
        raise MetricError(
            f"{len(ids)} rows of choices and {given}", expected="a row a prompt", fix="Pass the task as prompts="
        )
    rows: dict[tuple[int, ...], Tensor] = {}
    for i, (prompt, row) in enumerate(zip(_ids(prompts), ids, strict=True)):
        if not torch.equal(rows.setdefault(prompt, row), row):
            raise MetricError(f"Prompt {i} is there twice, with other choices", expected="one row a prompt")
    return Metric(name, unit, "vocab", partial(function, _Choices(None, rows)))


def _of_each(choices: _Choices, logits: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """The ids of the choices and their probabilities, ``[n, k]`` each."""
    ids = choices.of(task).to(logits.device)
    return ids, logits.float().softmax(-1).gather(-1, ids)


def _choice_mass(choices: _Choices, logits: Tensor, task: Task) -> Tensor:
    return _of_each(choices, logits, task)[1].sum(-1)


def _choice_accuracy(choices: _Choices, logits: Tensor, task: Task) -> Tensor:
    ids, _ = _of_each(choices, logits, task)
    correct = task.correct[:, None].to(ids)
    if not bool((ids == correct).any(-1).all()):
        odd = int((ids != correct).all(-1).nonzero()[0])
        raise MetricError(
            f"The correct answer of prompt {odd}, token {int(correct[odd])}, is none of its choices",
            expected="choices among which the answer is",
        )
    best = ids.gather(-1, logits.gather(-1, ids).argmax(-1, keepdim=True))
    return (best == correct)[:, 0].float()


def _surface_bound(choices: _Choices, logits: Tensor, task: Task) -> Tensor:
    _, share = _of_each(choices, logits, task)
    best, second = share.topk(2, -1).values.unbind(-1)
    return (1 - share.sum(-1) < best - second).float()
