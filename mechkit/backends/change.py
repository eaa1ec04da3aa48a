"""Carry out an edit on the tensor of one kind of site in one layer.

1. An edit becomes functions, one for each kind of site and layer that it has to see. Each takes a tensor it may write
   to, in the layouts of ``protocol``, and gives it back.
2. Positions of an edit are looked up in a ``Window``.
3. A value that an edit has for its sites is laid on what is there; it may ask for gradients. One that a fit has yet to
   find is an error.
4. What the model hides from a query stays hidden: a score at the mask's value keeps it, whatever the edit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..edits import Ablate, Attend, Edit, Inject, PatchIn, Redistribute, Scale, Steer, TopHeads, Transform, of_site
from ..errors import EditError
from ..sites import Site
from .attend import attended, redistributed
from .protocol import ModelInfo
from .window import BY_HEAD, Change, Key, Window, fitted, marked, part_of, taken, visible


def changed(edits: Sequence[Edit], info: ModelInfo, window: Window) -> dict[Key, list[Change]]:
    """The functions that carry out edits, in order, by (kind, layer).

    Raises:
        SiteError: an address this model does not have.
        EditError: an edit whose value is still to be fitted.
    """
    steps: dict[Key, list[Change]] = defaultdict(list)
    for edit in edits:
        if edit.missing:
            raise EditError(
                f'{type(edit).__name__} of "{edit.sites[0]}" has no {edit.missing} yet',
                fix=f"Find it first with mk.fit, or give {edit.missing}=...",
            )
        places: dict[Key, list[Site]] = defaultdict(list)
        for site in edit.sites:
            info.check(site)
            places[site.kind, site.layer].append(site)
        for (kind, layer), sites in places.items():
            for seen, change in _functions(edit, kind, sites, info, window).items():
                steps[seen, layer].append(change)
    return steps


def functions_of(edits: Sequence[Edit], info: ModelInfo, window: Window) -> dict[Key, Change]:
    """One function for each tensor that edits have to see, by (kind, layer).

    Raises:
        SiteError: an address this model does not have.
    """
    return {key: in_order(changes, key[0]) for key, changes in changed(edits, info, window).items()}


def in_order(changes: Sequence[Change], kind: str) -> Change:
    """One function of several; what one of them finds hidden stays hidden."""

    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        for one in changes:
            if kind != "scores":
                tensor = one(tensor)
                continue
            hidden = ~visible(tensor)
            tensor = one(tensor).masked_fill(hidden, torch.finfo(tensor.dtype).min)
        return tensor

    return change


def _functions(edit: Edit, kind: str, sites: list[Site], info: ModelInfo, window: Window) -> dict[str, Change]:
    """Functions by kind that carry out an edit of the sites of one kind in one layer."""
    match edit:
        case Attend() | Ablate(mode="uniform"):
            return attended(edit, sites, window)
        case Redistribute():
            return redistributed(edit, sites, window)
        case TopHeads():
            return {kind: _only_top(edit, sites, window)}
    return {kind: _at(edit, sites, info, window)}


def _at(edit: Edit, sites: list[Site], info: ModelInfo, window: Window) -> Change:
    def change(tensor: Tensor) -> Tensor:
        by_head = sites[0].kind in BY_HEAD
        width = tensor.shape[2 if by_head else 1]
        batch = torch.arange(len(tensor), device=tensor.device)[:, None]
        found: Tensor | None = None
        for site in sites:
            slot = () if site.head is None else (info.slot(site),)
            if isinstance(edit.positions, tuple):
                rows, found = window.rows(edit.positions, width, f'"{site}"')
                if not len(found):
                    return tensor  # those positions come in another call
                rows = rows.to(tensor.device)
                index: tuple = (batch, *slot, rows) if by_head else (batch, rows, *slot)
            else:
                index = (slice(None), *slot) if by_head else (slice(None), slice(None), *slot)
            old = taken(tensor, index)
            new = _new(edit, site, old, found, window.growing)
            if isinstance(edit.positions, Tensor):
                where = part_of(edit.positions, window.first, width).to(tensor.device)
                new = torch.where(where.view(*where.shape, *[1] * (old.ndim - 2)), new, old)
            tensor[index] = new
        return tensor

    return change


def _new(edit: Edit, site: Site, old: Tensor, found: Tensor | None, growing: bool) -> Tensor:
    def laid(value: Any) -> Tensor:
        return fitted(_of_found(value, edit, found), old, site, growing)

    match edit:
        case Ablate(mode="zero"):
            return torch.zeros_like(old)
        case Scale(alpha=alpha):
            much = of_site(alpha, site)
            return old * (much if isinstance(much, float) else laid(much))
        case PatchIn(values=values):
            return laid(values[site])
        case Inject(values=values, gate=gate):
            share = of_site(gate, site)
            share = share if isinstance(share, float) else laid(share)
            return (1 - share) * old + share * laid(values[site])
        case Steer(vector=vector, alpha=alpha):
            return old + alpha * laid(of_site(vector, site))
        case Transform():
            return _transformed(of_site(edit.matrix, site), of_site(edit.shift, site), old, site)
    raise EditError(f"{type(edit).__name__} with mode {getattr(edit, 'mode', None)!r} has not been given its values")


def _transformed(matrix: Tensor, shift: Tensor | None, old: Tensor, site: Site) -> Tensor:
    if len(matrix) != old.shape[-1]:
        raise EditError(f'transform of "{site}" by a matrix of width {len(matrix)}', expected=f"width {old.shape[-1]}")
    exact = torch.promote_types(old.dtype, torch.float32)  # what is nearly the identity stays so
    new = old.to(exact) @ matrix.to(old.device, exact)
    return (new if shift is None else new + shift.to(new)).to(old.dtype)


def _of_found(values: Any, edit: Edit, found: Tensor | None) -> Any:
    """Of one value a position, those of the positions that this call computes."""
    if found is None or not isinstance(values, Tensor) or not isinstance(edit.positions, tuple):
        return values
    one_each = values.ndim > 1 and values.shape[-2] == len(edit.positions) != len(found)
    return values[..., found.to(values.device), :] if one_each else values


def _only_top(edit: TopHeads, sites: list[Site], window: Window) -> Change:
    """Zero for all but the heads of a layer whose z W_O is longest, at each token."""
    heads = [site.head for site in sites]

    def change(tensor: Tensor) -> Tensor:
        old = taken(tensor, (slice(None), slice(None), heads))  # [batch, pos, heads, d_head]
        wide = old.float()
        grams = torch.stack([edit.grams[site] for site in sites]).to(wide)
        lengths = torch.einsum("bphd,hde,bphe->bph", wide, grams, wide)
        top = lengths.topk(min(edit.k, len(heads)), -1).indices
        stays = torch.zeros_like(lengths, dtype=torch.bool).scatter(-1, top, True)
        chosen = marked(edit.positions, window, window.first, tensor.shape[1], tensor, sites[0])
        tensor[:, :, heads] = torch.where((stays | ~chosen[..., None])[..., None], old, 0)
        return tensor

    return change
