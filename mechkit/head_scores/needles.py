"""Needles: a piece of a context that a question asks for, and lists of things that people own to draw them from.

1. A list has one line a person, "Mary owns the red lamp."; no name, colour or thing stands in it twice.
2. The question begins the answer: "Mary owns"; the needle is " the red lamp", in the line of that person.

Wu et al. 2024 (arXiv 2404.15574) put one sentence into long essays; these lists are its small form.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..decomposition.token_spans import pieces_of
from ..errors import OptionError, PromptError
from ..tasks.ioi import NAMES

if TYPE_CHECKING:
    from ..model import Model

COLOURS = "red blue green yellow black white brown orange purple silver golden pink grey".split()
THINGS = "lamp chair table clock bicycle guitar camera violin basket mirror kettle bottle hammer piano wagon".split()


@dataclass(frozen=True)
class Needle:
    """A piece of a context that a question asks for.

    Attributes:
        context: the text; the prompt is ``context + question``.
        needle: a piece of it that stands there once, of whole tokens; the answer that the model should write.
        question: what follows the context.
    """

    context: str
    needle: str
    question: str


@dataclass(frozen=True)
class Placed:
    """A needle in token ids; no tokenizer is needed.

    Attributes:
        ids: of the prompt.
        start, stop: the needle's first position, and one past its last.
    """

    ids: tuple[int, ...]
    start: int
    stop: int


def needles(model: Model, n: int = 50, seed: int = 0, *, lines: int = 6) -> list[Needle]:
    """Lists of who owns what, with a question about one of them.

    Args:
        model: its tokenizer is only asked whether each prompt fits its context.
        n: how many.
        seed: same seed, same needles.
        lines: of each list.

    Raises:
        OptionError: no needles, or more lines than there are names, colours and things.
        PromptError: a list that is longer than the model's context.
    """
    most = min(len(NAMES), len(COLOURS), len(THINGS))
    if not isinstance(n, int) or n < 1:
        raise OptionError(f"n = {n!r}", expected="a whole number from 1")
    if not isinstance(lines, int) or not 1 <= lines <= most:
        raise OptionError(f"lines = {lines!r}", expected=f"a whole number from 1 to {most}")
    draw, made = random.Random(seed), []
    for _ in range(n):
        drawn = (draw.sample(words, lines) for words in (NAMES, COLOURS, THINGS))
        rows = list(zip(*drawn, strict=True))
        name, colour, thing = draw.choice(rows)
        context = "\n".join(f"{who} owns the {shade} {what}." for who, shade, what in rows)
        question = f"\n\nQuestion: What does {name} own?\nAnswer: {name} owns"
        made.append(Needle(context, f"the {colour} {thing}", question))
        model.tokens(context + question)
    return made


def placed(model: Model, given: Any) -> Placed:
    """A needle in token ids.

    Args:
        model: whose tokens.
        given: a ``Needle``, ``(context, needle, question)``, or a ``Placed``.

    Raises:
        PromptError: neither; a needle that is not in its context, or not once; a span outside the ids.
    """
    if isinstance(given, Placed):
        if not 0 <= given.start < given.stop <= len(given.ids):
            raise PromptError(
                f"A needle at {given.start} to {given.stop} of {len(given.ids)} tokens",
                expected="0 <= start < stop <= tokens",
            )
        return given
    parts = (given.context, given.needle, given.question) if isinstance(given, Needle) else given
    if not isinstance(parts, Sequence) or len(parts) != 3 or not all(isinstance(one, str) for one in parts):
        raise PromptError(f"{given!r} is no needle", expected="(context, needle, question), three texts")
    context, needle, question = parts
    if context.count(needle.strip()) != 1 or not needle.strip():
        raise PromptError(f"The needle {needle!r}", expected="a piece of its context that stands there once")
    # Only the context's own tokens are searched: the question may well repeat the needle.
    whole, own = pieces_of(model, context + question), pieces_of(model, context)
    start, stop = own.span(needle)
    if whole.ids[:stop] != own.ids[:stop]:
        raise PromptError(
            f"The needle {needle!r} is other tokens with the question behind its context",
            fix="End the context with a line break",
        )
    return Placed(tuple(whole.ids), start, stop)
