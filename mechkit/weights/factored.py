"""W_OV and W_QK as two factors, whose product is never made, and the SVD of such a product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from ..sites import HeadSet
from .head_weights import HeadWeights
from .rotation import read_offsets, rotations


def factors(weights: HeadWeights, heads: HeadSet, matrix: str, turns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A ``[heads, d_model, d_head]`` and B ``[heads, d_head, d_model]`` whose product is W_OV or W_QK."""
    if matrix == "ov":
        return weights.of_heads("v", heads), weights.of_heads("o", heads)
    query, key = weights.of_heads("q", heads), weights.of_heads("k", heads).mT
    return (query if turns is None else query @ turns), key


def decomposed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of ``A B``: U ``[..., m, r]``, S ``[..., r]``, Vh ``[..., r, n]``, r the inner width.

    Args:
        a: ``[..., m, r]``.
        b: ``[..., r, n]``.
    """
    q_a, r_a = torch.linalg.qr(a)
    q_b, r_b = torch.linalg.qr(b.mT)
    u, s, vh = torch.linalg.svd(r_a @ r_b.mT)
    left, right = q_a @ u, vh @ q_b.mT
    at = right.abs().argmax(-1, keepdim=True)
    signs = right.gather(-1, at).sign()  # [..., r, 1]
    return left * signs.mT, s, right * signs


def turns_of(weights: HeadWeights, heads: HeadSet, offset: int | Sequence[int]) -> Tensor | None:
    """T of each head ``[heads, d_head, d_head]``; None where nothing stands between queries and keys.

    Raises:
        OptionError: an offset of weights from a file, which do not tell how queries and keys are rotated.
    """
    offsets = read_offsets(offset)
    if weights.model is None:
        if offsets != (0,):
            raise OptionError(f"offset = {offset!r} of weights from a file", expected="a model, which rotates")
        return None
    if offsets not in weights.turns:
        weights.turns[offsets] = rotations(weights.model, offsets).to(weights.W_Q.dtype)
    found = weights.turns[offsets]
    return found[torch.tensor([one.layer for one in heads]), torch.tensor([one.head for one in heads])]
