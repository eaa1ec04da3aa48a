"""Gendered pronouns: she or he?

"So Mary is a really great friend, isn't" is followed by " she". Mathwin et al. 2023, "Identifying a preliminary
circuit for predicting gendered pronouns in GPT-2 small".

1. Draw a name that is a single token, half women's and half men's, an adjective and a noun.
2. The corrupt twin has a name of the other gender, so that the right answer changes sides. The report compared with
   "That person" instead, which says nothing about gender: with a name on both sides, what finds the name and what
   asks for a pronoun stay as they are, and only the gender changes.

The wording is the report's; adjectives and nouns are more than its "great friend", so that there are more prompts.
Names are those that English text gives to one gender nearly always; what a model has learned of them is measured.
The two pronouns are compared with each other only: the likeliest next word of a small model is often " it".
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from .twins import Twins, check_options, distinct, made, usable, written

if TYPE_CHECKING:
    from ..metrics import Metric, MetricFunction
    from ..model import Model
    from .task import Task

WORDING = "So {name} is a really {kind} {person}, isn't"
WOMEN = (
    "Alice Amanda Amy Anna Barbara Diana Elizabeth Emily Emma Hannah Helen Jane Jennifer Jessica Julia Kate Laura "
    "Linda Lisa Lucy Margaret Maria Mary Michelle Nancy Rachel Rebecca Ruth Sarah Sophie Susan"
).split()
MEN = (
    "Adam Andrew Brian Charles Daniel David Edward Eric Frank George Henry Jack James Jason John Joseph Kevin Mark "
    "Martin Matthew Michael Patrick Paul Peter Richard Robert Ryan Simon Steve Thomas William"
).split()
KINDS = "great good nice kind smart".split()
PEOPLE = "friend cook teacher student singer dancer writer neighbor".split()


def gendered_pronoun(
    model: Model,
    n: int = 64,
    seed: int = 0,
    metric: str | Metric | MetricFunction = "logit_diff",
    check: bool = True,
) -> Task:
    """The pronoun of a name's gender, for this model's tokenizer; see the module for the prompts.

    Spans: ``name``, ``END``.

    Args:
        model: its tokenizer decides which names can be used.
        n: number of prompts, all different; even numbers are half women's names, half men's.
        seed: same seed, same prompts.
        metric: a name, a Metric or a function ``(logits [n, vocab], task) -> [n]``.
        check: measure the accuracy, and warn when it is not clearly above chance.

    Raises:
        OptionError: ``n`` is below 1, or more than there are prompts.
        TaskError: this tokenizer has too few single-token names, or no single tokens for the pronouns.
    """
    check_options(n)
    names = [sorted(usable(of, "So", model, "names", 2)) for of in (WOMEN, MEN)]
    kinds = sorted(usable(KINDS, "a really", model, "adjectives", 1))
    people = sorted(usable(PEOPLE, "a really great", model, "nouns", 1))
    start = written(WORDING, name=names[0][0], kind=kinds[0], person=people[0])[0]
    pronouns = list(usable(("she", "he"), start, model, "pronouns", 2).values())
    draw = random.Random(seed)

    def twins(i: int) -> Twins:
        own, other = i % 2, 1 - i % 2
        words = {"kind": draw.choice(kinds), "person": draw.choice(people)}
        clean, fields = written(WORDING, name=draw.choice(names[own]), **words)
        corrupt = written(WORDING, name=draw.choice(names[other]), **words)[0]
        return Twins(clean, corrupt, pronouns[own], pronouns[other], fields, {"name": "name"})

    return made(
        model,
        distinct(n, twins),
        metric=metric,
        check=check,
        name="gendered_pronoun",
        about="a pronoun of a name's gender",
        seed=seed,
    )
