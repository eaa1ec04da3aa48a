"""What stands between the stream and a head's matrices, folded into them.

1. A norm is told from its values: takes the mean off or not, times a gain, plus a bias. Its scale stays out.
2. In front of attention: ``(C g x + b) W = x (C g W) + b W``, C taking the mean off. Behind attention: ``W C g``.
3. What is written is centred where nobody sees its mean.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", on folding norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.norms import Norm, default_epsilon
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..model import Model


@dataclass(frozen=True, eq=False)
class Affine:
    """What a norm does besides scaling: take the mean off, multiply, add.

    Attributes:
        there: there is a norm; without, the rest says nothing.
        centres: it takes the mean off.
        gain, bias: ``[d_model]``; None where it has none.
    """

    there: bool
    centres: bool = False
    gain: Tensor | None = None
    bias: Tensor | None = None

    def before(self, matrix: Tensor) -> Tensor:
        """A matrix that reads what the norm puts out, made to read what goes in: ``[..., d_model, d_head]``."""
        folded = matrix if self.gain is None else self.gain[:, None] * matrix
        return folded - folded.mean(-2, keepdim=True) if self.centres else folded

    def behind(self, matrix: Tensor) -> Tensor:
        """A matrix that writes what goes in, made to write what comes out: ``[..., d_head, d_model]``."""
        folded = matrix - matrix.mean(-1, keepdim=True) if self.centres else matrix
        return folded if self.gain is None else folded * self.gain


def made_of(
    name: str,
    matrices: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    reads: list[Affine],
    writes: list[Affine],
    times: float,
    mean_unseen: bool,
    fold_norm: bool,
    centre: bool | None,
) -> dict[str, Any]:
    """The fields of ``HeadWeights``, folded and centred as asked.

    Args:
        name: of the model.
        matrices: ``"q"``, ``"k"``, ``"v"``, ``"o"``, as they are in the model.
        biases: those of q, k and v that are there.
        reads, writes: the norms before and behind attention, by layer.
        times: what writes are multiplied by.
        mean_unseen: every norm takes the mean off.
        fold_norm, centre: see ``HeadWeights.load``.
    """
    of, biases = dict(matrices), dict(biases)
    if fold_norm:
        for kind in "qkv":
            added = [
                torch.zeros(*of[kind][layer].shape[::2]) if one.bias is None else one.bias.cpu() @ of[kind][layer].cpu()
                for layer, one in enumerate(reads)
            ]
            if any(one.bias is not None for one in reads):
                extra = torch.stack(added).to(of[kind])
                biases[kind] = biases[kind] + extra if kind in biases else extra
            of[kind] = torch.stack([one.before(of[kind][layer]) for layer, one in enumerate(reads)])
        of["o"] = torch.stack([one.behind(of["o"][layer]) for layer, one in enumerate(writes)]) * times
    centred = mean_unseen if centre is None else centre
    if centred:
        of["o"] = of["o"] - of["o"].mean(-1, keepdim=True)
    named = {f"W_{kind.upper()}": matrix for kind, matrix in of.items()}
    told = {"folded": fold_norm, "centred": centred, "mean_unseen": mean_unseen}
    return {"name": name, **named, "biases": biases, **told}


def made_how(made: Mapping[str, Any]) -> dict[str, Any]:
    """What was done to the weights, for provenance."""
    return {"fold_norm": made["folded"], "centre": made["centred"]}


def affine(module: Any, model: Model) -> Affine:
    """What a norm of a model does besides scaling, told from its values; None: there is no norm.

    Raises:
        UnsupportedError: it is neither LayerNorm nor RMSNorm.
    """
    if module is None:
        return Affine(False)
    device = next(model.hf.parameters()).device
    draw = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(8, model.d_model, generator=draw).to(device)  # a mean that is worth taking off
    x = x.to(next(model.hf.parameters()).dtype)
    out = module(x)
    norm = Norm(module, default_epsilon(model.hf.config), lambda what: _odd(model, what))
    norm.parts(x, out)
    return Affine(True, norm.centres, norm.gain, None if norm.bias is None else norm.bias.detach().float())


def _odd(model: Model, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model.name} has {what}", fix="Take the weights as they are: fold_norm=False, centre=False"
    )
