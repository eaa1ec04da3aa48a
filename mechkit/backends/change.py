"""Carry out an edit on the tensor of one kind of site in one layer.

Every function made here takes a tensor it may write to, in the layouts of ``protocol``, and gives it back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from ..edits import Ablate, Edit, PatchIn, Scale, Steer
from ..errors import EditError, SiteError
from ..sites import Site
from .protocol import ModelInfo

Change: TypeAlias = "Callable[[Tensor], Tensor]"
_BY_HEAD = ("pattern", "scores")


def changed(edit: Edit, info: ModelInfo) -> dict[tuple[str, int], Change]:
    """The functions that carry out an edit, by (kind, layer)."""
    places: dict[tuple[str, int], list[Site]] = defaultdict(list)
    for site in edit.sites:
        info.check(site)
        if site.kind in ("k", "v") and not site.grouped and info.grouped:
            group = f"{site.layer}.kv{info.group_of(site.head or 0)}.{site.kind}"
            raise SiteError(
                f'"{site}" cannot be changed alone: heads of {info.name} share their keys and values',
                expected=f'the group it belongs to, "{group}"',
            )
        places[site.kind, site.layer].append(site)
    return {key: _at(edit, sites, info) for key, sites in places.items()}


def _at(edit: Edit, sites: list[Site], info: ModelInfo) -> Change:
    def change(tensor: Tensor) -> Tensor:
        where = _positions(edit, tensor, sites[0])
        for site in sites:
            index = _index(site, where, info)
            tensor[index] = _new(edit, site, tensor[index])
        return tensor

    return change


def _positions(edit: Edit, tensor: Tensor, site: Site) -> slice | Tensor:
    if edit.positions is None:
        return slice(None)
    length = tensor.shape[2 if site.kind in _BY_HEAD else 1]
    if outside := [p for p in edit.positions if not -length <= p < length]:
        raise EditError(f'Position {outside[0]} of "{site}" in a prompt of {length} tokens')
    return torch.tensor(edit.positions, device=tensor.device)


def _index(site: Site, where: slice | Tensor, info: ModelInfo) -> tuple:
    if site.head is None:
        return (slice(None), where)
    head = info.slot(site)
    return (slice(None), head, where) if site.kind in _BY_HEAD else (slice(None), where, head)


def _new(edit: Edit, site: Site, old: Tensor) -> Tensor:
    match edit:
        case Ablate(mode="zero"):
            return torch.zeros_like(old)
        case Scale(alpha=alpha):
            return old * alpha
        case PatchIn(values=values):
            return _fitted(values[site], old, site)
        case Steer(vector=vector, alpha=alpha):
            return old + alpha * _fitted(vector, old, site)
    raise EditError(f"{type(edit).__name__} with mode {getattr(edit, 'mode', None)!r} has not been given its values")


def _fitted(values: Tensor, old: Tensor, site: Site) -> Tensor:
    values = torch.as_tensor(values).to(old)
    try:
        return values.expand_as(old)
    except RuntimeError:
        raise EditError(
            f'A value of shape {list(values.shape)} for "{site}"',
            expected=f"what broadcasts to {list(old.shape)}",
        ) from None
