"""Weights of heads of a model that runs elsewhere: each matrix is fetched when it is asked for, once.

1. At first only shapes come, and what is small: biases, and whether the norms take means off.
2. The matrices of the heads that are asked for are folded there and fetched in one request, and kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..results import model_provenance
from ..sites import HeadSet
from .folding import made_how
from .head_weights import HeadWeights, Matrix

if TYPE_CHECKING:
    from ..model import Model

_LAYERS_AT_ONCE = 4
_Key = tuple[str, int, int]  # matrix, layer, head or group


@dataclass(frozen=True, eq=False, repr=False)
class FarHeadWeights(HeadWeights):
    """As ``HeadWeights``; ``W_Q`` and its like have the shapes alone, and ``of_heads`` fetches.

    Attributes:
        asked: how they were asked for: ``fold_norm``, ``centre``.
        fetched: what is here, by matrix, layer and head (or group).
    """

    asked: tuple[bool, bool | None] = (True, None)
    fetched: dict[_Key, Tensor] = field(default_factory=dict)

    def of_heads(self, kind: Matrix, heads: HeadSet) -> Tensor:
        """One of the matrices for some heads ``[heads, ...]``."""
        share = self.n_heads // getattr(self, f"W_{kind.upper()}").shape[1]
        keys: list[_Key] = [(kind, one.layer, (one.head or 0) // share) for one in heads]
        self._fetch(keys)
        return torch.stack([self.fetched[key] for key in keys])

    def expanded(self, kind: Matrix) -> Tensor:
        """A matrix of every query head ``[layers, heads, ...]``; all of it is fetched."""
        return self.of_heads(kind, self.heads()).unflatten(0, (self.n_layers, self.n_heads))

    def _fetch(self, keys: Sequence[_Key]) -> None:
        missing = [key for key in dict.fromkeys(keys) if key not in self.fetched]
        if missing:
            assert self.model is not None
            found = _matrices(self.model, missing, *self.asked)
            self.fetched.update(zip(missing, found, strict=True))


def far_weights(model: Model, fold_norm: bool, centre: bool | None) -> FarHeadWeights:
    """The weights of a model that runs elsewhere, none of them fetched yet."""
    shapes, made = _outline(model, fold_norm, centre)
    matrices = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    meta = {**model_provenance(model), **made_how(made)}
    return FarHeadWeights(model.name, **matrices, **made, model=model, meta=meta, asked=(fold_norm, centre))


@where_the_model_is
def _outline(
    model: Model, fold_norm: bool, centre: bool | None
) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, Any]]:
    """Shapes of the matrices, and the other fields of ``HeadWeights``."""
    shapes: dict[str, tuple[int, ...]] = {}
    biases: dict[str, list[Tensor]] = {}
    one: HeadWeights | None = None
    for layers in torch.arange(model.n_layers).split(_LAYERS_AT_ONCE):
        one = HeadWeights.of_layers(model, layers.tolist(), fold_norm, centre)
        shapes = {f"W_{kind}": (model.n_layers, *getattr(one, f"W_{kind}").shape[1:]) for kind in "QKVO"}
        for kind, bias in one.biases.items():
            biases.setdefault(kind, []).append(bias.cpu())
    assert one is not None
    whole = {kind: torch.cat(some) for kind, some in biases.items()}
    return shapes, {
        "biases": whole,
        "folded": one.folded,
        "centred": one.centred,
        "mean_unseen": one.mean_unseen,
    }


@where_the_model_is
def _matrices(model: Model, keys: Sequence[_Key], fold_norm: bool, centre: bool | None) -> list[Tensor]:
    found: dict[_Key, Tensor] = {}
    for layers in torch.tensor(sorted({layer for _, layer, _ in keys})).split(_LAYERS_AT_ONCE):
        some = layers.tolist()
        weights = HeadWeights.of_layers(model, some, fold_norm, centre)
        for key in keys:
            if key[1] in some:
                found[key] = getattr(weights, f"W_{key[0].upper()}")[some.index(key[1]), key[2]].cpu()
    return [found[key] for key in keys]
