"""Directions of the residual stream as an object: coordinates of activations in it, and activations without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError


@dataclass(frozen=True, eq=False)
class Subspace:
    """What is spanned by some directions.

    Attributes:
        basis: orthonormal rows ``[k, d_model]``. Directions that are orthonormal already stay as they are; others are
            made so one after the other, each keeping what it has beyond those before it.
        name: where it is from.
    """

    basis: Tensor
    name: str = "subspace"

    def __post_init__(self) -> None:
        given = self.basis
        if given.ndim != 2 or not len(given) or not bool(given.isfinite().all()):
            raise OptionError(f"Directions of shape {list(given.shape)}", expected="finite rows [k, d_model]")
        q, r = torch.linalg.qr(given.float().mT)
        steps = r.diagonal()
        if len(given) > given.shape[1] or bool((steps.abs() <= 1e-5 * given.float().norm(dim=-1)).any()):
            raise OptionError(f"{len(given)} directions that depend on each other", expected="independent ones")
        object.__setattr__(self, "basis", (q * steps.sign()).mT.contiguous())

    @property
    def dimensions(self) -> int:
        """How many directions."""
        return len(self.basis)

    def coordinates(self, activations: Tensor) -> Tensor:
        """Of activations ``[..., d_model]``, along each direction ``[..., k]``.

        Raises:
            OptionError: activations of another width.
        """
        if activations.shape[-1] != self.basis.shape[1]:
            raise OptionError(
                f"Activations of width {activations.shape[-1]}", expected=f"d_model = {self.basis.shape[1]}"
            )
        return activations.to(self.basis) @ self.basis.mT

    def projected(self, activations: Tensor) -> Tensor:
        """What of activations is in the subspace, of the same shape."""
        return self.coordinates(activations) @ self.basis

    def without(self, activations: Tensor) -> Tensor:
        """What of activations is not."""
        return activations.to(self.basis) - self.projected(activations)

    def __repr__(self) -> str:
        return f"Subspace({self.name!r}, {len(self.basis)} of {self.basis.shape[1]} dimensions)"
