"""Checks of a task's token ids, and where things stand in its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = ("clean", "corrupt", "correct", "wrong")


def checked_ids(clean: Tensor, corrupt: Tensor, correct: Tensor, wrong: Tensor) -> tuple[Tensor, ...]:
    """The ids of twins ``[n, pos]`` and answers ``[n]``, on the CPU.

    Raises:
        TaskError: shapes that do not fit, no prompts, twins or answers that do not differ.
    """
    ids = [torch.as_tensor(x) for x in (clean, corrupt, correct, wrong)]
    for name, tensor, ndim in zip(COLUMNS, ids, (2, 2, 1, 1), strict=True):
        if tensor.ndim != ndim or tensor.is_floating_point() or tensor.dtype == torch.bool:
            raise TaskError(
                f"`{name}` is {tensor.dtype} of shape {list(tensor.shape)}",
                expected="token ids " + ("[n, pos]" if ndim == 2 else "[n]"),
            )
    if not len(ids[0]):
        raise TaskError("A task of no prompts", expected="at least one")
    if ids[0].shape != ids[1].shape:
        raise TaskError(
            f"clean is {list(ids[0].shape)} and corrupt is {list(ids[1].shape)}",
            expected="the same number of prompts and of tokens",
            fix="Rewrite the corrupt prompts so that each has its twin's number of tokens",
        )
    for name, tensor in zip(COLUMNS[2:], ids[2:], strict=True):
        if len(tensor) != len(ids[0]):
            raise TaskError(f"{len(tensor)} `{name}` answers for {len(ids[0])} prompts", expected="one a prompt")
    same = (ids[0] == ids[1]).all(1).nonzero()
    if len(same):
        raise TaskError(
            f"The clean and corrupt prompts of row {int(same[0])} are the same", expected="twins that differ"
        )
    same = (ids[2] == ids[3]).nonzero()
    if len(same):
        raise TaskError(
            f"The correct and wrong answers of row {int(same[0])} are the same",
            expected="two different tokens",
        )
    return tuple(tensor.long().cpu() for tensor in ids)


def layout(
    clean: Tensor, lengths: Tensor | None, spans: Mapping[str, Tensor], templates: Tensor | None
) -> dict[str, Any]:
    """Lengths ``[n]``, spans ``[n, 2]`` with ``END`` among them, and templates ``[n]``.

    Raises:
        TaskError: lengths, spans or templates that do not fit the prompts.
    """
    n, width = clean.shape
    tokens = torch.full((n,), width) if lengths is None else torch.as_tensor(lengths).long()
    if tokens.shape != (n,) or int(tokens.min()) < 1 or int(tokens.max()) > width:
        raise TaskError(f"lengths {tokens.tolist()}", expected=f"{n} numbers from 1 to {width}")
    placed = {}
    for name, value in spans.items():
        first = torch.as_tensor(value).long()
        span = torch.stack([first, first + 1], 1) if first.ndim == 1 else first
        if span.shape != (n, 2) or bool((span[:, 0] < 0).any()) or bool((span[:, 1] > tokens).any()):
            raise TaskError(
                f'Span "{name}" of shape {list(first.shape)}',
                expected="[n] or [n, 2] positions inside each prompt",
            )
        placed[name] = span
    placed["END"] = torch.stack([tokens - 1, tokens], 1)
    if templates is None:
        templates = group_ids(torch.cat(list(placed.values()), 1))
    elif templates.shape != (n,):
        raise TaskError(f"templates of shape {list(templates.shape)}", expected=f"[{n}], one group a prompt")
    for number in templates.unique():
        if len(found := tokens[templates == number].unique()) > 1:
            raise TaskError(
                f"Template {int(number)} has prompts of {found.tolist()} tokens",
                expected="one length a template",
            )
    return {"lengths": tokens, "spans": placed, "templates": templates}


def group_ids(keys: Tensor) -> Tensor:
    """Number the distinct rows of ``[n, k]``: ``[n]``."""
    return torch.unique(keys, dim=0, return_inverse=True)[1]
