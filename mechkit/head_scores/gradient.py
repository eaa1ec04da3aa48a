"""Scores of heads by gradients, one backward pass a batch: gates on heads, and how much a head's queries matter.

1. Prompts of about the same length run once with a graph from the stream that enters block 0 on; parameters get no
   gradients. What is measured is a task's metric, or the mean next-token loss of each prompt; its gradient at the last
   hidden states is taken some positions at a time, and goes back from there.
2. A gate g multiplies a head's z: dM/dg at g = 1 is the sum over positions of z . dM/dz. Prompts do not know of each
   other, so one pass gives every prompt's own.
3. The gradient of W_Q of a head is, of one prompt, the sum over positions of x_t (dM/dq_t)^T, with x_t what the
   projections are given (``backends.branches``, compared with the model once). Its squared norm, mean over prompts, is
   the trace of the empirical Fisher information of W_Q.

Michel et al. 2019 (arXiv 1905.10650), section 4, for gates; HeSS (arXiv 2603.25336) for the trace, W_Q of which was
found to rank heads better than W_K and W_V.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.branches import Enough
from ..backends.elsewhere import where_the_model_is
from ..backends.gradients import plain_tensors, without_parameters
from ..backends.hooks import Function
from ..backends.lens import LensBackend, local_backend
from ..backends.memory import TOKENS_AT_ONCE, OutputBytes, fitting, in_batches
from ..backends.window import Key
from ..errors import MetricError, UnsupportedError
from ..progress import bar as progress_bar
from ..prompts import Prompts
from ..tasks.task import Task
from .ablation_runs import alike
from .causal import batch_of
from .readings import loss_gradient, need_next_tokens
from .tables import head_scores

if TYPE_CHECKING:
    from ..model import Model
    from ..results import Scores

_SHARE = 4  # of the tokens that a device runs at once, that a backward pass is of


def gate_gradient(
    model: Model, data: Prompts, *, absolute: bool = True, each: bool = False, progress: bool = True
) -> Scores:
    """How fast the metric changes when a gate on a head's output begins to close.

    Args:
        model: local or remote.
        data: a task, of which it is the metric on its clean prompts; or text, texts or ids ``[batch, pos]``, of which
            it is the mean next-token loss of each prompt.
        absolute: the mean over prompts of the gradient's size; False: of the gradient itself. Minus the latter is the
            first-order estimate of ``leave_one_out`` with zeros.
        each: a row a head and prompt, in place of means.
        progress: show a bar.

    Returns:
        A row a head; ``score`` is in the metric's unit for a gate that goes from 0 to 1 (nats a token, of text).

    Raises:
        MetricError: the metric has no gradient, or none where the model is unchanged (``kl``).
        PromptError: a prompt that the model cannot run, or free text of a single token.
        UnsupportedError: the logits do not depend on z as mechkit sees it.
        CapacityError: a single prompt's backward pass does not fit in memory.
    """
    started = time.perf_counter()
    values, unit = _values(model, data, "gate", progress)
    values = values.abs() if absolute else values
    return head_scores(model, values, unit, "gate_gradient", started, data, each=each, absolute=absolute)


def fisher(model: Model, data: Prompts, *, normalise: bool = True, each: bool = False, progress: bool = True) -> Scores:
    """How much a head's query matrix matters: the trace of its empirical Fisher information (HeSS).

    Args:
        model: local or remote.
        data: as of ``gate_gradient``.
        normalise: divide by the sum over the layer's heads.
        each: a row a head and prompt, in place of means.
        progress: show a bar.

    Returns:
        A row a head; ``score`` is the mean over prompts of the squared norm of the gradient at W_Q
        ``[d_model, d_head]``, as a share of the layer's where normalised.

    Raises:
        MetricError: as of ``gate_gradient``; or, normalised, a layer in which all of it is 0.
        PromptError, CapacityError: as of ``gate_gradient``.
        UnsupportedError: what goes into the family's query projections is not found.
    """
    started = time.perf_counter()
    values, unit = _values(model, data, "query", progress)
    unit = f"({unit})^2 a squared weight"
    if normalise:
        total = values.mean(-1).sum(-1)  # [layers]
        if bool((total == 0).any()):
            layer = int((total == 0).nonzero()[0])
            raise MetricError(
                f"No query of layer {layer} changes the metric to first order",
                expected="a metric that depends on it",
                fix="Take normalise=False",
            )
        values, unit = values / total[:, None, None], "share of the layer"
    return head_scores(model, values, unit, "fisher", started, data, each=each, normalise=normalise)


def _values(model: Model, data: Prompts, what: str, progress: bool) -> tuple[Tensor, str]:
    """Numbers ``[layers, heads, n]`` and the unit of the metric."""
    task = data if isinstance(data, Task) else None
    ids, lengths = batch_of(model, data)
    if task is None:
        need_next_tokens(lengths)
    elif task.metric.reads == "clean":
        raise MetricError(
            f"The gradient of {task.metric.name}, which compares with the run that it is taken in, is 0",
            expected="a metric such as logit_diff, prob or loss",
        )
    return _measured(model, ids, lengths, task, what, progress), task.metric.unit if task else "nats a token"


@where_the_model_is
@torch.inference_mode(False)
def _measured(
    model: Model, ids: Tensor, lengths: Tensor, task: Task | None, what: str, progress: bool = True
) -> Tensor:
    """Gradients of gates, or squared norms of those of W_Q, of each prompt: ``[layers, heads, n]``."""
    backend = local_backend(model, "Gradients of")
    backend.check_readout()
    kind = "z" if what == "gate" else "q"
    keys = [(kind, layer) for layer in range(model.n_layers)]
    keys += [("resid", layer) for layer in range(model.n_layers)] if what == "query" else []
    found = torch.zeros(model.n_layers, model.n_heads, len(ids))

    def run(prompts: Tensor) -> None:
        tokens = ids[prompts, : int(lengths[prompts].max())].to(backend.info.device)
        kept, at = _backwards(backend, tokens, keys, kind, lambda hidden: _gradient(backend, hidden, prompts))
        for layer in range(model.n_layers):
            if what == "gate":
                values = (kept["z", layer] * at["z", layer]).float().sum((1, 3))
            else:
                normed = backend.branches.norm(layer, kept["resid", layer])
                values = torch.stack([_squared(x, g) for x, g in zip(normed, at["q", layer], strict=True)])
            found[layer][:, prompts] = values.cpu().T

    def _gradient(backend: LensBackend, hidden: Tensor, prompts: Tensor) -> Tensor:
        if task is None:
            width = hidden.shape[1]
            return loss_gradient(backend, hidden, ids[prompts, :width], lengths[prompts])[1]
        return _metric_gradient(backend, hidden, task[prompts])

    with plain_tensors(), without_parameters(backend.hf), torch.no_grad():
        if what == "query":
            _ = backend.branches  # refuses families whose parts are not found
        with progress_bar(len(ids), what, "prompt", show=progress) as bar:
            for prompts in alike(lengths, backend.base_tokens()):
                for some, _, _ in in_batches(prompts, _rows(backend, ids[prompts]), run):
                    bar.update(len(some))
    return found


def _backwards(
    backend: LensBackend, tokens: Tensor, keys: Sequence[Key], kind: str, toward: Callable[[Tensor], Tensor]
) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """Values of sites, and the gradients of those of one kind, given that of the normalised last streams.

    Raises:
        UnsupportedError: the last streams do not depend on one of them.
    """
    kept: dict[Key, Tensor] = {}
    start: Key = ("resid", 0)
    with torch.enable_grad():
        with backend.hooks({key: _keep(key, kept) for key in dict.fromkeys([start, *keys])}):
            hidden = backend.body(tokens, use_cache=False).last_hidden_state.to(tokens.device)
        gradient = toward(hidden.detach())
        wanted = [key for key in keys if key[0] == kind]
        found = torch.autograd.grad(hidden, [kept[key] for key in wanted], gradient, allow_unused=True)
    at = {key: grad for key, grad in zip(wanted, found, strict=True) if grad is not None}
    if lost := [key for key in wanted if key not in at]:
        raise UnsupportedError(
            f"The logits of {backend.info.name} ({backend.info.family}) do not depend on {lost[0][0]} of layer "
            f"{lost[0][1]} as mechkit sees it"
        )
    return {key: value.detach() for key, value in kept.items()}, at


def _keep(key: Key, kept: dict[Key, Tensor]) -> Function:
    def function(tensor: Tensor) -> Tensor:
        own = tensor.detach().requires_grad_() if key == ("resid", 0) else tensor
        kept[key] = own
        return own.clone()  # families add to their tensors in place

    return function


def _metric_gradient(backend: LensBackend, hidden: Tensor, task: Task) -> Tensor:
    """The gradient of a task's metric at the normalised last streams ``[rows, pos, d_model]``."""
    rows, at = torch.arange(len(task), device=hidden.device), task.answer_positions.to(hidden.device)
    columns = task.answers.to(hidden.device) if task.metric.reads == "answers" else None
    with torch.enable_grad():
        leaf = hidden[rows, at].detach().requires_grad_()
        values = task.metric(backend.readout(leaf, columns), task)
        if not values.requires_grad:
            raise MetricError(
                f"{task.metric.name} has no gradient with respect to the logits",
                expected="sums, products and other differentiable functions of them",
                fix='Use a metric such as logit_diff, or how="leave_one_out"',
            )
        found = torch.autograd.grad(values.sum(), leaf)[0]
    gradient = torch.zeros_like(hidden)
    gradient[rows, at] = found
    return gradient


def _squared(x: Tensor, gradient: Tensor) -> Tensor:
    """Squared norms ``[heads]`` of a prompt's gradients at W_Q.

    Args:
        x: what the projection was given ``[pos, d_model]``.
        gradient: at q ``[pos, heads, d_head]``.
    """
    return torch.einsum("pd,phe->hde", x.float(), gradient.float()).square().sum((1, 2))


def _rows(backend: LensBackend, tokens: Tensor) -> int:
    """How many prompts' backward passes fit in memory."""
    device = torch.device(backend.info.device)

    def stop(_: Tensor) -> None:
        raise Enough

    with OutputBytes() as spent, backend.hooks({("resid", 1): stop}), suppress(Enough):
        backend.body(tokens[:1].to(device), use_cache=False)
    useful = TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE["cuda"]) // _SHARE
    return fitting(spent.total * backend.info.n_layers, device, max(1, useful // tokens.shape[1]))
