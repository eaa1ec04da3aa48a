"""What is lost when a head is taken out: of a task's metric, of the next tokens, of the next-token distribution.

1. Each head is taken out by itself at every position: set to zero, to its mean or to its values on other prompts, made
   to attend evenly to all that it can see, or scaled down. Even attention is what a query of zero gives.
2. ``leave_one_out``: the task's metric with the head out, less that without; of free text, the rise of the mean
   next-token loss.
3. ``ships``: the KL divergence from the model's next-token distribution at a prompt's end to that with the head out.
4. All heads of all layers stand side by side, each begun at its own block (``ablation_runs``).

Zhou et al. 2024 (arXiv 2410.13708), section 3, for Ships; Michel et al. 2019 (arXiv 1905.10650), section 3, for heads
left out one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.lens import local_backend
from ..errors import OptionError, SiteError
from ..progress import bar as progress_bar
from ..prompts import Prompts, as_batch, check_task
from ..sites import Site, SitesLike
from ..tasks.task import Task
from .ablation_runs import HeadRuns, ablation_of, known_ablation
from .readings import MeanLoss, NextTokenKL, TaskMetric, need_next_tokens
from .tables import head_scores

if TYPE_CHECKING:
    from ..model import Model
    from ..results import Scores


def leave_one_out(
    model: Model,
    data: Prompts,
    *,
    ablation: Literal["zero", "mean", "uniform", "resample"] = "zero",
    reference: Task | None = None,
    heads: SitesLike | None = None,
    each: bool = False,
    progress: bool = True,
) -> Scores:
    """What taking out one head does, for every head by itself.

    Args:
        model: local or remote.
        data: a task, of which the metric is measured on its clean prompts; or text, texts or ids ``[batch, pos]``, of
            which the next-token loss is, at all positions.
        ablation: what a head gets: ``"zero"``, ``"uniform"`` (even attention over all that it can see), ``"mean"`` or
            ``"resample"`` of the reference's corrupt prompts, as of ``mk.ablate``.
        reference: for ``mean`` and ``resample``; left out: the task itself.
        heads: which heads; left out: all.
        each: a row a head and prompt, in place of means.
        progress: show a bar.

    Returns:
        A row a head. Of a task, ``score`` is the metric with the head out less that without, in the metric's unit, and
        ``metric`` the former. Of text, ``score`` is the rise of the mean next-token loss, in nats a token: positive
        where the head helps. ``se`` is over prompts. ``meta["options"]["base"]`` is the mean with all heads in.

    Raises:
        OptionError: another ablation.
        EditError: mean or resample without a reference, or one that does not fit the prompts.
        PromptError: a prompt that the model cannot run, or free text of a single token.
        SiteError: a head that the model does not have, or none.
        UnsupportedError: the family's blocks cannot be run one by one.
        CapacityError: a single variant does not fit in memory.
    """
    started = time.perf_counter()
    known_ablation(ablation, ("zero", "mean", "uniform", "resample"))
    task = data if isinstance(data, Task) else None
    ids, lengths = batch_of(model, data)
    if task is None:
        need_next_tokens(lengths)
    chosen = chosen_heads(model, heads)
    given = task if reference is None and ablation in ("mean", "resample") else reference
    base, values = _measured(
        model, "metric" if task else "loss", ids, lengths, chosen, ablation, 0.0, given, task, progress
    )
    return head_scores(
        model,
        grid_of(model, chosen, values - base),
        task.metric.unit if task else "nats a token",
        "leave_one_out",
        started,
        data,
        each=each,
        metric=grid_of(model, chosen, values.mean(1)) if task else None,
        heads=chosen,
        ablation=ablation,
        reference=None if given is None else given.name,
        base=float(base.mean()),
    )


def ships(
    model: Model,
    data: Prompts,
    *,
    ablation: Literal["uniform", "zero", "scale"] = "uniform",
    eps: float = 1e-5,
    heads: SitesLike | None = None,
    each: bool = False,
    progress: bool = True,
) -> Scores:
    """How far the next-token distribution moves when a head is taken out (Ships).

    Args:
        model: local or remote.
        data: text, texts, ids ``[batch, pos]``, or a task (its clean prompts).
        ablation: ``"uniform"``, even attention over all that a query can see (the published form, a query multiplied
            by next to nothing, in its limit); ``"zero"``; or ``"scale"``, the head's output multiplied by ``eps``.
        eps: of ``scale``.
        heads: which heads; left out: all.
        each: a row a head and prompt, in place of means.
        progress: show a bar.

    Returns:
        A row a head; ``score`` is the mean over prompts of KL(model || model without the head) of the next token after
        each prompt, in nats.

    Raises:
        OptionError: another ablation, or an ``eps`` that is no finite number.
        PromptError, SiteError, UnsupportedError, CapacityError: as of ``leave_one_out``.
    """
    started = time.perf_counter()
    known_ablation(ablation, ("uniform", "zero", "scale"))
    if not isinstance(eps, int | float) or not -float("inf") < eps < float("inf"):
        raise OptionError(f"eps = {eps!r}", expected="a finite number")
    ids, lengths = batch_of(model, data)
    chosen = chosen_heads(model, heads)
    _, values = _measured(model, "kl", ids, lengths, chosen, ablation, eps, None, None, progress)
    options = {"ablation": ablation, **({"eps": eps} if ablation == "scale" else {})}
    return head_scores(
        model, grid_of(model, chosen, values), "nats", "ships", started, data, each=each, heads=chosen, **options
    )


def chosen_heads(model: Model, heads: SitesLike | None) -> tuple[Site, ...]:
    """The heads that are asked for; left out: all.

    Raises:
        SiteError: one that the model does not have, or none.
    """
    chosen = tuple(model.heads(heads))
    if not chosen:
        raise SiteError("No heads", expected="at least one, or None for all")
    return chosen


def batch_of(model: Model, data: Prompts) -> tuple[Tensor, Tensor]:
    """As ``as_batch``; of a task, its answers are looked at as well."""
    if isinstance(data, Task):
        check_task(model, data)
    return as_batch(model, data)


def grid_of(model: Model, heads: Sequence[Site], values: Tensor) -> Tensor:
    """Numbers of some heads ``[heads, ...]`` as ``[layers, heads, ...]``, NaN of the others."""
    grid = torch.full((model.n_layers, model.n_heads, *values.shape[1:]), torch.nan, dtype=values.dtype)
    grid[[one.layer for one in heads], [one.head for one in heads if one.head is not None]] = values
    return grid


@where_the_model_is
@torch.no_grad()
def _measured(
    model: Model,
    what: str,
    ids: Tensor,
    lengths: Tensor,
    heads: Sequence[Site],
    ablation: str,
    factor: float,
    reference: Task | None,
    task: Task | None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """A number a prompt without ``[n]`` and with each head out ``[heads, n]``."""
    backend = local_backend(model, "Scores of")
    way = ablation_of(model, ablation, heads, ids, reference, task, factor)
    reading = (
        TaskMetric(task) if task is not None else MeanLoss(ids, lengths) if what == "loss" else NextTokenKL(lengths)
    )
    with progress_bar(len(heads) * len(ids), what, "run", show=progress) as bar:
        return HeadRuns(backend, ids, lengths, way).measure(heads, reading, bar)
