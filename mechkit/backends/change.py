"""Carry out an edit on the tensor of one kind of site in one layer.

1. An edit becomes functions, one for each kind of site and layer that it has to see. Each takes a tensor it may write
   to, in the layouts of ``protocol``, and gives it back.
2. A ``Window`` says which positions of the prompt are being computed: all of them, or, while generating, only those
   that are not in the cache yet. Positions of an edit are looked up in it.
3. What the model hides from a query stays hidden: a score at the mask's value keeps it, whatever the edit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..edits import Ablate, Attend, Edit, PatchIn, Scale, Steer
from ..errors import EditError
from ..sites import Site
from .protocol import ModelInfo

Change: TypeAlias = "Callable[[Tensor], Tensor]"
Key: TypeAlias = "tuple[str, int]"
BY_HEAD = ("pattern", "scores")  # [batch, heads, query, key]; other kinds have their positions on axis 1


@dataclass
class Window:
    """The positions that a call of the model computes.

    Attributes:
        lengths: tokens of each prompt, padding not counted ``[batch]``.
        first: position of the first one computed.
        growing: more positions will come, so that one that lies beyond the end is not an error yet.
    """

    lengths: Tensor
    first: int = 0
    growing: bool = False

    def rows(self, positions: Sequence[int], width: int, what: str) -> tuple[Tensor, Tensor]:
        """Where positions stand in a tensor that is ``width`` positions wide.

        Returns:
            Rows ``[batch, found]``, and which of ``positions`` these are ``[found]``.

        Raises:
            EditError: a position outside a prompt.
        """
        wanted = torch.tensor(positions, device=self.lengths.device)[None]
        absolute = torch.where(wanted < 0, wanted + self.lengths[:, None], wanted)
        outside = (absolute < 0) | (absolute >= self.lengths[:, None])
        if bool(outside.any()) and not self.growing:
            row, column = outside.nonzero()[0].tolist()
            raise EditError(f"Position {positions[column]} of {what} in a prompt of {int(self.lengths[row])} tokens")
        here = ((absolute >= self.first) & (absolute < self.first + width)).all(0).nonzero()[:, 0]
        return (absolute - self.first)[:, here], here


def changed(edits: Sequence[Edit], info: ModelInfo, window: Window) -> dict[Key, list[Change]]:
    """The functions that carry out edits, in order, by (kind, layer).

    Raises:
        SiteError: an address this model does not have.
    """
    from .attend import attended

    steps: dict[Key, list[Change]] = defaultdict(list)
    for edit in edits:
        places: dict[Key, list[Site]] = defaultdict(list)
        for site in edit.sites:
            info.check(site)
            places[site.kind, site.layer].append(site)
        for (kind, layer), sites in places.items():
            if isinstance(edit, Attend) or (isinstance(edit, Ablate) and edit.mode == "uniform"):
                for seen, change in attended(edit, sites, window).items():
                    steps[seen, layer].append(change)
            else:
                steps[kind, layer].append(_at(edit, sites, info, window))
    return steps


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


def part_of(mask: Tensor, first: int, width: int) -> Tensor:
    """A mask over a prompt's positions ``[batch, pos]`` cut to some of them, False beyond its end."""
    part = mask[:, first : first + width]
    return torch.nn.functional.pad(part, (0, width - part.shape[1]))


def visible(scores: Tensor) -> Tensor:
    """Which scores are not the mask's: ``[batch, heads, query, key]``, boolean."""
    return scores > torch.finfo(scores.dtype).min / 2


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
            old = tensor[index]
            new = _new(edit, site, old, found)
            if isinstance(edit.positions, Tensor):
                where = part_of(edit.positions, window.first, width).to(tensor.device)
                new = torch.where(where.view(*where.shape, *[1] * (old.ndim - 2)), new, old)
            tensor[index] = new
        return tensor

    return change


def _new(edit: Edit, site: Site, old: Tensor, found: Tensor | None) -> Tensor:
    match edit:
        case Ablate(mode="zero"):
            return torch.zeros_like(old)
        case Scale(alpha=alpha):
            return old * alpha
        case PatchIn(values=values):
            return fitted(_of_found(values[site], edit, found), old, site)
        case Steer(vector=vector, alpha=alpha):
            return old + alpha * fitted(_of_found(vector, edit, found), old, site)
    raise EditError(f"{type(edit).__name__} with mode {getattr(edit, 'mode', None)!r} has not been given its values")


def _of_found(values: Any, edit: Edit, found: Tensor | None) -> Any:
    """Of one value a position, those of the positions that this call computes."""
    if found is None or not isinstance(values, Tensor) or not isinstance(edit.positions, tuple):
        return values
    one_each = values.ndim > 1 and values.shape[-2] == len(edit.positions) != len(found)
    return values[..., found.to(values.device), :] if one_each else values


def fitted(values: object, old: Tensor, site: Site) -> Tensor:
    """Values spread to a tensor's shape.

    Raises:
        EditError: they do not broadcast to it, or are not numbers.
    """
    try:
        values = torch.as_tensor(values).to(old)
    except (TypeError, ValueError, RuntimeError):
        raise EditError(f'A value of type {type(values).__name__} for "{site}"', expected="a tensor") from None
    try:
        return values.expand_as(old)
    except RuntimeError:
        raise EditError(
            f'A value of shape {list(values.shape)} for "{site}"',
            expected=f"what broadcasts to {list(old.shape)}",
        ) from None
