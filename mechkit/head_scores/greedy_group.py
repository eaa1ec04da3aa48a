"""Which heads turn what a model makes of a set of prompts, and which do so together (Sahara)?

1. X has a row a prompt: what the unembedding reads at its last token, the last hidden state as the Hub gives it.
2. With a head out it is X'. The score is the largest principal angle, in degrees, between the spans of the first
   ``rank`` singular vectors of X and of X'.
3. ``side="samples"`` takes left singular vectors, which say how prompts load on the main directions; the released code
   does so. ``side="features"`` takes right ones, the directions in the stream themselves.
4. Angles are the arctangent of sines over cosines, exact near 0 and near 90 degrees alike.
5. Greedy: the head with the largest angle is held out, every other one is measured with it out, and so on, ``k`` heads
   in all. Angles are always from the X of the whole model.

Zhou et al. 2024 (arXiv 2410.13708), section 4.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.lens import local_backend
from ..backends.memory import fitting
from ..errors import OptionError, PromptError
from ..progress import bar as progress_bar
from ..prompts import Prompts
from ..results import Scores
from ..sites import Site, SitesLike
from ..tasks.task import Task
from .ablation_runs import HeadRuns, ablation_of, known_ablation
from .causal import batch_of, chosen_heads, grid_of
from .readings import LastHidden
from .tables import head_scores

if TYPE_CHECKING:
    from ..model import Model

SIDES = ("samples", "features")


def sahara(
    model: Model,
    data: Prompts,
    *,
    rank: int = 1,
    side: Literal["samples", "features"] = "samples",
    ablation: Literal["uniform", "zero", "mean", "resample"] = "uniform",
    reference: Task | None = None,
    k: int = 1,
    heads: SitesLike | None = None,
    progress: bool = True,
) -> Scores:
    """How far the main directions of a set of prompts turn when a head is taken out.

    Args:
        model: local or remote.
        data: texts, ids ``[n, pos]``, or a task (its clean prompts).
        rank: how many singular vectors.
        side: left singular vectors over prompts (``"samples"``), or right ones over the stream (``"features"``).
        ablation, reference: as of ``leave_one_out``.
        k: how many heads to choose one after the other, each with those before it out.
        heads: which heads; left out: all.
        progress: show a bar.

    Returns:
        A row a head; ``score`` is the angle with that head alone out, in degrees from 0 to 90, and ``n`` the number of
        prompts that it is made of. With ``k`` above 1 also ``round``, from 1, of the heads that were chosen, and
        ``group_score``, the angle with it and those before it out; ``meta["group"]`` lists them in that order.

    Raises:
        PromptError: no more prompts than ``rank``, whose left singular vectors would say nothing.
        OptionError: another side or ablation; ``rank`` or ``k`` out of range.
        EditError, SiteError, UnsupportedError, CapacityError: as of ``leave_one_out``.
    """
    started = time.perf_counter()
    known_ablation(ablation, ("uniform", "zero", "mean", "resample"))
    if side not in SIDES:
        raise OptionError(f"side = {side!r}", expected="one of " + ", ".join(SIDES))
    chosen = chosen_heads(model, heads)
    for name, value, most in (("rank", rank, model.d_model - 1), ("k", k, len(chosen))):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise OptionError(f"{name} = {value!r}", expected=f"a whole number from 1 to {most}")
    ids, lengths = batch_of(model, data)
    if len(ids) <= rank:
        raise PromptError(f"{len(ids)} prompts for rank = {rank}", expected=f"at least {rank + 1} prompts")
    task = data if isinstance(data, Task) else None
    given = task if reference is None and ablation in ("mean", "resample") else reference
    angles = _angles(model, ids, lengths, chosen, ablation, given, task, rank, side, k, progress)
    scores = head_scores(
        model,
        grid_of(model, chosen, angles[0]),
        "degrees",
        "sahara",
        started,
        data,
        heads=chosen,
        rank=rank,
        side=side,
        ablation=ablation,
        reference=None if given is None else given.name,
        k=k,
    )
    frame = scores.frame.assign(n=len(ids))
    if k == 1:
        return Scores(frame, scores.unit, scores.meta)
    best = [int(row.nan_to_num(-1).argmax()) for row in angles]
    frame["round"] = pd.array([best.index(i) + 1 if i in best else None for i in range(len(chosen))], dtype="Int64")
    frame["group_score"] = [float(angles[best.index(i), i]) if i in best else float("nan") for i in range(len(chosen))]
    return Scores(frame, scores.unit, {**scores.meta, "group": [str(chosen[i]) for i in best]})


@where_the_model_is
@torch.no_grad()
def _angles(
    model: Model,
    ids: Tensor,
    lengths: Tensor,
    heads: Sequence[Site],
    ablation: str,
    reference: Task | None,
    task: Task | None,
    rank: int,
    side: str,
    k: int,
    progress: bool = True,
) -> Tensor:
    """Degrees ``[rounds, heads]``; NaN of heads that were chosen in a round before."""
    backend = local_backend(model, "Scores of")
    way = ablation_of(model, ablation, heads, ids, reference, task)
    angles, held = torch.full((k, len(heads)), torch.nan, dtype=torch.float64), []
    bytes_each = 3 * 8 * len(ids) * model.d_model  # a head's X', in double precision, and its singular vectors
    whole: Tensor | None = None
    with progress_bar(sum(len(heads) - i for i in range(k)) * len(ids), "sahara", "run", show=progress) as bar:
        for number in range(k):
            left = torch.tensor([i for i in range(len(heads)) if i not in held])
            at_once = fitting(bytes_each, torch.device(backend.info.device), len(left))
            for some in left.split(at_once):
                runs = HeadRuns(backend, ids, lengths, way, [heads[i] for i in held])
                own, out = runs.measure([heads[i] for i in some.tolist()], LastHidden(lengths), bar)
                whole = own if whole is None else whole
                angles[number, some] = largest_angle(whole, out, rank, side)
            held.append(int(angles[number].nan_to_num(-1).argmax()))
    return angles


def largest_angle(own: Tensor, other: Tensor, rank: int, side: str) -> Tensor:
    """Degrees ``[...]`` between the first singular vectors of ``own [n, d_model]`` and of ``other [..., n, d_model]``.

    Args:
        own, other: a row a prompt.
        rank: how many singular vectors.
        side: ``"samples"`` for left ones, ``"features"`` for right ones.
    """
    a, b = (_main(x.double().cpu(), rank, side) for x in (own, other))
    inside = a.mT @ b
    cosine = torch.linalg.svdvals(inside)[..., -1]
    sine = torch.linalg.svdvals(b - a @ inside)[..., 0]
    return torch.rad2deg(torch.atan2(sine, cosine))


def _main(x: Tensor, rank: int, side: str) -> Tensor:
    """The first singular vectors of one side ``[..., n or d_model, rank]``."""
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u[..., :rank] if side == "samples" else v[..., :rank, :].mT
