"""Parts of prompts: a task's spans, pieces of a text, or tokens by number, as masks over positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ..decomposition.token_spans import pieces_of
from ..errors import OptionError
from ..tasks.task import Task

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts

Place: TypeAlias = "str | int | tuple[int, int]"


def place_mask(model: Model, data: Prompts, place: Place, lengths: Tensor, width: int) -> Tensor:
    """Where a part stands in each prompt ``[n, pos]``, boolean.

    Args:
        model: its tokenizer finds pieces of texts.
        data: the prompts.
        place: a span's name of a task, or a piece of each text that is in it once; a position (negative: from each
            prompt's end); or (first, one past the last), counted in the same way.
        lengths: tokens of each prompt ``[n]``.
        width: positions of the longest.

    Raises:
        OptionError: neither of these, or a part outside a prompt.
        TaskError: a task without a span of that name.
        PromptError: a text that does not have the piece once.
    """
    if isinstance(place, str):
        first, last = _named(model, data, place)
    elif isinstance(place, int) and not isinstance(place, bool):
        first, last = _from_end(place, lengths), _from_end(place, lengths) + 1
    elif isinstance(place, Sequence) and len(place) == 2 and all(type(one) is int for one in place):
        first, last = _from_end(place[0], lengths), _from_end(place[1], lengths)
    else:
        raise OptionError(f"{place!r} as a part of prompts", expected="a name or piece of text, a position, or a pair")
    if bool(((first < 0) | (last > lengths) | (first >= last)).any()):
        row = int(((first < 0) | (last > lengths) | (first >= last)).nonzero()[0])
        raise OptionError(f"{place!r} as a part of prompt {row}, which has {int(lengths[row])} tokens")
    positions = torch.arange(width)
    return (positions >= first[:, None]) & (positions < last[:, None])


def real_mask(lengths: Tensor, width: int) -> Tensor:
    """Which positions are not padding ``[n, pos]``."""
    return torch.arange(width) < lengths[:, None]


def _from_end(position: int, lengths: Tensor) -> Tensor:
    return torch.where(torch.tensor(position < 0), lengths, 0) + position


def _named(model: Model, data: Prompts, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(data, Task):
        first, last = data.span(name).unbind(1)
        return first, last
    if isinstance(data, Tensor):
        raise OptionError(f"{name!r} as a part of token ids", expected="a position, or (first, one past the last)")
    texts = [data] if isinstance(data, str) else data
    found = torch.tensor([pieces_of(model, text).span(name) for text in texts])
    first, last = found.unbind(1)
    return first, last
