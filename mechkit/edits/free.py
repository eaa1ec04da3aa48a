"""The tensors of an edit that can be fitted, and the edit with others in their place.

1. ``free`` lists them, a tensor a site, with where a fit begins and the value at which the edit changes nothing.
2. ``with_tensors`` puts tensors there, in that order. They may ask for gradients: what the backend makes of an edit is
   differentiable in its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import EditError
from ..sites import Site
from .kinds import Attend, Edit, Inject, Scale, Steer, Transform, of_site

if TYPE_CHECKING:
    from ..backends.protocol import ModelInfo


@dataclass(frozen=True, eq=False)
class Free:
    """A tensor of an edit that can be fitted.

    Attributes:
        site: whose it is.
        name: ``vector``, ``alpha``, ``gate``, ``bias``, ``matrix`` or ``shift``.
        start: where fitting begins: what the edit has, else the neutral value (of a gate: one half).
        neutral: the value at which the edit changes nothing.
        unit: it lies between 0 and 1.
    """

    site: Site
    name: str
    start: Tensor
    neutral: Tensor
    unit: bool = False


def free(edit: Edit, info: ModelInfo) -> list[Free]:
    """The tensors of an edit that can be fitted, in float32; none of an edit that has none.

    Args:
        edit: any.
        info: of the model, for the widths of its sites.

    Returns:
        Of ``steer`` a vector a site, of ``scale`` and ``inject`` an alpha or a gate, of ``transform`` a matrix and a
        shift, of ``attend`` with a bias the bias.
    """
    return [_free(edit, name, site, info) for site in edit.sites for name in _names(edit)]


def with_tensors(edit: Edit, tensors: Sequence[Tensor]) -> Edit:
    """The edit with other tensors, in the order of ``free``.

    Raises:
        EditError: more or fewer tensors than it has.
    """
    names = _names(edit)
    if len(tensors) != len(names) * len(edit.sites):
        raise EditError(
            f"{len(tensors)} tensors for {edit}",
            expected=f"{len(names) * len(edit.sites)}, as many as mk.edits.free gives",
        )
    found = {
        ("value" if name == "bias" else name): dict(zip(edit.sites, tensors[number :: len(names)], strict=True))
        for number, name in enumerate(names)
    }
    return replace(edit, **found) if found else edit


def _names(edit: Edit) -> tuple[str, ...]:
    match edit:
        case Steer():
            return ("vector",)
        case Scale():
            return ("alpha",)
        case Inject():
            return ("gate",)
        case Transform():
            return ("matrix", "shift")
        case Attend(how="bias"):
            return ("bias",)
    return ()


def _free(edit: Edit, name: str, site: Site, info: ModelInfo) -> Free:
    own = of_site(getattr(edit, "value" if name == "bias" else name), site)
    info.check(site)
    width = _width(site, info)
    if own is None:
        neutral = _neutral(name, torch.empty(() if name == "gate" else width))
        return Free(site, name, torch.tensor(0.5) if name == "gate" else neutral, neutral, name == "gate")
    start = torch.as_tensor(own).detach().float().clone()
    return Free(site, name, start, _neutral(name, start), name == "gate")


def _neutral(name: str, like: Tensor) -> Tensor:
    if name == "matrix":
        return torch.eye(len(like), device=like.device)
    return torch.ones_like(like) if name == "alpha" else torch.zeros_like(like)


def _width(site: Site, info: ModelInfo) -> tuple[int, ...]:
    """Shape of one value of a site at one position; attention has one number for all."""
    if site.kind in ("pattern", "scores"):
        return ()
    return (info.d_model,) if site.head is None else (info.d_head,)
