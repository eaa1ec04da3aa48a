"""Indirect object identification: who gets the gift?

"When Mary and John went to the store, John gave a drink to" is followed by " Mary": the name that stands once,
the indirect object (IO), and not the subject (S), which stands twice. Wang et al. 2022, arXiv 2211.00593.

1. Draw a template, two names that are single tokens, their order (half ABBA: IO first; half BABA: S first),
   a place and an object; no clean prompt twice.
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

from .twins import Twins, check_options, distinct, made, usable, written

if TYPE_CHECKING:
    from ..metrics import Metric, MetricFunction
    from ..model import Model
    from .task import Task

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
        n: number of prompts, all different; even numbers are half ABBA, half BABA.
        seed: same seed, same prompts.
        corrupt: ``"swap"``: the indirect object stands at S2; ``"abc"``: a third name does.
        metric: a name or a function ``(logits [n, vocab], task) -> [n]``.

    Raises:
        OptionError: ``n`` is below 1 or more than there are prompts, or ``corrupt`` is unknown.
        TaskError: this tokenizer has too few single-token names, or no single-token place or thing.
    """
    check_options(n, corrupt=(corrupt, ("swap", "abc")))
    ids = usable(NAMES, "When", model, "names", 3)
    names = sorted(ids)
    places = list(usable(PLACES, "the", model, "places", 1))
    things = list(usable(THINGS, "a", model, "things", 1))
    templates = _same_length(model, A=names[0], B=names[1], S=names[1], place=places[0], thing=things[0])
    draw = random.Random(seed)

    def twins(i: int) -> Twins:
        io, subject, third = draw.sample(names, 3)
        first, second = (io, subject) if i % 2 == 0 else (subject, io)
        words = {"A": first, "B": second, "place": draw.choice(places), "thing": draw.choice(things)}
        template = draw.choice(templates)
        clean, fields = written(template, S=subject, **words)
        corrupted = written(template, S=io if corrupt == "swap" else third, **words)[0]
        # After both names, whichever is the subject: the two orders share a template, and their means no order.
        fields |= {f"{name}+1": fields[name] + len(words[name]) + len(" ") for name in ("A", "B")}
        of_io, of_subject = ("A", "B") if i % 2 == 0 else ("B", "A")
        spans = {"IO": of_io, "S1": of_subject, "S1+1": f"{of_subject}+1", "S2": "S"}
        return Twins(clean, corrupted, ids[io], ids[subject], fields, spans)

    return made(
        model,
        distinct(n, twins),
        metric=metric,
        check=False,
        name="ioi",
        about="indirect object identification",
        seed=seed,
        corrupt=corrupt,
    )


def _same_length(model: Model, **filled: str) -> list[str]:
    """The templates that give prompts of the commonest length for this tokenizer."""
    length = {template: len(model.encode(template.format(**filled))) for template in TEMPLATES}
    common = Counter(length.values()).most_common(1)[0][0]
    return [template for template in TEMPLATES if length[template] == common]
