"""What a head's components are for: take them out, scale or set them, and see what that does beside chance.

1. Of OV: the head writes ``z W_O``. What it writes along v_i, a row in the space of W_O, is changed by a map of z:
   ``P_i = W_O v_i^T v_i W_O^+``, so that ``z P_i W_O`` is what z writes along v_i and nothing else. Taking component i
   out is ``z (I - P_i)``, which is W_OV without ``s_i u_i v_i^T``.
2. Of QK: the query reads the stream along u_i, in the space of W_Q: ``P_i = W_Q^+ u_i u_i^T W_Q`` acts on q in the same
   way, and ``q (I - P_i)`` is W_QK without component i. Where queries and keys are rotated, that is so at the distance
   that the SVD is of; at others it is still the query that reads nothing along u_i. Norms of queries (Qwen 3, Gemma 3,
   OLMo 2) then scale up what is left of it.
3. Both are linear in z and q, biases included, so that the same change can be made to W_O and W_Q (``edit_weights``).
4. The control is a change of the head by a random matrix of the rank and the singular values that were taken out:
   ``W_OV - s_i a b^T``, a and b drawn evenly from the spaces of u and v; of several components, the sum of such, with
   orthonormal a and orthonormal b.

Merullo et al. 2024 (arXiv 2406.09519), sections 4 and 5.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..edits import Edit, Transform, transform
from ..errors import MetricError, OptionError
from ..patching.edited import EditedRuns
from ..prompts import check_task
from ..results import Table, provenance
from ..sites import Site

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task
    from .svd import HeadSVD


def scaled(svd: HeadSVD, components: Sequence[int], alpha: float) -> Transform:
    """The edit that multiplies components of one head by ``alpha``.

    Args:
        svd: of one head.
        components: which.
        alpha: 1 changes nothing, 0 takes them out.
    """
    inward, outward = _maps(svd, components)
    width = inward.shape[0]
    return transform([_site(svd)], (torch.eye(width) + (alpha - 1) * (inward @ outward).cpu()).float())


def set_to(svd: HeadSVD, coordinates: Mapping[int, float]) -> Transform:
    """The edit that gives components of one head these coordinates at every position.

    Args:
        svd: of one head. Of OV, a coordinate is what the head writes along v_i; of QK, what its query reads along u_i.
        coordinates: by component.
    """
    inward, outward = _maps(svd, list(coordinates))
    matrix = torch.eye(inward.shape[0]) - (inward @ outward).cpu()
    values = torch.tensor(list(coordinates.values()), dtype=outward.dtype)
    return transform([_site(svd)], matrix.float(), (values @ outward.cpu()).float())


def _site(svd: HeadSVD) -> Site:
    head = svd.only
    return Site(head.layer, head.head, "z" if svd.matrix == "ov" else "q")


def _maps(svd: HeadSVD, components: Sequence[int]) -> tuple[Tensor, Tensor]:
    """From z (or q) to coordinates ``[d_head, k]``, and from coordinates back ``[k, d_head]``, in float64."""
    assert svd.weights is not None
    chosen = svd.components_at(components)
    if svd.matrix == "ov":
        out = svd.weights.of_heads("o", svd.heads)[0].double()  # [d_head, d_model]
        directions = svd.right[0, chosen].double()
        return out @ directions.mT, directions @ torch.linalg.pinv(out)
    query = svd.weights.of_heads("q", svd.heads)[0].double()  # [d_model, d_head]
    directions = svd.left[0][:, chosen].double()
    return torch.linalg.pinv(query) @ directions, directions.mT @ query


def _random(svd: HeadSVD, components: Sequence[int], draw: torch.Generator) -> Tensor:
    """The map of z (or q) that takes a random matrix off, of the singular values of components ``[d_head, d_head]``."""
    assert svd.weights is not None
    d_head = svd.values.shape[1]
    a, b = (torch.linalg.qr(torch.randn(d_head, len(components), generator=draw, dtype=torch.double)).Q for _ in "ab")
    left, right, sizes = (one[0].cpu().double() for one in (svd.left, svd.right, svd.values))
    kinds = ("v", "o") if svd.matrix == "ov" else ("q", "k")
    first, second = (svd.weights.of_heads(kind, svd.heads)[0].cpu().double() for kind in kinds)
    if svd.matrix == "qk":
        second = second.mT if svd.turns is None else svd.turns[0].cpu().double() @ second.mT
    taken = (torch.linalg.pinv(first) @ left @ a * sizes[components]) @ (b.mT @ right @ torch.linalg.pinv(second))
    return torch.eye(d_head) - taken.float()


@dataclass(frozen=True, eq=False, repr=False)
class ChannelEffects(Table):
    """What changes of heads by matrices of low rank do to a task.

    Attributes:
        frame: a row a change: ``change`` (``"channel"`` or ``"random"``), ``site``, ``component``, ``score`` (how much
            of the gap between clean and corrupt metric is lost), ``metric``, ``se``, ``n``. The first is the channel.
        unit: of ``score``.
        meta: of every result.
    """

    _things: ClassVar[str] = "changes"

    @property
    def channel(self) -> float:
        """The score of the channel."""
        return float(self.frame["score"].iloc[0])

    @property
    def share_of_random(self) -> float:
        """The share of random changes that do at least as much, either way; the channel counts as one of them."""
        sizes = self.frame["score"].abs()
        return float((sizes >= sizes.iloc[0]).mean())


def channel_effects(
    model: Model,
    task: Task,
    svd: HeadSVD,
    components: int | Sequence[int] | Mapping[str, Sequence[int]] = 0,
    *,
    n_random: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> ChannelEffects:
    """What taking components of heads out does to a task, beside random changes of the same heads and sizes.

    Args:
        model: that the SVD is of.
        task: prompts and metric; the clean prompts run.
        svd: of one head or several; all are changed together.
        components: of every head, or by head.
        n_random: how many random changes.
        seed: of these.
        progress: show a bar.

    Raises:
        OptionError: a component that is not there, or none; weights from a file; fewer than one random change.
        SiteError: a head that the SVD does not have.
        MetricError, PromptError: as of ``mk.patch``.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    check_task(model, task)
    if not isinstance(n_random, int) or n_random < 1:
        raise OptionError(f"n_random = {n_random!r}", expected="a whole number from 1")
    if svd.weights is None or svd.weights.model is None:
        raise OptionError("An SVD of weights from a file", expected="one of a model: mk.svd(model, ...)")
    if svd.meta.get("weights") != model.weights_hash:
        raise OptionError(f"An SVD of other weights than those of {model.name}", expected="mk.svd(model, ...)")
    given = (
        {str(one): some for one, some in components.items()}
        if isinstance(components, Mapping)
        else {str(one): components for one in svd.heads}
    )
    if not given:
        raise OptionError("Components of no head", expected='by head, such as {"9.9": [0]}')
    chosen = {head: svd[head].components_at(some) for head, some in given.items()}
    draw = torch.Generator().manual_seed(seed)
    takes: list[list[Edit]] = [[scaled(svd[head], some, 0.0) for head, some in chosen.items()]]
    for _ in range(n_random):
        takes.append([transform([_site(svd[head])], _random(svd[head], some, draw)) for head, some in chosen.items()])
    runs = EditedRuns(model, task)
    clean = runs.clean
    gap = float((runs.corrupt - clean).mean())
    if abs(gap) < 1e-6:
        raise MetricError(
            f'{task.metric.name} is {float(clean.mean()):.4g} on clean and corrupt prompts of "{task.name}" alike',
            expected="a metric that tells them apart",
        )
    name = " ".join(chosen)
    told = " ".join("+".join(map(str, some)) for some in chosen.values())
    rows = []
    for number, edits in enumerate(tqdm(takes, desc="channels", disable=not progress)):
        values = runs.metric(edits)
        effects = ((values - clean) / gap).double().numpy()
        rows.append(
            {
                "change": "random" if number else "channel",
                "site": name,
                "component": "" if number else told,
                "score": effects.mean(),
                "metric": float(values.mean()),
                "se": effects.std(ddof=1) / np.sqrt(len(effects)) if len(effects) > 1 else np.nan,
                "n": len(effects),
            }
        )
    meta = provenance(
        model, task, "channel_effects", time.perf_counter() - started, matrix=svd.matrix, n_random=n_random, seed=seed
    )
    return ChannelEffects(pd.DataFrame(rows), "fraction of the metric gap", meta)
