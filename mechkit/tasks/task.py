"""A task: pairs of prompts, the answers to them, and where in the prompt things stand.

1. Every clean prompt has a corrupt twin of the same number of tokens, so that any position of the one can be
   patched into the other.
2. Answers are single tokens; the metric compares their logits at the answer position, the prompt's last token.
3. Prompts of different lengths stand in one tensor, padded at the right. In a causal model nothing before the
   padding can see it, so this is exact.
4. Prompts with their spans at the same positions share a template: means over the task are taken for each
   position of a template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OptionError, TaskError
from ..metrics import METRICS, Metric, MetricFunction
from ..metrics import metric as as_metric
from .layout import checked_ids, layout

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from ..model import Model


@dataclass(frozen=True, eq=False)
class Task:
    """Prompts in pairs; make one with ``mk.tasks.ioi``, ``Task.from_frame`` or ``Task.from_tokens``.

    Attributes:
        clean, corrupt: token ids ``[n, pos]``, padded at the right.
        correct, wrong: answer token ids ``[n]``.
        lengths: number of tokens of each prompt ``[n]``, padding not counted.
        spans: name to ``[n, 2]``, first position and one past the last; ``END`` is always there.
        templates: group of each prompt ``[n]``; prompts of a group have their spans at the same positions.
        metric: what is measured.
        name: for tables and provenance.
        meta: how the task was made.
    """

    clean: Tensor
    corrupt: Tensor
    correct: Tensor
    wrong: Tensor
    lengths: Tensor
    spans: Mapping[str, Tensor]
    templates: Tensor
    metric: Metric
    name: str = "task"
    meta: Mapping[str, Any] = field(default_factory=dict)
    _texts: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @classmethod
    def from_tokens(
        cls,
        clean: Tensor,
        corrupt: Tensor,
        correct: Tensor,
        wrong: Tensor,
        *,
        lengths: Tensor | None = None,
        spans: Mapping[str, Tensor] | None = None,
        templates: Tensor | None = None,
        texts: tuple[Sequence[str], Sequence[str]] = ((), ()),
        metric: str | Metric | MetricFunction = "logit_diff",
        name: str = "task",
        meta: Mapping[str, Any] | None = None,
    ) -> Task:
        """A task of token ids; no tokenizer is needed.

        Args:
            clean, corrupt: ids ``[n, pos]``, padded at the right where ``lengths`` says so.
            correct, wrong: ids of the answers ``[n]``.
            lengths: tokens of each prompt ``[n]``; left out: every prompt fills its row.
            spans: name to ``[n]`` (one token) or ``[n, 2]`` (first, one past the last).
            templates: group of each prompt ``[n]``; left out: by where the spans stand.
            texts: the clean and the corrupt prompts as text.
            metric: a name or a function ``(logits [n, vocab], task) -> [n]``.
            name: for tables and provenance.
            meta: how the task was made; kept as it is.

        Raises:
            TaskError: shapes that do not fit, no prompts, or twins that do not differ anywhere.
        """
        clean, corrupt, correct, wrong = checked_ids(clean, corrupt, correct, wrong)
        return cls(
            clean,
            corrupt,
            correct,
            wrong,
            **layout(clean, lengths, spans or {}, templates),
            _texts=(tuple(texts[0]), tuple(texts[1])),
            metric=as_metric(metric),
            name=name,
            meta=dict(meta or {}),
        )

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        model: Model,
        metric: str | Metric | MetricFunction = "logit_diff",
        name: str = "task",
    ) -> Task:
        """A task of your own prompts: columns ``clean``, ``corrupt``, ``correct``, ``wrong``, all text.

        Answers are as the model would write them, mostly with a leading space: ``" Mary"``.

        Raises:
            TaskError: a column is missing, twins differ in number of tokens, or an answer is several tokens;
                the message names the row.
        """
        from .text import encode_frame

        *ids, lengths = encode_frame(frame, model)
        texts = (list(frame["clean"]), list(frame["corrupt"]))
        return cls.from_tokens(*ids, lengths=lengths, texts=texts, metric=metric, name=name)

    @classmethod
    def join(cls, tasks: Sequence[Task]) -> Task:
        """The prompts of several tasks as one, whatever their lengths.

        Spans that all of them have are kept; templates stay apart. ``meta["tasks"]`` has their names and sizes.

        Raises:
            TaskError: none, something that is no task, or metrics that differ.
        """
        from .join import joined

        return joined(tasks)

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Task:
        """Some of the prompts, as a task; padding that nobody needs any more is cut off."""
        rows = torch.arange(len(self))[index].reshape(-1)
        if not len(rows):
            raise TaskError(f"{index!r} picks none of {len(self)} prompts", expected="at least one")
        width = int(self.lengths[rows].max())
        return replace(
            self,
            clean=self.clean[rows, :width],
            corrupt=self.corrupt[rows, :width],
            correct=self.correct[rows],
            wrong=self.wrong[rows],
            lengths=self.lengths[rows],
            templates=self.templates[rows],
            spans={key: value[rows] for key, value in self.spans.items()},
            _texts=(_pick(self._texts[0], rows), _pick(self._texts[1], rows)),
        )

    def __iter__(self) -> Iterator[Task]:
        return (self[i] for i in range(len(self)))

    @property
    def answers(self) -> Tensor:
        """Ids of the correct and the wrong answer ``[n, 2]``."""
        return torch.stack([self.correct, self.wrong], 1)

    @property
    def answer_positions(self) -> Tensor:
        """Position whose logits give the answer: each prompt's last token ``[n]``."""
        return self.lengths - 1

    @property
    def first_difference(self) -> Tensor:
        """First position at which clean and corrupt differ ``[n]``; nothing before it can differ either."""
        return (self.clean != self.corrupt).int().argmax(1)

    def with_metric(self, which: str | Metric | MetricFunction) -> Task:
        """The same prompts, measured otherwise."""
        return replace(self, metric=as_metric(which))

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple[Task, Task]:
        """Two tasks with no prompt in common: ``fraction`` of the prompts, and the rest.

        Raises:
            OptionError: a side would have no prompts.
        """
        first = round(len(self) * fraction)
        if not 0 < first < len(self):
            raise OptionError(
                f"split({fraction}) of {len(self)} prompts leaves one side empty",
                expected="a fraction that leaves at least one prompt on each side",
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self[order[:first].sort().values], self[order[first:].sort().values]

    def known(self, model: Model) -> Task:
        """The prompts on which the model prefers the correct answer.

        Raises:
            TaskError: there are none.
        """
        answers = model.read(self.clean, self.answer_positions, self.answers)
        rows = (METRICS["logit_diff"](answers, self) > 0).nonzero()[:, 0].cpu()
        if not len(rows):
            raise TaskError(
                f'The model prefers the wrong answer on all {len(self)} prompts of "{self.name}"',
                fix="Take an easier task or a larger model",
            )
        return self[rows]

    def span(self, where: str | int) -> Tensor:
        """First and one-past-last position ``[n, 2]`` of a named span, or of one position in every prompt.

        Raises:
            TaskError: there is no span of that name, or the position is outside a prompt.
        """
        if isinstance(where, str):
            if where not in self.spans:
                raise TaskError(f'Task "{self.name}" has no span "{where}"', expected="one of " + ", ".join(self.spans))
            return self.spans[where]
        first = torch.full((len(self),), where) + (self.lengths if where < 0 else 0)
        if bool(((first < 0) | (first >= self.lengths)).any()):
            raise TaskError(f"Position {where} is outside a prompt of {int(self.lengths.min())} tokens")
        return torch.stack([first, first + 1], 1)

    @property
    def texts(self) -> list[str]:
        """The clean prompts as text, where the task was made from text."""
        return list(self._texts[0])

    def __repr__(self) -> str:
        shape = f"{len(self)} prompts of {int(self.lengths.min())} to {int(self.lengths.max())} tokens"
        return f'Task("{self.name}", {shape}, metric={self.metric.name})'


def _pick(texts: tuple[str, ...], rows: Tensor) -> tuple[str, ...]:
    return tuple(texts[i] for i in rows.tolist()) if texts else ()
