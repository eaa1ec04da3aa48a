"""Composition: how much of what one head writes is read by another, from the weights alone.

1. The sender's ``W_OV = sum_i s_i u_i v_i^T`` writes along v_i. The receiver's matrix M reads the stream on its left:
   ``W_QK`` for its query (kind ``"q"``), ``W_QK^T`` for its key (``"k"``), ``W_OV`` for its value (``"v"``).
2. Whole matrices: ``|W_OV M| / (|W_OV| |M|)``, Frobenius norms. One component: ``|v_i^T M| / |M|``; s_i cancels.
3. M is ``A B`` with A ``[d_model, d_head]``, and ``|x A B| = |x A L|`` with ``L L^T = B B^T``. So M's products are with
   ``A L``, and nothing is ever ``d_model`` by ``d_model``; all senders meet all receivers of a layer in one product.
   With ``|W_OV M|^2 = sum_i s_i^2 |v_i^T M|^2`` the whole matrices come with it.
4. Beside it stands what unrelated directions give: for a direction drawn evenly from the sphere, the square has mean
   ``1 / d`` and variance ``2 (t - 1/d) / (d (d + 2))`` with ``t = |M M^T|^2 / |M|^4``; for a matrix turned at random,
   ``2 (t_1 - 1/d) (t_2 - 1/d) / ((d - 1) (d + 2))``. z is the square's distance from its mean in standard
   deviations. These are exact, nothing is sampled. d is ``d_model``, less 1 where writes and reads have no mean.

Elhage et al. 2021 for whole matrices; Merullo et al. 2024 (arXiv 2406.09519), section 3.2, for components.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..errors import OptionError, SiteError
from ..results import Table
from ..sites import HeadSet, Site, SitesLike, site
from .factored import decomposed, factors, turns_of
from .head_weights import HeadWeights
from .rotation import read_offsets
from .subspace import Subspace

if TYPE_CHECKING:
    from ..model import Model

KINDS = ("q", "k", "v")
_NOTHING = 1e-30
_NUMBERS = 1 << 24  # that a product of senders and receivers puts out at once


@dataclass(frozen=True, eq=False, repr=False)
class Composition(Table):
    """Composition of senders with receivers.

    Attributes:
        frame: a row a pair, and one a component of the sender: ``sender``, ``receiver``, ``kind``, ``component`` (from
            0; missing: the whole matrix), ``score``, ``baseline`` (the root of the mean square of unrelated
            directions), ``z`` (missing: a component of size 0).
        unit: of ``score``.
        meta: model, weights, kind, offset, options.
        weights: where they are from; None once saved and loaded.
    """

    weights: HeadWeights | None = None

    _things: ClassVar[str] = "pairs and components"

    def of_pair(self, sender: str | Site, receiver: str | Site) -> pd.DataFrame:
        """The rows of one pair, the largest z first.

        Raises:
            SiteError: there are none.
        """
        frame = self.frame
        rows = frame.loc[(frame["sender"] == str(site(sender))) & (frame["receiver"] == str(site(receiver)))]
        if rows.empty:
            raise SiteError(
                f'"{sender}" to "{receiver}" is not among the pairs', expected="a sender in an earlier layer"
            )
        return rows.sort_values(by="z", ascending=False, kind="stable").reset_index(drop=True)

    def outliers(self, z: float = 4.0, k: int | None = None) -> pd.DataFrame:
        """The components that stand out, the largest z first.

        Args:
            z: how many standard deviations above unrelated directions, at least.
            k: how many at most.
        """
        rows = self.frame.loc[self.frame["component"].notna() & (self.frame["z"] >= z)]
        return rows.sort_values(by="z", ascending=False, kind="stable").head(k or len(rows)).reset_index(drop=True)

    def pairs(self) -> pd.DataFrame:
        """A row a pair: ``score`` and ``z`` of the whole matrices, and of the component with the largest z."""
        frame = self.frame
        keys = ["sender", "receiver"]
        wholes = frame.loc[frame["component"].isna()].drop(columns="component")
        parts = frame.loc[frame["component"].notna()]
        if parts.empty:
            return wholes.reset_index(drop=True)
        parts = parts.dropna(subset=["z"])
        top = parts.loc[parts.groupby(keys, observed=True)["z"].idxmax()]
        top = top.rename(columns={"component": "top_component", "score": "top_score", "z": "top_z"})
        return wholes.merge(top[[*keys, "top_component", "top_score", "top_z"]], on=keys).reset_index(drop=True)

    def channel(self, sender: str | Site, receiver: str | Site, k: int = 1) -> Subspace:
        """The directions along which the sender speaks to the receiver most: v_i of the k components of largest z.

        Raises:
            SiteError: a pair that is not there.
            OptionError: no components were scored, or fewer than k; a table that was loaded from a file.
        """
        chosen = self.components(sender, receiver, k)
        if self.weights is None:
            raise OptionError("A channel of a loaded table", fix="Call mk.composition again, which has the weights")
        _, _, right = decomposed(*factors(self.weights, self.weights.heads([sender]), "ov"))
        return Subspace(right[0, chosen], f"{sender} to {receiver}.{self.meta.get('kind')}: {chosen}")

    def components(self, sender: str | Site, receiver: str | Site, k: int = 1) -> list[int]:
        """The sender's k components with the largest z to a receiver.

        Raises:
            SiteError, OptionError: as of ``channel``.
        """
        ordered = [int(one) for one in self.of_pair(sender, receiver)["component"].dropna()]
        if not 1 <= k <= len(ordered):
            raise OptionError(f"k = {k} of {len(ordered)} components", expected="mk.composition with components=True")
        return ordered[:k]


def composition(
    model: Model | HeadWeights | str | Path,
    senders: SitesLike | None = None,
    receivers: SitesLike | None = None,
    kind: Literal["q", "k", "v"] = "q",
    components: bool = True,
    *,
    offset: int | Sequence[int] = 0,
    n_heads: int | None = None,
    fold_norm: bool = True,
    centre: bool | None = None,
) -> Composition:
    """How much of what senders write is read by receivers; see the module.

    Args:
        model: a loaded model, weights, or a ``.safetensors`` file.
        senders, receivers: heads; left out: all. Pairs are those whose sender is in an earlier layer. Receivers may
            be written with the kind: ``"9.9.q"``.
        kind: ``"q"``, ``"k"`` or ``"v"``: what of the receiver reads.
        components: every singular component of the sender's W_OV too, not only the whole.
        offset: of ``"q"`` and ``"k"`` on a model that rotates queries and keys; as of ``mk.svd``.
        n_heads, fold_norm, centre: as of ``HeadWeights.load``.

    Raises:
        SiteError: a head that is not there; receivers that no sender comes before.
        OptionError: another kind; an offset that cannot be seen, or of ``"v"``, or of a file, other than 0.
        LoadError, UnsupportedError: as of ``HeadWeights.load``.
    """
    started = time.perf_counter()
    if kind not in KINDS:
        raise OptionError(f"kind = {kind!r}", expected="one of " + ", ".join(KINDS))
    if kind == "v" and read_offsets(offset) != (0,):
        raise OptionError(f"offset = {offset!r} of values", expected='an offset with kind="q" or "k"')
    weights = HeadWeights.load(model, n_heads, fold_norm=fold_norm, centre=centre)
    froms, tos = weights.heads(senders), _receivers(weights, receivers, kind)
    first, last = min(one.layer for one in froms), max(one.layer for one in tos)
    if first >= last:
        raise SiteError(
            f"No sender is in a layer before the receivers: {first} against {last}",
            expected="senders in earlier layers",
        )
    froms = HeadSet([one for one in froms if one.layer < last], weights.n_heads)
    tos = HeadSet(sorted(one for one in tos if one.layer > first), weights.n_heads)
    _, values, right = decomposed(*factors(weights, froms, "ov"))
    reads, squared = _readers(weights, tos, kind, offset)
    dimensions = weights.d_model - (weights.centred and weights.folded and weights.mean_unseen)
    tables = [
        _rows(froms, tos, some, shares, values, squared, components, dimensions)
        for some, shares in _shares(froms, tos, right, reads, squared)
    ]
    frame = _frame(pd.concat(tables, ignore_index=True), froms, tos, kind)
    meta = {
        **weights.meta,
        "method": f"composition: {kind}",
        "kind": kind,
        "offset": list(offset) if isinstance(offset, Sequence) else int(offset),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return Composition(frame, "norm of the product, over the product of norms", meta, weights)


def _receivers(weights: HeadWeights, receivers: SitesLike | None, kind: str) -> HeadSet:
    if receivers is None or receivers == "heads":
        return weights.heads()
    from ..sites import sites

    chosen = []
    for one in sites(receivers):
        if one.kind not in ("z", kind) or one.head is None or one.grouped:
            raise SiteError(f'"{one}" as a receiver of kind "{kind}"', expected=f'heads, such as "9.9" or "9.9.{kind}"')
        chosen.append(Site(one.layer, one.head))
    return weights.heads(chosen)


def _readers(weights: HeadWeights, heads: HeadSet, kind: str, offset: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """``A L`` of each receiver ``[heads, d_model, d_head]``, and its squared singular values ``[heads, d_head]``."""
    a, b = factors(
        weights, heads, "ov" if kind == "v" else "qk", None if kind == "v" else turns_of(weights, heads, offset)
    )
    if kind == "k":
        a, b = b.mT, a.mT
    _, r = torch.linalg.qr(b.mT)  # B^T = Q R, so B B^T = R^T R
    reads = a @ r.mT
    return reads, torch.linalg.svdvals(torch.linalg.qr(reads).R).square()


def _shares(
    froms: HeadSet, tos: HeadSet, right: Tensor, reads: Tensor, squared: Tensor
) -> Iterator[tuple[tuple[Tensor, slice], Tensor]]:
    """``|v_i^T M|^2 / |M|^2`` ``[senders, components, receivers]`` of some senders and the receivers after them."""
    layers = torch.tensor([one.layer for one in tos])
    norms = squared.sum(-1)
    r = right.shape[1]
    wide = reads.permute(1, 0, 2)  # [d_model, receivers, d_head]
    step = max(1, _NUMBERS // (r * wide.shape[1] * wide.shape[2]))
    order = sorted({one.layer for one in froms})
    for layer in order:
        members = [i for i, one in enumerate(froms) if one.layer == layer]
        first = int((layers <= layer).sum())
        if first == len(layers):
            continue
        after = wide[:, first:].flatten(1)
        for some in torch.tensor(members).split(step):
            products = right[some].flatten(0, 1) @ after
            squares = products.view(len(some), r, len(layers) - first, -1).square().sum(-1)
            yield (some, slice(first, len(layers))), squares / norms[first:].clamp_min(_NOTHING)


def _rows(
    froms: HeadSet,
    tos: HeadSet,
    where: tuple[Any, slice],
    shares: Tensor,
    values: Tensor,
    squared: Tensor,
    components: bool,
    d: int,
) -> pd.DataFrame:
    """Scores of whole matrices, and of components, as columns of numbers; heads by their place in the sets."""
    some, after = where
    n, r, m = shares.shape
    own = values[some].square().double()
    there = values[some] > 1e-6 * values[some, :1].clamp_min(_NOTHING)  # others are no directions of the head [n, r]
    own = own / own.sum(-1, keepdim=True).clamp_min(_NOTHING)  # [n, r]
    reads = squared[after].double()
    reads = reads / reads.sum(-1, keepdim=True).clamp_min(_NOTHING)
    spread = (reads.square().sum(-1) - 1 / d).clamp_min(0)  # t - 1/d of each receiver [m]
    mine = (own.square().sum(-1) - 1 / d).clamp_min(0)  # the same of each sender [n]
    shares = shares.double()
    whole = (own[:, :, None] * shares).sum(1, keepdim=True)  # [n, 1, m]
    deviation = (2 * mine[:, None, None] * spread / ((d - 1) * (d + 2))).sqrt()
    z = ((whole - 1 / d) / deviation.clamp_min(1e-12)).masked_fill(~there[:, :1, None], torch.nan)
    number = torch.full((1,), -1)
    if components:
        by_component = (2 * spread / (d * (d + 2))).sqrt().clamp_min(1e-12)
        shares = shares.masked_fill(~there[..., None], torch.nan)
        z = torch.cat([z, (shares - 1 / d) / by_component], 1)
        whole = torch.cat([whole, shares], 1)
        number = torch.arange(-1, r)
    shape = (n, len(number), m)
    grid = (some[:, None, None], torch.arange(after.start, after.stop), number[:, None])
    sender, receiver, component = (one.expand(shape).flatten().numpy() for one in grid)
    return pd.DataFrame(
        {
            "sender": sender.astype(np.int32),
            "receiver": receiver.astype(np.int32),
            "component": component.astype(np.int16),
            "score": whole.sqrt().flatten().cpu().numpy().astype(np.float32),
            "z": z.flatten().cpu().numpy().astype(np.float32),
            "baseline": np.float32(d**-0.5),
        }
    )


def _frame(numbers: pd.DataFrame, froms: HeadSet, tos: HeadSet, kind: str) -> pd.DataFrame:
    """The same with heads by name."""
    component = pd.arrays.IntegerArray(numbers["component"].to_numpy(), (numbers["component"] < 0).to_numpy())
    return pd.DataFrame(
        {
            "sender": pd.Categorical.from_codes(numbers["sender"], [str(one) for one in froms]),
            "receiver": pd.Categorical.from_codes(numbers["receiver"], [str(one) for one in tos]),
            "kind": pd.Categorical.from_codes(np.zeros(len(numbers), np.int8), [kind]),
            "component": component,
            "score": numbers["score"],
            "baseline": numbers["baseline"],
            "z": numbers["z"],
        }
    )
