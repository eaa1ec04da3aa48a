"""Singular directions of heads: what a head reads, and what it makes of it, one direction at a time.

1. W_OV = W_V W_O and W_QK = W_Q W_K^T are ``d_model`` by ``d_model`` and of rank ``d_head``. Neither is ever made:
   with thin QR, ``A B = Q_A (R_A R_B^T) Q_B^T``, and the SVD is that of a ``d_head`` by ``d_head`` core. All heads go
   in one batch.
2. ``M = sum_i s_i u_i v_i^T``. Of OV, a head reads the stream along u_i and writes s_i times that along v_i. Of QK, a
   score is the sum of ``s_i (x_query u_i) (x_key v_i)``.
3. Signs are free in pairs. Here the entry of v_i with the largest size is positive.
4. Where queries and keys are rotated, W_QK depends on how far apart they stand: ``W_Q T W_K^T``, T from ``rotation``.
   ``offset=0`` is the same position, several offsets are averaged.

Merullo et al. 2024 (arXiv 2406.09519), section 3; Millidge and Black 2022 for directions read through the vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
import torch
from torch import Tensor

from ..edits import Transform
from ..errors import OptionError, SiteError
from ..results import Table
from ..sites import HeadSet, Site, SitesLike, site
from .channels import scaled, set_to
from .factored import decomposed, factors, turns_of
from .head_weights import HeadWeights
from .rotation import read_offsets
from .subspace import Subspace

if TYPE_CHECKING:
    from ..model import Model

MATRICES = ("ov", "qk")


@dataclass(frozen=True, eq=False, repr=False)
class HeadSVD(Table):
    """Singular values and directions of heads; ``svd["9.9"]`` is one of them.

    Attributes:
        frame: a row a component: ``site``, ``layer``, ``head``, ``kind`` (``"ov"`` or ``"qk"``), ``component`` (from 0,
            the largest first), ``score`` (the singular value), ``share`` (of the matrix's squared norm).
        unit: of ``score``.
        meta: model, weights, matrix, offset, options.
        heads: in the order of the tensors.
        weights: where they are from.
        matrix: ``"ov"`` or ``"qk"``.
        left: u_i ``[heads, d_model, d_head]``.
        values: s_i ``[heads, d_head]``.
        right: v_i ``[heads, d_head, d_model]``.
        turns: T of each head ``[heads, d_head, d_head]``, of QK; None: none.
    """

    heads: HeadSet = field(default_factory=HeadSet)
    weights: HeadWeights | None = None
    matrix: str = "ov"
    left: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    right: Tensor = field(default_factory=lambda: torch.empty(0))
    turns: Tensor | None = None

    _things: ClassVar[str] = "components"

    def __getitem__(self, head: str | Site | tuple[int, int]) -> HeadSVD:
        """Those of one head.

        Raises:
            SiteError: a head that was not asked for.
        """
        chosen = site(head)
        if chosen not in self.heads:
            raise SiteError(f'"{chosen}" is not among the heads', expected=str(self.heads))
        i = slice(at := list(self.heads).index(chosen), at + 1)
        frame = self.frame.loc[self.frame["site"] == str(chosen)].reset_index(drop=True)
        turns = None if self.turns is None else self.turns[i]
        parts = {"left": self.left[i], "values": self.values[i], "right": self.right[i], "turns": turns}
        return replace(self, frame=frame, heads=HeadSet([chosen], self.heads.heads_per_layer), **parts)

    @property
    def U(self) -> Tensor:  # noqa: N802, the field's name
        """u_i of one head as columns ``[d_model, d_head]``; of several ``[heads, d_model, d_head]``."""
        return self._single(self.left)

    @property
    def S(self) -> Tensor:  # noqa: N802
        """s_i of one head ``[d_head]``; of several ``[heads, d_head]``."""
        return self._single(self.values)

    @property
    def Vh(self) -> Tensor:  # noqa: N802
        """v_i of one head as rows ``[d_head, d_model]``; of several ``[heads, d_head, d_model]``."""
        return self._single(self.right)

    def scale(self, components: int | Sequence[int], alpha: float) -> Transform:
        """The edit that multiplies components of one head; 0 takes them out. See ``weights.channels``."""
        return scaled(self, self.components_at(components), alpha)

    def remove(self, components: int | Sequence[int]) -> Transform:
        """The edit that takes components of one head out."""
        return self.scale(components, 0.0)

    def set(self, coordinates: Mapping[int, float]) -> Transform:
        """The edit that sets what one head writes (of QK: what its query reads) along components."""
        return set_to(self, coordinates)

    def reconstructed(self, components: Sequence[int] | None = None) -> Tensor:
        """The matrix, or some components of it ``[d_model, d_model]``; of several heads ``[heads, ...]``. Large."""
        chosen = slice(None) if components is None else self.components_at(components)
        whole = (self.left[:, :, chosen] * self.values[:, None, chosen]) @ self.right[:, chosen]
        return self._single(whole)

    def subspace(self, components: int | Sequence[int] = 0, side: Literal["write", "read"] = "write") -> Subspace:
        """What is spanned by directions of one head.

        Args:
            components: which.
            side: of OV, ``"write"`` (v_i) or ``"read"`` (u_i); of QK, what the query reads is ``"read"``, and what the
                key reads is ``"write"``.

        Raises:
            SiteError: there are several heads.
            OptionError: a component that is not there, or another side.
        """
        head, chosen = self.only, self.components_at(components)
        if side not in ("write", "read"):
            raise OptionError(f"side = {side!r}", expected='"write" or "read"')
        basis = self.right[0, chosen] if side == "write" else self.left[0][:, chosen].T
        return Subspace(basis, f"{head} {self.matrix} {side} {' '.join(map(str, chosen))}")

    def tokens(self, component: int = 0, k: int = 10, side: Literal["write", "read"] | None = None) -> pd.DataFrame:
        """The tokens at both ends of a direction, through the vocabulary.

        What is written is read by the unembedding, behind the last norm's gain; what is read is compared with the
        token embeddings, divided by their length. Directions are read at both ends, since their sign is a convention.

        Args:
            component: which.
            k: how many tokens at each end.
            side: as of ``subspace``; left out: both.

        Returns:
            Columns ``side``, ``end`` (``"+"``, ``"-"``), ``rank``, ``token``, ``id``, ``score``.

        Raises:
            SiteError: there are several heads.
            UnsupportedError: the weights came from a file: there is no vocabulary.
        """
        from .vocabulary import Vocabulary

        (i,) = self.components_at(component)
        head = self.only
        if side not in (None, "write", "read"):
            raise OptionError(f"side = {side!r} of {head}", expected='"write" or "read"')
        assert self.weights is not None
        vocabulary = Vocabulary.of(self.weights)
        tables = []
        for one in ("read", "write") if side is None else (side,):
            direction = self.right[0, i] if one == "write" else self.left[0][:, i]
            seen = (
                vocabulary.written(direction) if one == "write" and self.matrix == "ov" else vocabulary.read(direction)
            )
            tables.append(vocabulary.ends(seen, k).assign(side=one))
        columns = ["side", "end", "rank", "token", "id", "score"]
        return pd.concat(tables, ignore_index=True).reindex(columns=columns)

    @property
    def only(self) -> Site:
        """The one head.

        Raises:
            SiteError: there are several.
        """
        if len(self.heads) != 1:
            raise SiteError(f"{len(self.heads)} heads", expected='one of them, such as svd["9.9"]')
        return next(iter(self.heads))

    def _single(self, tensor: Tensor) -> Tensor:
        return tensor[0] if len(self.heads) == 1 else tensor

    def components_at(self, components: int | Sequence[int]) -> list[int]:
        """Numbers of components, checked.

        Raises:
            OptionError: one that is not there, or one twice; a table that was loaded from a file.
        """
        if self.weights is None:
            raise OptionError("Directions of a loaded table", fix="Call mk.svd again, which has the weights")
        count = self.values.shape[1]
        try:
            chosen = [index(i) for i in ([components] if isinstance(components, Integral) else components)]  # type: ignore
        except TypeError:
            chosen = []
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= i < count for i in chosen):
            raise OptionError(f"Components {components}", expected=f"different numbers from 0 to {count - 1}")
        return chosen


def svd(
    model: Model | HeadWeights | str | Path,
    heads: SitesLike | None = None,
    matrix: Literal["ov", "qk"] = "ov",
    *,
    offset: int | Sequence[int] = 0,
    n_heads: int | None = None,
    fold_norm: bool = True,
    centre: bool | None = None,
) -> HeadSVD:
    """Singular values and directions of W_OV or W_QK of heads.

    Args:
        model: a loaded model, weights, or a ``.safetensors`` file.
        heads: addresses; left out, or ``"heads"``: all.
        matrix: ``"ov"`` or ``"qk"``.
        offset: of QK on a model that rotates queries and keys, how far before the query the key stands; several are
            averaged. 0: at the same position.
        n_heads, fold_norm, centre: as of ``HeadWeights.load``; weights that are loaded already are as they are.

    Raises:
        SiteError: a head that is not there.
        OptionError: another matrix; an offset that cannot be seen, or of OV, or of a file other than 0.
        LoadError, UnsupportedError: as of ``HeadWeights.load``.
    """
    started = time.perf_counter()
    if matrix not in MATRICES:
        raise OptionError(f"matrix = {matrix!r}", expected='"ov" or "qk"')
    weights = HeadWeights.load(model, n_heads, fold_norm=fold_norm, centre=centre)
    chosen = weights.heads(heads)
    turns = turns_of(weights, chosen, offset) if matrix == "qk" else None
    if matrix == "ov" and read_offsets(offset) != (0,):
        raise OptionError(f"offset = {offset!r} of OV", expected='an offset with matrix="qk"')
    left, values, right = decomposed(*factors(weights, chosen, matrix, turns))
    return HeadSVD(
        _table(chosen, matrix, values),
        "singular value",
        {
            **weights.meta,
            "method": "svd",
            "matrix": matrix,
            "offset": list(offset) if isinstance(offset, Sequence) else int(offset),
            "seconds": round(time.perf_counter() - started, 2),
        },
        chosen,
        weights,
        matrix,
        left,
        values,
        right,
        turns,
    )


def _table(heads: HeadSet, matrix: str, values: Tensor) -> pd.DataFrame:
    n, r = values.shape
    share = values.square() / values.square().sum(-1, keepdim=True)
    every: dict[str, Any] = {
        "site": [str(one) for one in heads for _ in range(r)],
        "layer": [one.layer for one in heads for _ in range(r)],
        "head": pd.array([one.head for one in heads for _ in range(r)], dtype="Int64"),
        "kind": matrix,
        "component": list(range(r)) * n,
        "score": values.flatten().cpu().numpy(),
        "share": share.flatten().cpu().numpy(),
    }
    return pd.DataFrame(every)
