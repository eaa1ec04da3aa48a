"""Colored objects: what color is the ball?

"Q: On the table, there is a red pencil, a blue cup, and a green ball. What color is the ball?\\nA:" is followed by
" Green". Merullo et al. 2023, arXiv 2310.08744, after a task of Ippolito and Callison-Burch.

1. Draw three objects and their colors, a place, the way the list begins, and which object is asked for.
2. Before it stands a solved question of the same form (the paper's one shot), with other objects and other colors;
   ``one_shot=False`` leaves it out.
3. In the corrupt twin another object of the list is asked for, so that its color is the answer: the twins have the
   same tokens but for the word asked for, and the answers change sides. ``corrupt="unlisted"`` is the paper's: an
   object that is not in the list is asked for, no answer is right, and the wrong answer is a color not in the list.

Wording, objects and colors are the paper's. It is a hard task: GPT-2 medium names the right color half of the time
(the paper's 49.6%), and SmolLM2-135M prefers it to one other color on about six prompts of ten, with this wording or
others that were tried ("The ball is", "The color of the ball is", two objects, up to six shots). Expect the warning.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

from .twins import Twins, check_options, distinct, made, usable, written

if TYPE_CHECKING:
    from ..metrics import Metric, MetricFunction
    from ..model import Model
    from .task import Task

WORDING = (
    "Q: On the {place}, {begins} {a1} {color1} {object1}, {a2} {color2} {object2}, and {a3} {color3} {object3}. "
    "What color is the {asked}?\nA:"
)
OBJECTS = (
    "pencil notebook pen cup plate jug mug puzzle textbook leash necklace bracelet bottle ball envelope lighter bowl"
).split()
COLORS = "red orange yellow green blue purple brown black".split()
PLACES = ("table", "desk", "floor")
BEGINNINGS = ("there is", "you see", "I see")


def colored_objects(
    model: Model,
    n: int = 64,
    seed: int = 0,
    corrupt: Literal["listed", "unlisted"] = "listed",
    one_shot: bool = True,
    metric: str | Metric | MetricFunction = "logit_diff",
    check: bool = True,
) -> Task:
    """The color of one of three objects, for this model's tokenizer; see the module for the prompts.

    Spans: ``color`` and ``object`` (the right color and its object, in the list), ``asked`` (the object, in the
    question), ``END``; with ``corrupt="listed"`` also ``wrong_color`` (in the list).

    Args:
        model: its tokenizer decides which objects and colors can be used.
        n: number of prompts, all different.
        seed: same seed, same prompts.
        corrupt: ``"listed"``: the twin asks for another object of the list; ``"unlisted"``: for one not in it.
        one_shot: put a solved question before.
        metric: a name, a Metric or a function ``(logits [n, vocab], task) -> [n]``.
        check: measure the accuracy, and warn when it is not clearly above chance.

    Raises:
        OptionError: ``n`` is below 1 or more than there are prompts, or ``corrupt`` is unknown.
        TaskError: this tokenizer has too few single-token objects or colors.
    """
    check_options(n, corrupt=(corrupt, ("listed", "unlisted")))
    needed = 7 if one_shot else 4
    objects = sorted(usable(OBJECTS, "the", model, "objects", needed))
    lower = usable(COLORS, "a", model, "colors", needed)
    answers = usable([color.title() for color in lower], "?\nA:", model, "colors as answers", needed)
    colors = sorted(color for color in lower if color.title() in answers)
    places = sorted(usable(PLACES, "On the", model, "places", 1))
    draw = random.Random(seed)

    def scene(things: list[str], paints: list[str]) -> dict[str, str]:
        words = {"place": draw.choice(places), "begins": draw.choice(BEGINNINGS)}
        for i, (thing, paint) in enumerate(zip(things[:3], paints[:3], strict=True), 1):
            words |= {f"a{i}": "an" if paint[0] in "aeiou" else "a", f"color{i}": paint, f"object{i}": thing}
        return words

    def twins(_: int) -> Twins:
        things, paints = draw.sample(objects, needed), draw.sample(colors, needed)
        words, before = scene(things, paints), ""
        if one_shot:
            shown = draw.randrange(4, 7)
            shot = written(WORDING, asked=things[shown], **scene(things[4:], paints[4:]))[0]
            before = f"{shot} {paints[shown].title()}\n"
        asked, other = draw.sample(range(3), 2)
        if corrupt == "unlisted":
            other = 3
        clean, fields = written(before + WORDING, asked=things[asked], **words)
        twin = written(before + WORDING, asked=things[other], **words)[0]
        spans = {"color": f"color{asked + 1}", "object": f"object{asked + 1}", "asked": "asked"}
        if corrupt == "listed":
            spans["wrong_color"] = f"color{other + 1}"
        right, wrong = (answers[paints[i].title()] for i in (asked, other))
        return Twins(clean, twin, right, wrong, fields, spans)

    return made(
        model,
        distinct(n, twins),
        metric=metric,
        check=check,
        name="colored_objects",
        about="the color of an object",
        seed=seed,
        corrupt=corrupt,
        one_shot=one_shot,
    )
