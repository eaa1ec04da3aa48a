"""Prompts to a batch of token ids, whatever form they come in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .errors import PromptError
from .tasks.task import Task
from .tasks.text import pad_right

if TYPE_CHECKING:
    from .model import Model

Prompts: TypeAlias = "str | Sequence[str] | Tensor | Task"


def as_batch(model: Model, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Ids ``[batch, pos]``, padded at the right, and the number of tokens of each prompt ``[batch]``.

    Raises:
        PromptError: an empty prompt, one longer than the model's context, or neither text nor ids.
    """
    if isinstance(prompts, Task):
        ids, lengths = prompts.clean, prompts.lengths
        _check_ids(model, ids)
    elif isinstance(prompts, Tensor):
        ids = prompts if prompts.ndim == 2 else prompts[None]
        if (
            prompts.ndim not in (1, 2)
            or prompts.is_floating_point()
            or prompts.dtype == torch.bool
            or not prompts.numel()
        ):
            raise PromptError(f"{prompts.dtype} of shape {list(prompts.shape)}", expected="ids [batch, pos]")
        _check_ids(model, ids)
        lengths = torch.full((len(ids),), ids.shape[1])
    else:
        ids, lengths = _encoded(model, prompts)
    if ids.shape[1] > model.info.n_ctx:
        raise PromptError(
            f"A prompt of {ids.shape[1]} tokens",
            expected=f"at most {model.info.n_ctx}, the context of {model.name}",
        )
    return ids, lengths


def check_task(model: Model, task: Task) -> None:
    """Whether a model can run a task's prompts and has its answers.

    Raises:
        PromptError: ids outside the vocabulary, or prompts longer than the context.
    """
    as_batch(model, task)
    for ids in (task.corrupt, task.answers):
        _check_ids(model, ids)


def _check_ids(model: Model, ids: Tensor) -> None:
    if int(ids.min()) < 0 or int(ids.max()) >= model.info.d_vocab:
        raise PromptError(
            f"Token ids from {int(ids.min())} to {int(ids.max())}", expected=f"0 to {model.info.d_vocab - 1}"
        )


def _encoded(model: Model, prompts: str | Sequence[str]) -> tuple[Tensor, Tensor]:
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(t, str) for t in texts):
        raise PromptError(f"{prompts!r} is no prompt", expected="text, a list of texts, or token ids")
    if "" in texts:
        raise PromptError("An empty prompt", expected="text of at least one token")
    bos = getattr(model.need_tokenizer(), "bos_token_id", None)
    rows = [model.encode(text) for text in texts]
    rows = [row if bos is None or row[:1] == [bos] else [bos, *row] for row in rows]
    if not all(rows):
        raise PromptError("An empty prompt: it has no token", expected="text of at least one token")
    return pad_right(rows, model.pad_token)
