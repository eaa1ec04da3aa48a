"""Indirect object identification: who gets the gift?

"When Mary and John went to the store, John gave a drink to" is followed by " Mary": the name that stands once,
the indirect object (IO), and not the subject (S), which stands twice. Wang et al. 2022, arXiv 2211.00593.

1. Draw a template, two names that are single tokens, their order (half ABBA: IO first; half BABA: S first),
   a place and an object.
2. The corrupt twin has the other name at S2, so that the right answer changes sides: "... store, Mary gave".
   ``corrupt="abc"`` puts a third name there instead, which makes no answer right.
3. Only templates that give the commonest number of tokens for this tokenizer are used, so that a task is a
   rectangle of token ids and its spans stand at the same positions.

The templates are ones that small models complete well; how well a model does is measured, never assumed.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import OptionError, TaskError
from .layout import group_ids
from .task import Task
from .text import continuation

if TYPE_CHECKING:
    from ..metrics import Metric, MetricFunction
    from ..model import Model

TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {thing} to",
    "When {A} and {B} got to the {place}, {S} gave a {thing} to",
    "When {A} and {B} came to the {place}, {S} gave a {thing} to",
    "When {A} and {B} met at the {place}, {S} gave a {thing} to",
    "When {A} and {B} met at the {place}, {S} offered a {thing} to",
    "When {A} and {B} were at the {place}, {S} handed a {thing} to",
    "When {A} and {B} were in the {place}, {S} gave a {thing} to",
    "When {A} and {B} went to the {place}, {S} handed a {thing} to",
    "When {A} and {B} walked to the {place}, {S} gave a {thing} to",
    "When {A} and {B} worked at the {place}, {S} sent a {thing} to",
    "When {A} and {B} stopped at the {place}, {S} offered a {thing} to",
    "When {A} and {B} drove to the {place}, {S} lent a {thing} to",
    "When {A} and {B} played at the {place}, {S} threw a {thing} to",
    "While {A} and {B} were at the {place}, {S} gave a {thing} to",
    "Then, {A} and {B} went to the {place}. {S} gave a {thing} to",
    "Today, {A} and {B} went to the {place}. {S} gave a {thing} to",
    "The day {A} and {B} went to the {place}, {S} gave a {thing} to",
    "One day {A} and {B} went to the {place}, and {S} gave a {thing} to",
    "Afterwards, {A} and {B} went to the {place}. {S} gave a {thing} to",
)
NAMES = (
    "Adam Alice Amy Anna Brian Daniel David Emily Emma Eric George Helen Henry Jack James Jane Jason Jessica "
    "John Kate Kevin Laura Lisa Maria Mark Martin Mary Michael Paul Peter Rachel Robert Ruth Ryan Sam Sarah "
    "Simon Sophie Steve Susan Thomas Tom"
).split()
PLACES = ("store", "park", "school", "office", "station", "house", "garden", "hospital")
THINGS = ("drink", "book", "ring", "ball", "letter", "gift", "pen", "key")


def ioi(
    model: Model,
    n: int = 64,
    seed: int = 0,
    corrupt: Literal["swap", "abc"] = "swap",
    metric: str | Metric | MetricFunction = "logit_diff",
) -> Task:
    """Indirect object identification for this model's tokenizer.

    Spans: ``IO`` and ``S1`` (the names as they first stand), ``S1+1``, ``S2`` (the subject again), ``END``.

    Args:
        model: its tokenizer decides which names and templates can be used.
        n: number of prompts; even numbers are half ABBA, half BABA.
        seed: same seed, same prompts.
        corrupt: ``"swap"``: the indirect object stands at S2; ``"abc"``: a third name does.
        metric: a name or a function ``(logits [n, vocab], task) -> [n]``.

    Raises:
        OptionError: ``n`` is below 1, or ``corrupt`` is unknown.
        TaskError: this tokenizer has too few single-token names.
    """
    if not isinstance(n, int) or n < 1:
        raise OptionError(f"n = {n!r} prompts", expected="a whole number from 1")
    if corrupt not in ("swap", "abc"):
        raise OptionError(f"corrupt = {corrupt!r}", expected='"swap" or "abc"')
    names = {name: ids[0] for name in NAMES if len(ids := continuation("When", " " + name, model)) == 1}
    if len(names) < 3:
        raise TaskError(f"{len(names)} of {len(NAMES)} names are single tokens for {model.name}", expected="at least 3")
    templates, places, things = _same_length(model, sorted(names))
    draw = random.Random(seed)
    prompts = []
    for i in range(n):
        io, subject, third = draw.sample(sorted(names), 3)
        first, second = (io, subject) if i % 2 == 0 else (subject, io)
        other = io if corrupt == "swap" else third
        words = {"A": first, "B": second, "place": draw.choice(places), "thing": draw.choice(things)}
        template = draw.choice(templates)
        clean, twin = (template.format(S=name, **words) for name in (subject, other))
        prompts.append((clean, twin, io, subject))
    clean, twins, io, subject = zip(*prompts, strict=True)
    ids = torch.cat([model.tokens(text) for text in clean])
    io_ids, subject_ids = (torch.tensor([names[name] for name in column]) for column in (io, subject))
    where = {"IO": _nth(ids, io_ids, 0), "S1": _nth(ids, subject_ids, 0), "S2": _nth(ids, subject_ids, 1)}
    return Task.from_tokens(
        ids,
        torch.cat([model.tokens(text) for text in twins]),
        io_ids,
        subject_ids,
        spans={"IO": where["IO"], "S1": where["S1"], "S1+1": where["S1"] + 1, "S2": where["S2"]},
        templates=_by_name_positions(where),
        texts=(clean, twins),
        metric=metric,
        name="ioi",
        meta={"about": "indirect object identification", "n": n, "seed": seed, "corrupt": corrupt},
    )


def _same_length(model: Model, names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The templates, places and things that give prompts of the commonest length for this tokenizer."""
    places = [place for place in PLACES if len(continuation("the", " " + place, model)) == 1]
    things = [thing for thing in THINGS if len(continuation("a", " " + thing, model)) == 1]
    if not places or not things:
        raise TaskError(f"No place or no thing is a single token for {model.name}", expected="at least one each")
    filled = {"A": names[0], "B": names[1], "S": names[1], "place": places[0], "thing": things[0]}
    length = {template: len(model.encode(template.format(**filled))) for template in TEMPLATES}
    common = Counter(length.values()).most_common(1)[0][0]
    return [template for template in TEMPLATES if length[template] == common], places, things


def _nth(ids: torch.Tensor, token: torch.Tensor, nth: int) -> torch.Tensor:
    """Position ``[n]`` at which each row's token stands for the nth time."""
    return torch.stack([(row == one).nonzero()[nth, 0] for row, one in zip(ids, token, strict=True)])


def _by_name_positions(where: dict[str, torch.Tensor]) -> torch.Tensor:
    """Group ``[n]`` by where the three names stand, whichever of the first two is the IO.

    Means over a group then hold both orders, and so say nothing about which name came first.
    """
    names = torch.stack([where["IO"], where["S1"]], 1).sort(1).values
    return group_ids(torch.cat([names, where["S2"][:, None]], 1))
