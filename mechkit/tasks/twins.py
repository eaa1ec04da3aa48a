"""What the ready-made tasks share: words that can be used, and pairs of texts made into a task.

1. ``usable`` keeps the words that are single tokens where they will stand, so that twins have one length.
2. ``written`` fills a wording in and says where in the text each of its fields begins.
3. ``distinct`` draws pairs of prompts until no two are the same, so that the halves of a split have none in common.
4. ``made`` encodes them, finds the token of every field, and measures whether the model can do the task at all.
   Prompts with all their fields at the same positions share a template, whichever field a span names in each.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OptionError, TaskError
from .ability import with_ability
from .layout import group_ids
from .task import Task
from .text import continuation, pad_right

if TYPE_CHECKING:
    from ..metrics import Metric, MetricFunction
    from ..model import Model


@dataclass(frozen=True)
class Twins:
    """A pair of prompts.

    Attributes:
        clean, corrupt: the texts.
        correct, wrong: ids of the answers to the clean prompt.
        fields: where in the clean text each field begins, in characters.
        spans: name of a span to the field that it is, or to the first and the last of several.
    """

    clean: str
    corrupt: str
    correct: int
    wrong: int
    fields: Mapping[str, int]
    spans: Mapping[str, str | tuple[str, str]]


def check_options(n: int, **options: tuple[Any, Sequence[Any]]) -> None:
    """Refuse a number of prompts below 1, and options (name: given, allowed) outside what is allowed.

    Raises:
        OptionError: which one, and what it may be.
    """
    if not isinstance(n, int) or n < 1:
        raise OptionError(f"n = {n!r} prompts", expected="a whole number from 1")
    for name, (given, allowed) in options.items():
        if given not in allowed:
            raise OptionError(f"{name} = {given!r}", expected="one of " + ", ".join(f'"{value}"' for value in allowed))


def usable(words: Iterable[str], before: str, model: Model, what: str, least: int, space: str = " ") -> dict[str, int]:
    """The words that are single tokens after ``before`` and a space, with their ids.

    Args:
        words: to choose from.
        before: what stands before them in the prompt, without the space.
        model: its tokenizer decides.
        what: the words in the plural, for the message.
        least: how many are needed.
        space: what is between; empty for a word that follows at once.

    Raises:
        TaskError: fewer than ``least`` are.
    """
    words, unknown = list(words), getattr(model.need_tokenizer(), "unk_token_id", None)
    one = {word: ids[0] for word in words if len(ids := continuation(before, space + word, model)) == 1}
    one = {word: token for word, token in one.items() if token != unknown}
    if len(one) < least:
        raise TaskError(
            f"{len(one)} of {len(words)} {what} are single tokens for {model.name}",
            expected=f"at least {least}",
            fix="Make the prompts with Task.from_frame and words that this tokenizer knows",
        )
    return one


def written(wording: str, **words: str) -> tuple[str, dict[str, int]]:
    """A wording with its ``{fields}`` filled in, and where in the text each begins, in characters."""
    text = ""
    begins: dict[str, int] = {}
    for literal, name, _, _ in string.Formatter().parse(wording):
        text += literal
        if name is not None:
            begins[name] = len(text)
            text += words[name]
    return text, begins


def distinct(n: int, draw: Callable[[int], Twins]) -> list[Twins]:
    """``n`` pairs of prompts, no two clean ones the same; ``draw`` is given how many there are so far.

    Raises:
        OptionError: there are not that many.
    """
    found: dict[str, Twins] = {}
    misses = 0
    while len(found) < n:
        twins = draw(len(found))
        misses = misses + 1 if twins.clean in found else 0
        found.setdefault(twins.clean, twins)
        if misses > 100 + 20 * len(found):  # of N prompts, the last is missed 20 N times in a row once in e^20
            raise OptionError(
                f"n = {n} prompts", expected=f"at most {len(found)}, as many as there are for this tokenizer"
            )
    return list(found.values())


def made(
    model: Model,
    twins: Sequence[Twins],
    metric: str | Metric | MetricFunction,
    check: bool,
    name: str,
    **meta: Any,
) -> Task:
    """A task of these pairs of prompts.

    Args:
        model: encodes the texts and, with ``check``, is asked whether it can do the task.
        twins: pairs of prompts; all must have the same spans.
        metric: a name, a Metric or a function ``(logits [n, vocab], task) -> [n]``.
        check: measure the accuracy, and warn when it is not clearly above chance.
        name: of the task.
        meta: how it was made.

    Raises:
        TaskError: for this tokenizer twins differ in length, or a field is not at the beginning of a token.
    """
    rows = [[model.tokens(text)[0].tolist() for text in (pair.clean, pair.corrupt)] for pair in twins]
    for pair, (clean, corrupt) in zip(twins, rows, strict=True):
        if len(clean) != len(corrupt):
            raise TaskError(
                f"{pair.clean!r} is {len(clean)} tokens and {pair.corrupt!r} is {len(corrupt)} for {model.name}",
                expected="the same number",
            )
    ids, lengths = pad_right([clean for clean, _ in rows], model.pad_token)
    fields = [_positions(pair, clean, model) for pair, (clean, _) in zip(twins, rows, strict=True)]
    shapes = [[*where.values(), len(clean)] for where, (clean, _) in zip(fields, rows, strict=True)]
    columns = {
        span: torch.tensor([_ends(pair.spans[span], where) for pair, where in zip(twins, fields, strict=True)])
        for span in twins[0].spans
    }
    task = Task.from_tokens(
        ids,
        pad_right([corrupt for _, corrupt in rows], model.pad_token)[0],
        torch.tensor([pair.correct for pair in twins]),
        torch.tensor([pair.wrong for pair in twins]),
        lengths=lengths,
        spans=columns,
        templates=group_ids(pad_right(shapes, -1)[0]),
        texts=([pair.clean for pair in twins], [pair.corrupt for pair in twins]),
        metric=metric,
        name=name,
        meta={"n": len(twins), **meta},
    )
    return with_ability(model, task) if check else task


def _ends(span: str | tuple[str, str], where: Mapping[str, int]) -> list[int]:
    """First and one-past-last position of a span; every field is one token."""
    first, last = (span, span) if isinstance(span, str) else span
    return [where[first], where[last] + 1]


def _positions(pair: Twins, ids: list[int], model: Model) -> dict[str, int]:
    """Position of each field's token in the clean prompt."""
    found = {}
    for name, begin in pair.fields.items():
        start = model.tokens(pair.clean[:begin].rstrip(" "))[0].tolist()
        if ids[: len(start)] != start:
            raise TaskError(
                f"In {pair.clean!r}, {model.name} reads {name} together with what stands before it",
                expected="a tokenizer that begins a token there",
            )
        found[name] = len(start)
    return found
