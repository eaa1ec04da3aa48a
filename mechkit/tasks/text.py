"""From a table of prompts to token ids, with an error for every row that cannot be one."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from ..errors import MechkitWarning, TaskError
from .layout import COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from ..model import Model


def pad_right(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids ``[n, longest]`` padded at the right, and lengths ``[n]``."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows]), lengths


def continuation(prompt: str, text: str, model: Model) -> list[int]:
    """The ids that ``text`` adds to ``prompt``.

    Some tokenizers put a space before whatever they read, so that a word read by itself is not what it is in a
    sentence; and some would join the two, in which case the text is read by itself.
    """
    before, whole = model.encode(prompt), model.encode(prompt + text)
    return whole[len(before) :] if whole[: len(before)] == before else model.encode(text)


def single_token(prompt: str, text: str, model: Model, what: str) -> int:
    """The one id of an answer to a prompt.

    Raises:
        TaskError: the text is several tokens for this model, or none.
    """
    ids = continuation(prompt, text, model)
    if len(ids) != 1:
        pieces = [model.to_text(i) for i in ids]
        raise TaskError(
            f"{what} {text!r} is {len(ids)} tokens for {model.name}: {pieces}",
            expected="a single token",
            fix="Take another word; most words need their leading space, as in ' Mary'",
        )
    return ids[0]


def encode_frame(frame: pd.DataFrame, model: Model) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ids of the clean and corrupt prompts ``[n, pos]`` and of the answers ``[n]``, and lengths ``[n]``."""
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise TaskError(
            f"The table has columns {list(map(str, frame.columns))}", expected="columns " + ", ".join(COLUMNS)
        )
    if not len(frame):
        raise TaskError("A table of no prompts", expected="at least one row")
    clean, corrupt, correct, wrong = [], [], [], []
    for row, prompts in enumerate(frame[list(COLUMNS)].itertuples(index=False)):
        for column, text in zip(COLUMNS, prompts, strict=True):
            if not isinstance(text, str) or not text:
                raise TaskError(f"Row {row}: `{column}` is {text!r}", expected="text")
        a, b = (model.tokens(text)[0].tolist() for text in prompts[:2])
        if len(a) != len(b):
            raise TaskError(
                f"Row {row}: clean is {len(a)} tokens and corrupt {len(b)} for {model.name}",
                expected="the same number",
                fix=f"clean: {[model.to_text(i) for i in a]}, corrupt: {[model.to_text(i) for i in b]}",
            )
        _warn_if_space_is_missing(row, prompts, model)
        clean.append(a)
        corrupt.append(b)
        correct.append(single_token(prompts[0], prompts[2], model, f"Row {row}: the correct answer"))
        wrong.append(single_token(prompts[0], prompts[3], model, f"Row {row}: the wrong answer"))
    pad = model.pad_token
    ids, lengths = pad_right(clean, pad)
    return ids, pad_right(corrupt, pad)[0], torch.tensor(correct), torch.tensor(wrong), lengths


def _warn_if_space_is_missing(row: int, prompts: tuple, model: Model) -> None:
    clean, _, *answers = prompts
    for answer in answers:
        if clean[-1].isalnum() and answer[0].isalnum() and len(continuation(clean, " " + answer, model)) == 1:
            warnings.warn(
                f"Row {row}: the answer {answer!r} has no leading space, so it would run into the prompt's last "
                f"word; ' {answer}' is what most models write here",
                MechkitWarning,
                stacklevel=5,
            )
