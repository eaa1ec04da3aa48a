"""Train what is free in edits, the model's own weights as they are.

1. What can be trained of the edits is listed with its start and its neutral value. A gate is trained as the logit of
   itself, so that it stays between 0 and 1.
2. Each step takes the next prompts of a shuffled order and runs them with the edits as they now are. No parameter of
   the model gets gradients, and nothing before the first edited layer is part of the backward pass.
3. Objectives, means over prompts. Loss: minus the log-probability of the correct answer. Metric: the task's, downwards
   or upwards. Preference: -log sigmoid(beta (d - d0)), with d the logit of the correct answer less that of the wrong
   one, and d0 the same without edits: a pair's log-probabilities differ by their logits, whatever the rest.
4. ``l1`` times the sum of |value - neutral| is added; Adam takes the step.
5. Some of the prompts are for validation: the objective without ``l1``, before the first step and now and then. What
   is given back is what was best there.

Kingma and Ba 2015 (arXiv 1412.6980) for Adam; Rafailov et al. 2023 (arXiv 2305.18290) for the preference; Yin et al.
2024 (arXiv 2406.01563) for both with edits of heads (LoFiT).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.change import functions_of
from ..backends.elsewhere import where_the_model_is
from ..backends.gradients import plain_tensors, without_parameters
from ..backends.lens import LensBackend, local_backend
from ..backends.memory import in_batches
from ..backends.protocol import Read
from ..backends.window import Window
from ..edits import Edit
from ..edits.free import Free, free, with_tensors
from ..errors import EditError, MechkitWarning, MetricError
from ..evidence.measure import rows_of
from ..progress import bar

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task

_EDGE = 1e-4  # of a gate, which is never quite 0 or 1


@dataclass(frozen=True)
class Plan:
    """How to train; see ``fit``.

    Attributes:
        objective: ``"loss"``, ``"metric"`` or ``"preference"``.
        maximise: the metric, where it is the objective.
        steps, batch, lr, l1, beta, every, seed: numbers; see ``fit``.
    """

    objective: str
    maximise: bool
    steps: int
    batch: int
    lr: float
    l1: float
    beta: float
    every: int
    seed: int


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of it.

    Attributes:
        tensors: the best values, in the order of ``free`` of each edit.
        history: step, objective on the training prompts since the row before (NaN at step 0), and on the others.
        best: the step that the values are of.
        done: how many steps were taken; fewer than planned where it was stopped.
    """

    tensors: list[Tensor]
    history: list[tuple[int, float, float]]
    best: int
    done: int


@where_the_model_is
def trained(
    model: Model, task: Task, validation: Task, edits: Sequence[Edit], plan: Plan, progress: bool = True
) -> Trained:
    """The free tensors of edits, trained on a task; stopped by Ctrl-C, the best so far.

    Raises:
        EditError: nothing to train, or values that the metric does not depend on.
        MetricError: a metric without gradient, or a gradient that is not finite.
    """
    objective = Objective(model, edits, plan)
    held, history = objective.tensors, []
    best, best_value, best_step, step = objective.values(), float("inf"), 0, 0
    adam = torch.optim.Adam(held, lr=plan.lr)
    order, sums, seen = _order(len(task), plan.batch, plan.seed), 0.0, 0
    with bar(plan.steps, "fitting", "step", show=progress) as shown, plain_tensors():
        try:
            while True:
                if step % plan.every == 0 or step == plan.steps:
                    value = objective.mean(validation)
                    history.append((step, sums / seen if seen else float("nan"), value))
                    sums, seen = 0.0, 0
                    if value < best_value:
                        best, best_value, best_step = objective.values(), value, step
                if step == plan.steps:
                    break
                rows = next(order)
                value, grads = objective.gradient(task, rows, step)
                for tensor, grad in zip(held, grads, strict=True):
                    tensor.grad = grad
                adam.step()
                sums, seen = sums + value * len(rows), seen + len(rows)
                step += 1
                shown.update()
        except KeyboardInterrupt:
            pass  # the best so far is handed over
    return Trained([one.cpu() for one in best], history, best_step, step)


