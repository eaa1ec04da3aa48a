"""Continuing prompts with edits.

1. Prompts of one length go together; nothing is padded while tokens are made, so that padding cannot matter.
2. The backend makes the tokens, the edits active at every step.
3. What comes back has the form of what was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backends.elsewhere import where_the_model_is
from .errors import MechkitError, OptionError, PromptError
from .library import quiet_library
from .prompts import Prompts, as_batch
from .tasks.task import Task
from .tasks.text import pad_right

if TYPE_CHECKING:
    from .edits import Edit
    from .model import Model


def continued(
    model: Model, prompts: Prompts, max_new_tokens: int, edits: Sequence[Edit], options: Mapping[str, Any]
) -> str | list[str] | Tensor:
    """See ``Model.generate``."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise OptionError(f"max_new_tokens = {max_new_tokens!r}", expected="a whole number from 1")
    ids, lengths = as_batch(model, prompts)
    longest = int(lengths.max()) + max_new_tokens
    if longest > model.info.n_ctx:
        raise PromptError(
            f"{int(lengths.max())} tokens and {max_new_tokens} more",
            expected=f"at most {model.info.n_ctx} in all, the context of {model.name}",
        )
    given = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": model.pad_token, **options}
    rows = _rows(model, ids, lengths, edits, prompts if isinstance(prompts, Task) else None, given, list(options))
    if isinstance(prompts, Tensor):
        out = pad_right(rows, model.pad_token)[0]
        return out if prompts.ndim == 2 else out[0]
    texts = [_text(model, row, int(length)) for row, length in zip(rows, lengths, strict=True)]
    if isinstance(prompts, str):
        return prompts + texts[0][1]
    before = prompts.texts if isinstance(prompts, Task) else list(prompts)
    return [whole if not before else before[i] + new for i, (whole, new) in enumerate(texts)]


@where_the_model_is
def _rows(
    model: Model,
    ids: Tensor,
    lengths: Tensor,
    edits: Sequence[Edit],
    task: Task | None,
    options: Mapping[str, Any],
    given: Sequence[str],
) -> list[list[int]]:
    """Every prompt's tokens, continued; ``given`` names the options that are not ours."""
    resolved = model.resolved(edits, task)
    rows: list[list[int]] = [[] for _ in ids]
    for length in lengths.unique().tolist():
        these = (lengths == length).nonzero()[:, 0]
        some = [_of_rows(edit, these, len(ids)) for edit in resolved] if len(these) < len(ids) else resolved
        try:
            with quiet_library():
                made = model.backend.generate(ids[these, :length], some, options)
        except (TypeError, ValueError) as error:
            if isinstance(error, MechkitError):
                raise
            raise OptionError(
                f"generate with {', '.join(given) or 'these options'}: {str(error).splitlines()[0]}",
                expected="options of the Hub's generate",
            ) from error
        for row, tokens in zip(these.tolist(), made.tolist(), strict=True):
            rows[row] = tokens
    return rows


def _text(model: Model, row: list[int], length: int) -> tuple[str, str]:
    """A continued prompt as text, whole, and what is new in it."""
    decode = partial(model.need_tokenizer().decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = decode(row)
    return whole, whole[len(decode(row[:length])) :]  # decoded by itself, it would lose its leading space


def _of_rows(edit: Edit, rows: Tensor, batch: int) -> Edit:
    """The edit for some of the prompts: of tensors that have a batch axis, those rows."""

    def pick(value: Any) -> Any:
        if (
            isinstance(value, Tensor)
            and value.ndim
            and value.shape[0] == batch
            and (value.ndim == 3 or value.dtype == torch.bool)
        ):
            return value[rows.to(value.device)]
        if isinstance(value, Mapping):
            return {pick(key): pick(one) for key, one in value.items()}
        return value

    return replace(edit, **{field.name: pick(getattr(edit, field.name)) for field in fields(edit)})


def _has_batch(value: Tensor, batch: int) -> bool:
    """Whether the first axis is the prompts': of a mask, or of what has all three axes of a site."""
    return (value.ndim == 3 or value.dtype == torch.bool) and value.shape[0] == batch
