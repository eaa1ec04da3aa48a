"""Which positions a call of the model computes, and how values are laid on them.

A run computes all positions of its prompts; while generating, a call computes those that are not in the cache yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import EditError
from ..sites import Site
from .protocol import Write

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


def part_of(mask: Tensor, first: int, width: int) -> Tensor:
    """A mask over a prompt's positions ``[batch, pos]`` cut to some of them, False beyond its end."""
    part = mask[:, first : first + width]
    return torch.nn.functional.pad(part, (0, width - part.shape[1]))


def marked(
    wanted: Sequence[int] | Tensor | str | None, window: Window, first: int, width: int, like: Tensor, site: Site
) -> Tensor:
    """Which of ``width`` positions from ``first`` on are meant ``[batch, width]``, boolean.

    Args:
        wanted: numbers, or a mask over the prompt's positions; None for all. Spans have become masks.
        window: of the call.
        first, width: of the positions that ``like`` has.
        like: a tensor of the call, for its batch and its device.
        site: what it is for, for messages.
    """
    if wanted is None:
        return torch.ones(len(like), width, dtype=torch.bool, device=like.device)
    if isinstance(wanted, Tensor):
        return part_of(wanted, first, width).to(like.device)
    mask = torch.zeros(len(like), width, dtype=torch.bool, device=like.device)
    numbers = [key for key in wanted if isinstance(key, int)]
    at, _ = Window(window.lengths, first, window.growing).rows(numbers, width, f'"{site}"')
    return mask.scatter(1, at.to(like.device), True)


def taken(tensor: Tensor, index: Any) -> Tensor:
    """A part of a tensor that is about to be written over, by itself where autograd may want it again."""
    part = tensor[index]
    return part.clone() if torch.is_grad_enabled() else part


def visible(scores: Tensor) -> Tensor:
    """Which scores are not the mask's: ``[batch, heads, query, key]``, boolean."""
    return scores > torch.finfo(scores.dtype).min / 2


def fitted(values: object, old: Tensor, site: Site, growing: bool = False) -> Tensor:
    """Values spread to a tensor's shape.

    Raises:
        EditError: they do not broadcast to it, or are not numbers.
    """
    try:
        values = torch.as_tensor(values).to(old)
    except (TypeError, ValueError, RuntimeError):
        raise EditError(f'A value of type {type(values).__name__} for "{site}"', expected="a tensor") from None
    if values.is_inference() and torch.is_grad_enabled():
        values = values.clone()  # autograd keeps nothing that a run without gradients recorded
    try:
        return values.expand_as(old)
    except RuntimeError:
        raise EditError(
            f'A value of shape {list(values.shape)} for "{site}"',
            expected=f"what broadcasts to {list(old.shape)}",
            fix="While generating, values of the prompt's positions need positions=range(...)" if growing else "",
        ) from None


def carried_out(old: Tensor, write: Write) -> Tensor:
    """A tensor of variants with what is written in its place; it may be changed in place."""
    where, values = write.where[..., None], write.values.to(old)
    if write.heads is None:
        return torch.where(where, values, old)
    rows = torch.arange(len(old), device=old.device)
    index = (rows, write.heads) if write.kind in BY_HEAD else (rows, slice(None), write.heads)
    old[index] = torch.where(where, values, old[index])
    return old