class Objective:
    """What is minimised, and the tensors it is a function of."""

    def __init__(self, model: Model, edits: Sequence[Edit], plan: Plan):
        self._model, self._edits, self._plan = model, list(edits), plan
        self._backend = local_backend(model, "Training edits of")
        self._backend.check_readout()
        self._free: list[list[Free]] = [free(edit, model.info) for edit in edits]
        self._every = [one for some in self._free for one in some]
        if not self._every:
            raise EditError("Nothing of these edits can be trained", expected="tensors, such as those of mk.steer")
        with plain_tensors():
            self.tensors = [self._begun(one) for one in self._every]
        self._warned = False

    def _begun(self, one: Free) -> Tensor:
        start = one.start.detach().to(self._model.info.device, torch.float32).clone()
        return (start.clamp(_EDGE, 1 - _EDGE).logit() if one.unit else start).requires_grad_()

    def _current(self) -> list[Tensor]:
        return [t.sigmoid() if one.unit else t for one, t in zip(self._every, self.tensors, strict=True)]

    def values(self) -> list[Tensor]:
        """The tensors as the edits have them."""
        return [value.detach().clone() for value in self._current()]

    def mean(self, task: Task) -> float:
        """Over a task's prompts, without gradient."""
        with torch.no_grad():
            parts = in_batches(torch.arange(len(task)), self._rows(task), lambda some: self._each(task, some).sum())
            return sum(float(part) for _, part, _ in parts) / len(task)

    def gradient(self, task: Task, rows: Tensor, step: int = 0) -> tuple[float, list[Tensor]]:
        """The mean over some prompts, without ``l1``; and its gradient, with ``l1``, a tensor each.

        Raises:
            MetricError, EditError: see ``trained``.
        """
        total, grads = 0.0, [torch.zeros_like(one) for one in self.tensors]

        def back(some: Tensor) -> tuple[float, Sequence[Tensor | None]]:
            with torch.enable_grad():
                each = self._each(task, some)
                if not each.requires_grad:
                    raise self._without_gradient()
                found = torch.autograd.grad(each.sum() / len(rows), self.tensors, allow_unused=True)
            return float(each.detach().sum()), found

        for _, (part, found), _ in in_batches(rows, len(rows), back):
            total += part
            for grad, more in zip(grads, found, strict=True):
                grad += 0 if more is None else more
        if self._plan.l1:
            with torch.enable_grad():
                pairs = zip(self._current(), self._every, strict=True)
                away = torch.stack([(value - one.neutral.to(value)).abs().sum() for value, one in pairs]).sum()
                for grad, more in zip(grads, torch.autograd.grad(self._plan.l1 * away, self.tensors), strict=True):
                    grad += more
        for one, grad in zip(self._every, grads, strict=True):
            if not bool(torch.isfinite(grad).all()):
                raise MetricError(
                    f'The gradient of {one.name} of "{one.site}" at step {step} is not finite',
                    expected="finite numbers",
                    fix="Take a smaller lr, or load the model with dtype=torch.float32",
                )
        return total / len(rows), grads

    def _without_gradient(self) -> Exception:
        """Why the objective has none."""
        if self._plan.objective == "metric":
            return MetricError(
                "The metric has no gradient with respect to the logits, or the logits none to the edits",
                expected="a differentiable metric, such as logit_diff",
                fix='Use objective="loss", or try candidates with mk.select',
            )
        return EditError("The answer's logits do not depend on these edits", expected="edits before the answer")

    def _rows(self, task: Task) -> int:
        return max(1, self._backend.base_tokens() // task.clean.shape[1])

    def _edits_of(self, task: Task, rows: Tensor) -> list[Edit]:
        filled = filled_in(self._edits, self._free, self._current())
        with warnings.catch_warnings():
            if self._warned:
                warnings.simplefilter("ignore", MechkitWarning)
            self._warned = True
            return self._model.resolved(rows_of(filled, rows, len(task)), task[rows])

    def _each(self, task: Task, rows: Tensor) -> Tensor:
        """The objective of each of some prompts ``[rows]``."""
        part, plan = task[rows], self._plan
        with torch.no_grad():
            base = self._base(part)
        logits = _logits(self._backend, part, self._edits_of(task, rows), self._columns(part))
        if plan.objective == "metric":
            values = part.metric(logits, part, base)
            return -values if plan.maximise else values
        if plan.objective == "preference":
            assert base is not None
            apart = (logits[:, 0] - logits[:, 1]) - (base[:, 0] - base[:, 1])
            return -torch.nn.functional.logsigmoid(plan.beta * apart.float())
        return -logits.float().log_softmax(-1).gather(-1, part.correct[:, None].to(logits.device))[:, 0]

    def _base(self, part: Task) -> Tensor | None:
        """The logits without edits, where the objective reads them."""
        reads = self._plan.objective == "preference" or (
            self._plan.objective == "metric" and part.metric.reads == "clean"
        )
        return _logits(self._backend, part, (), self._columns(part)) if reads else None

    def _columns(self, part: Task) -> Tensor | None:
        answers = self._plan.objective == "preference" or (
            self._plan.objective == "metric" and part.metric.reads == "answers"
        )
        return part.answers if answers else None


def filled_in(edits: Sequence[Edit], frees: Sequence[Sequence[Free]], tensors: Sequence[Tensor]) -> list[Edit]:
    """Edits with these tensors in the place of what is free in each, in order."""
    rest = iter(tensors)
    return [with_tensors(edit, [next(rest) for _ in some]) for edit, some in zip(edits, frees, strict=True)]


def _logits(backend: LensBackend, part: Task, edits: Sequence[Edit], columns: Tensor | None) -> Tensor:
    """The answer's logits ``[n, k]``, part of the graph of the edits' tensors."""
    read = Read(part.answer_positions, columns)
    functions = functions_of(edits, backend.info, Window(part.lengths))
    device = backend.info.device
    with without_parameters(backend.hf), backend.hooks(functions) as fired:
        hidden = backend.body(part.clean.to(device), use_cache=False).last_hidden_state.to(device)
        if silent := set(functions) - fired:
            kind, layer = sorted(silent)[0]
            raise EditError(
                f"An edit of {kind} in layer {layer} never ran on {backend.info.name}",
                fix="This family computes that site elsewhere; edit another one",
            )
        rows = torch.arange(len(hidden), device=device)
        return backend.readout(hidden[rows, read.positions.to(device)], columns)


def _order(n: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Prompts for one step after another: every prompt once, in a new order, then again."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=draw).split(min(batch, n))
