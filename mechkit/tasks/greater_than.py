"""Greater-than: in which year can a war end that began in 1743?

"The war lasted from the year 1743 to the year 17" is followed by a year after 43. Hanna et al. 2023, arXiv
2305.00586.

1. Find what this tokenizer reads as one token, in the start year and after the prompt alike. It becomes the compared
   number, and the prompt's end stands before it:

       compares      prompt                                                      what comes next
       "two digits"  The war lasted from the year 17[43] to the year 17          00 to 99, the paper's form
       "decade"      The war lasted from the year 17[4]9 to the year 17          0 to 9
       "unit"        The war lasted from the year 174[3] to the year 174         0 to 9

   Each is a true greater-than: an end year is later than the start year exactly when its compared number is larger.
   For "decade" this is why the start year ends in 9: of 1749's own decade no year is later. "decade" is for
   tokenizers that write digit by digit (SmolLM2, Gemma, Qwen), "unit" for those that take three at a time (Llama 3).
2. Draw a noun, a century and a number from 02 to 98 (2 to 8 for a digit), so that some are smaller and some larger.
3. The corrupt twin has 01 (1 for a digit) in its place, as in the paper: nearly every number is then larger.
4. The metric is the probability of all larger numbers less that of all others, over the whole vocabulary.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from ..errors import MetricError, TaskError
from ..metrics import Metric
from .text import continuation
from .twins import Twins, check_options, distinct, made, usable, written

if TYPE_CHECKING:
    from torch import Tensor

    from ..metrics import MetricFunction
    from ..model import Model
    from .task import Task

NOUNS = (
    "war siege reign voyage journey project conflict famine drought campaign expedition rebellion dispute trial strike "
    "struggle empire alliance marriage construction occupation crisis study tour career partnership experiment truce"
).split()
CENTURIES = tuple(str(century) for century in range(11, 18))
DECADES = tuple(f"{century}{decade}" for century in CENTURIES for decade in range(10))
# What is compared: its number of digits, what stands before it, what stands after it in the start year.
FORMS = {"two digits": (2, CENTURIES, ""), "decade": (1, CENTURIES, "9"), "unit": (1, DECADES, "")}
STEM = "The {noun} lasted from the year "


def greater_than(
    model: Model,
    n: int = 64,
    seed: int = 0,
    metric: str | Metric | MetricFunction = "prob_diff",
    check: bool = True,
) -> Task:
    """Greater-than for this model's tokenizer; ``meta["compares"]`` says in which form (see the module's table).

    ``prob_diff``, the paper's metric, is the probability of every larger number less that of every other one, from -1
    to 1. A metric of two answers gets the neighbours of the start year's number: correct is the number above it and
    wrong the one below, the pair whose difference in probability the paper calls cut-off sharpness. A model that
    prefers large numbers whatever the start year does well by either; how much the answer moves with the start year
    is the difference to the corrupt prompts.

    Spans: ``noun``, ``YY`` (the compared number in the start year, one token), ``END``.

    Args:
        model: its tokenizer decides which nouns and years can be used, and what is compared.
        n: number of prompts, all different.
        seed: same seed, same prompts.
        metric: ``"prob_diff"``, another metric's name, or a function ``(logits [n, vocab], task) -> [n]``.
        check: measure the accuracy, and warn when it is not clearly above chance.

    Raises:
        OptionError: ``n`` is below 1, or more than there are prompts.
        TaskError: this tokenizer has too few single-token nouns, or splits years in none of the three ways.
    """
    check_options(n)
    nouns = sorted(usable(NOUNS, "The", model, "nouns", 3))
    form, numbers, starts = _form(model, STEM.format(noun=nouns[0]))
    after = FORMS[form][2]
    draw = random.Random(seed)
    texts = list(numbers)

    def twins(_: int) -> Twins:
        noun, (before, i) = draw.choice(nouns), draw.choice(starts)
        wording = f"{STEM}{before}{{YY}}{after} to the year {before}"
        clean, fields = written(wording, noun=noun, YY=texts[i])
        corrupt = written(wording, noun=noun, YY=texts[1])[0]
        larger, smaller = numbers[texts[i + 1]], numbers[texts[i - 1]]
        return Twins(clean, corrupt, larger, smaller, fields, {"noun": "noun", "YY": "YY"})

    return made(
        model,
        distinct(n, twins),
        metric=prob_diff(torch.tensor(list(numbers.values()))) if metric == "prob_diff" else metric,
        check=check,
        name="greater_than",
        about="greater-than",
        seed=seed,
        compares=form,
    )


def prob_diff(numbers: Tensor) -> Metric:
    """Probability of the numbers larger than a prompt's own, less that of the others.

    The prompt's own number is the token at its span ``YY``, so the metric holds for any rows of a task, and for tasks
    joined.

    Args:
        numbers: token ids of 0, 1, 2, ... in order ``[k]``.
    """

    def values(logits: Tensor, task: Task) -> Tensor:
        own = task.clean.gather(1, task.span("YY")[:, :1]) == numbers
        if not bool(own.any(1).all()):
            bad = int((~own.any(1)).nonzero()[0])
            raise MetricError(
                f'Span "YY" of prompt {bad} is no number of this metric', expected="prompts of mk.tasks.greater_than"
            )
        larger = (torch.arange(len(numbers)) > own.int().argmax(1, keepdim=True)).to(logits.device)
        probabilities = logits.float().softmax(-1)[:, numbers.to(logits.device)]
        return torch.where(larger, probabilities, -probabilities).sum(-1)

    return Metric("prob_diff", "probability", "vocab", values)


def _form(model: Model, stem: str) -> tuple[str, dict[str, int], list[tuple[str, int]]]:
    """What is compared, the ids of its numbers, and the start years: what stands before the number, and the number."""
    for form, (digits, befores, after) in FORMS.items():
        texts = [f"{number:0{digits}}" for number in range(10**digits)]
        ids = {text: found[0] for text in texts if len(found := continuation(stem + befores[0], text, model)) == 1}
        if len(set(ids.values())) < len(texts):
            continue
        starts = []
        for before in befores:
            prompt = model.encode(stem + before)
            whole = [
                number
                for number, text in enumerate(texts)
                if model.encode(stem + before + text + after)[: len(prompt) + 1] == [*prompt, ids[text]]
            ]
            starts += [(before, number) for number in whole if 1 in whole and 1 < number < len(texts) - 1]
        if len({number for _, number in starts}) > 1:
            return form, ids, starts
    raise TaskError(
        f"{model.name} reads neither the last two digits of a year as one token nor single digits",
        expected="a tokenizer that splits 1743 as 17 43, as 174 3 or as 1 7 4 3",
    )
