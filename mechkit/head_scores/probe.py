"""Probes: how well can one tell, from what a head has at the last token, which kind of prompt it read?

1. Take z (or q, k, v) of every head at the last token: of a task's clean prompts, to be told from its corrupt ones; or
   of prompts with labels of 0 and 1.
2. Cut the prompts into folds, a pair's twins in one fold. Of each fold, a ridge regression of the labels (as -1 and 1)
   on the others' vectors, which are centred and brought to unit variance, by its closed form; a held-out prompt is
   told right where the sign is.
3. The score is the share of held-out prompts that are told right, each held out once. Beside it stands the same with
   shuffled labels, which is what chance and the number of dimensions give.

A probe finds what is there, not what is used: put it beside a score by intervention. Li et al. 2023 (arXiv 2306.03341),
section 3.1, rank heads by it, with logistic regression.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import OptionError
from ..prompts import as_batch
from ..results import Scores
from ..sites import SitesLike
from ..tasks.task import Task
from .passes import head_vectors
from .tables import head_scores
from .vectors import pair_vectors

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts


def probe(
    model: Model,
    data: Task | Prompts,
    *,
    labels: Sequence[int] | Tensor | None = None,
    kind: Literal["z", "q", "k", "v"] = "z",
    folds: int = 5,
    ridge: float = 1.0,
    heads: SitesLike | None = None,
    seed: int = 0,
) -> Scores:
    """How well a linear probe tells prompts apart by what each head has at the last token.

    Args:
        model: any.
        data: a task, whose clean prompts are told from its corrupt ones; or text, texts or ids, with ``labels``.
        labels: 0 or 1 a prompt.
        kind: what of a head; of keys and values, a group's stand for each of its heads.
        folds: how many.
        ridge: of the regression, over the number of prompts it learns from: 0 is none, and may have no answer.
        heads: only these; left out: all.
        seed: of folds and of the shuffled labels.

    Returns:
        A row a head, ``score`` from 0 to 1 and its standard error over prompts; column ``shuffled``, the same with
        labels that mean nothing.

    Raises:
        OptionError: an unknown kind; folds outside 2 to the number of prompts (of a task: pairs); a ridge below 0;
            labels that are missing, not one a prompt, or not 0 and 1.
        SiteError: a head that is not there.
    """
    started = time.perf_counter()
    chosen = None if heads is None else list(model.heads(heads))
    if kind not in ("z", "q", "k", "v"):
        raise OptionError(f"kind = {kind!r}", expected="z, q, k or v")
    if not ridge >= 0:
        raise OptionError(f"ridge = {ridge!r}", expected="a number from 0")
    if isinstance(data, Task) and labels is None:
        sides = pair_vectors(model, data, kind)
        x, n = torch.cat(sides), len(data)
        y, units = torch.arange(2).repeat_interleave(n).flip(0), torch.arange(n).repeat(2)
    else:
        tokens, lengths = as_batch(model, data)
        y, units = _labels(labels, len(tokens)), torch.arange(len(tokens))
        x = head_vectors(model, tokens, lengths, lengths[:, None] - 1, kind)[:, 0]
    n = int(units.max()) + 1
    if not isinstance(folds, int) or not 2 <= folds <= n:
        raise OptionError(f"folds = {folds!r}", expected=f"a whole number from 2 to {n}, the number of prompts")
    draw = torch.Generator().manual_seed(seed)
    fold = (torch.randperm(n, generator=draw) % folds)[units]
    right, by_chance = (told_right(x, some, fold, ridge) for some in (y, y[torch.randperm(len(y), generator=draw)]))
    scores = head_scores(
        model,
        right.permute(1, 2, 0),
        "share told right",
        "probe",
        started,
        data,
        heads=chosen,
        kind=kind,
        folds=folds,
        ridge=ridge,
        seed=seed,
    )
    at = torch.tensor(scores.frame[["layer", "head"]].to_numpy(int))
    shuffled = by_chance.double().mean(0)[at[:, 0], at[:, 1]].numpy()
    return replace(scores, frame=scores.frame.assign(shuffled=shuffled))


def told_right(x: Tensor, labels: Tensor, fold: Tensor, ridge: float) -> Tensor:
    """Whether each prompt's label is told by a probe that has not seen its fold ``[n, layers, heads]``, 1 or 0.

    Args:
        x: ``[n, layers, heads, d_head]``.
        labels: 0 or 1 ``[n]``.
        fold: of each prompt ``[n]``.
        ridge: see ``probe``.
    """
    vectors = x.double().flatten(1, 2).transpose(0, 1)  # [layers * heads, n, d_head]
    signs = labels.double() * 2 - 1
    out = torch.zeros(vectors.shape[:2], dtype=torch.double)
    for number in fold.unique().tolist():
        held = fold == number
        seen, wanted = vectors[:, ~held], signs[~held]
        mean, scale = seen.mean(1, keepdim=True), seen.std(1, keepdim=True).clamp_min(1e-12)
        seen = (seen - mean) / scale
        squares = seen.mT @ seen / seen.shape[1] + ridge * torch.eye(seen.shape[-1], dtype=torch.double)
        weight = torch.linalg.solve(squares, seen.mT @ (wanted - wanted.mean()) / seen.shape[1])
        told = ((vectors[:, held] - mean) / scale * weight[:, None]).sum(-1) + wanted.mean()
        out[:, held] = (told.sign() == signs[held]).double()
    return out.T.unflatten(1, tuple(x.shape[1:3])).float()


def _labels(labels: Sequence[int] | Tensor | None, n: int) -> Tensor:
    if labels is None:
        raise OptionError("Prompts without labels", expected="labels=, 0 or 1 a prompt", fix="Or give a task")
    found = torch.as_tensor(labels).long()
    if found.shape != (n,):
        raise OptionError(f"Labels of shape {list(found.shape)} for {n} prompts", expected=f"[{n}]")
    if found.unique().tolist() != [0, 1]:
        raise OptionError(f"Labels {found.unique().tolist()}", expected="0 and 1, both of them")
    return found
