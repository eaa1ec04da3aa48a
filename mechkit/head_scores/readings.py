"""What is read of runs whose heads are taken out: losses at every position, or what stands at one position.

1. What leaves the last block is normalised, and multiplied by the unembedding as many positions at a time as fit:
   logits ``[rows, pos, vocab]`` are never held for more.
2. A prompt's loss is the mean over its own positions of minus the log-probability of the next token, in nats a token.
3. A reading is told of a base run first, gives what it reads there, and keeps what variants are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..backends.lens import LensBackend
from ..backends.memory import fitting
from ..backends.protocol import Read
from ..backends.replay import LensReplay
from ..errors import PromptError
from ..tasks.task import Task

_COPIES = 4  # of a row of logits, that its losses and their gradients make
_TOKENS = {"cpu": 512, "mps": 1 << 12, "cuda": 1 << 13}  # more rows of logits at once are no faster


class Reading(Protocol):
    """What is read of every run.

    Attributes:
        whole: a row of all logits is read of each variant.
    """

    whole: bool

    def begin(self, base: LensReplay, prompts: Tensor) -> Tensor:
        """Of the base run of some prompts: ``[prompts, ...]``."""
        ...

    def of(self, streams: Tensor, rows: Tensor) -> Tensor:
        """Of variants of these base prompts, what leaves their last block ``[rows, pos, d_model]``: ``[rows, ...]``."""
        ...


def need_next_tokens(lengths: Tensor) -> None:
    """Whether every prompt has a token to be predicted.

    Raises:
        PromptError: one has a single token.
    """
    if bool((lengths < 2).any()):
        raise PromptError(
            f"Prompt {int((lengths < 2).nonzero()[0])} has a single token, so there is no next token to predict",
            expected="prompts of at least two tokens",
        )


def next_tokens(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The token that follows each position but the last ``[n, pos - 1]``, and where there is one, boolean."""
    return ids[:, 1:], torch.arange(1, ids.shape[1], device=ids.device)[None] < lengths.to(ids.device)[:, None]


def token_losses(backend: LensBackend, hidden: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """Loss of the next token at each position but the last ``[rows, pos - 1]``, in nats; 0 past a prompt's end.

    Args:
        backend: whose unembedding.
        hidden: normalised streams ``[rows, pos, d_model]``.
        ids, lengths: the prompts that ran ``[rows, pos]``, ``[rows]``.
    """
    targets, real = next_tokens(ids.to(hidden.device), lengths)
    found = torch.zeros(targets.shape, device=hidden.device)
    for at in _parts(backend, real):
        row, position = at.unbind(1)
        logits = backend.readout(hidden[row, position], None)
        found[row, position] = _losses(logits, targets[row, position])
    return found


def loss_gradient(backend: LensBackend, hidden: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss of each prompt ``[rows]``, and its gradient at normalised streams ``[rows, pos, d_model]``."""
    targets, real = next_tokens(ids.to(hidden.device), lengths)
    share = 1 / real.sum(1)
    total, gradient = torch.zeros(len(ids), device=hidden.device), torch.zeros_like(hidden)
    for at in _parts(backend, real):
        row, position = at.unbind(1)
        with torch.enable_grad():
            leaf = hidden[row, position].detach().requires_grad_()
            losses = _losses(backend.readout(leaf, None), targets[row, position]) * share[row]
            gradient[row, position] = torch.autograd.grad(losses.sum(), leaf)[0]
        total.index_add_(0, row, losses.detach())
    return total, gradient


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _parts(backend: LensBackend, real: Tensor) -> Iterator[Tensor]:
    """Rows and positions whose logits are held together ``[some, 2]``."""
    device = real.device
    at_most = _TOKENS.get(device.type, _TOKENS["cuda"])
    yield from real.nonzero().split(fitting(_COPIES * 4 * backend.info.d_vocab, device, at_most))


class MeanLoss:
    """A prompt's mean next-token loss.

    Args:
        ids, lengths: the prompts ``[n, pos]``, ``[n]``.
    """

    whole = False

    def __init__(self, ids: Tensor, lengths: Tensor):
        self._all = ids, lengths

    def begin(self, base: LensReplay, prompts: Tensor) -> Tensor:
        """See ``Reading``."""
        self._backend = base.backend
        last = base.stream(base.backend.info.n_layers)
        self._ids, self._lengths = self._all[0][prompts, : last.shape[1]], self._all[1][prompts]
        return self.of(last, torch.arange(len(prompts)))

    def of(self, streams: Tensor, rows: Tensor) -> Tensor:
        """See ``Reading``."""
        rows = rows.cpu()
        lengths = self._lengths[rows]
        hidden = self._backend.placed.normalised(streams)
        return token_losses(self._backend, hidden, self._ids[rows], lengths).sum(1).cpu() / (lengths - 1)


class TaskMetric:
    """A task's metric.

    Args:
        task: the prompts.
    """

    def __init__(self, task: Task):
        self._task, self.whole = task, task.metric.reads != "answers"

    def begin(self, base: LensReplay, prompts: Tensor) -> Tensor:
        """See ``Reading``."""
        self._base, self._part = base, self._task[prompts]
        every = torch.arange(len(prompts))
        own = base.ends(self._read(every))
        self._own = own if self._task.metric.reads == "clean" else None
        return self._measured(own, every)

    def of(self, streams: Tensor, rows: Tensor) -> Tensor:
        """See ``Reading``."""
        rows = rows.cpu()
        return self._measured(self._base.logits(streams, self._read(rows)), rows)

    def _read(self, rows: Tensor) -> Read:
        answers = self._part.answers[rows] if self._task.metric.reads == "answers" else None
        return Read(self._part.answer_positions[rows], answers)

    def _measured(self, logits: Tensor, rows: Tensor) -> Tensor:
        own = None if self._own is None else self._own[rows.to(self._own.device)]
        return self._task.metric(logits, self._part[rows], own).cpu()


class NextTokenKL:
    """KL divergence from the base run's next-token distribution at each prompt's end to a variant's, in nats.

    Args:
        lengths: tokens of each prompt ``[n]``.
    """

    whole = True

    def __init__(self, lengths: Tensor):
        self._all = lengths

    def begin(self, base: LensReplay, prompts: Tensor) -> Tensor:
        """See ``Reading``."""
        self._base, self._last = base, self._all[prompts] - 1
        self._own = base.ends(Read(self._last)).float().log_softmax(-1)
        return torch.zeros(len(prompts))

    def of(self, streams: Tensor, rows: Tensor) -> Tensor:
        """See ``Reading``."""
        here = self._base.logits(streams, Read(self._last[rows.cpu()])).float().log_softmax(-1)
        own = self._own[rows.to(self._own.device)]
        return (own.exp() * (own - here)).sum(-1).cpu()


class LastHidden:
    """What the unembedding reads at each prompt's last token ``[d_model]``.

    Args:
        lengths: tokens of each prompt ``[n]``.
    """

    whole = False

    def __init__(self, lengths: Tensor):
        self._all = lengths

    def begin(self, base: LensReplay, prompts: Tensor) -> Tensor:
        """See ``Reading``."""
        self._base, self._last = base, self._all[prompts] - 1
        return self.of(base.stream(base.backend.info.n_layers), torch.arange(len(prompts)))

    def of(self, streams: Tensor, rows: Tensor) -> Tensor:
        """See ``Reading``."""
        ends = streams[torch.arange(len(streams), device=streams.device), self._last[rows.cpu()].to(streams.device)]
        return self._base.backend.placed.normalised(ends[:, None])[:, 0].float()
