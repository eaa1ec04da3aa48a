"""Capitals in conflict: what the prompt says against what the model knows.

"The capital of France is the city of Rome. Q: What is the capital of France? A: The capital of France is the city of"
can be followed by " Rome", which the prompt says, or by " Paris", which the model remembers. Yu et al. 2023, arXiv
2310.15910; the wording here is longer than theirs, and one that small models answer with either city.

1. Take the countries whose name and capital are single tokens, and whose capital the model itself gives, of all
   capitals here, when the first sentence is left out: without that there is nothing to be in conflict with.
2. Draw two countries: the prompt asks for one and gives it the other's capital. Correct is the city the prompt states
   (in context), wrong is the country's own capital (memorised): the logit difference is positive where the model
   follows the prompt. A model that answers from memory is below chance by this reckoning, and says so as clearly.
3. The corrupt twin is one of three, and each asks another question:

       corrupt    twin of France with Rome    changes                what it shows
       "roles"    Italy with Paris            country and city       both: in the twin each city has the other's role
       "city"     France with Paris           the stated city        what reads the prompt; memory stays the same
       "country"  Italy with Rome             the country            what remembers; the stated city stays the same

   In "roles" the twin's in-context answer is the wrong one here and its memorised answer the correct one. What copies
   from the prompt and what recalls then come out with opposite signs: patched from clean into corrupt, the one raises
   the logit difference and the other lowers it. In "city" and "country" both sources agree in the twin.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import OptionError, TaskError
from .twins import Twins, check_options, distinct, made, usable, written

if TYPE_CHECKING:
    from ..metrics import Metric, MetricFunction
    from ..model import Model
    from .task import Task

QUESTION = "Q: What is the capital of {X2}? A: The capital of {X3} is the city of"
WORDING = "The capital of {X1} is the city of {city}. " + QUESTION
_PAIRS = (
    "Afghanistan Kabul Algeria Algiers Armenia Yerevan Australia Canberra Austria Vienna Belgium Brussels "
    "Bulgaria Sofia Canada Ottawa Chile Santiago China Beijing Croatia Zagreb Cuba Havana Denmark Copenhagen "
    "Egypt Cairo England London Finland Helsinki France Paris Germany Berlin Ghana Accra Greece Athens "
    "Hungary Budapest Indonesia Jakarta Iran Tehran Iraq Baghdad Ireland Dublin Italy Rome Jamaica Kingston "
    "Japan Tokyo Kenya Nairobi Lebanon Beirut Nepal Kathmandu Norway Oslo Peru Lima Philippines Manila "
    "Poland Warsaw Portugal Lisbon Qatar Doha Romania Bucharest Russia Moscow Scotland Edinburgh Serbia Belgrade "
    "Spain Madrid Sweden Stockholm Switzerland Bern Syria Damascus Taiwan Taipei Thailand Bangkok Tunisia Tunis "
    "Turkey Ankara Vietnam Hanoi Wales Cardiff"
).split()
CAPITALS: dict[str, str] = dict(zip(_PAIRS[::2], _PAIRS[1::2], strict=True))
CORRUPT = ("roles", "city", "country")


def capitals_conflict(
    model: Model,
    n: int = 64,
    seed: int = 0,
    corrupt: Literal["roles", "city", "country"] = "roles",
    metric: str | Metric | MetricFunction = "logit_diff",
    known: bool = True,
    check: bool = True,
    countries: Iterable[str] | None = None,
) -> Task:
    """A capital stated in the prompt against the one remembered: correct is the stated one; see the module.

    What is found on some countries is to be tried on others: ``known_capitals`` lists what there is to divide up.

    Spans: ``X1``, ``X2``, ``X3`` (the country, each time it stands), ``city`` (the stated city), ``END``.

    Args:
        model: its tokenizer decides which countries and cities can be used.
        n: number of prompts, all different.
        seed: same seed, same prompts.
        corrupt: ``"roles"``, ``"city"`` or ``"country"``; see the module's table.
        metric: a name, a Metric or a function ``(logits [n, vocab], task) -> [n]``.
        known: only countries whose capital the model gives when nothing is stated; one run of every country.
        check: measure how often the model follows the prompt, and warn when that is not clearly above chance.
        countries: only these, and only their capitals; left out: all that can be used.

    Raises:
        OptionError: ``n`` is below 1 or more than there are prompts, ``corrupt`` is unknown, or fewer than two
            countries, or one that cannot be used.
        TaskError: this tokenizer has too few single-token countries and capitals, or the model knows too few.
    """
    check_options(n, corrupt=(corrupt, CORRUPT))
    capital, cities = _usable(model, known)
    chosen = None if countries is None else [countries] if isinstance(countries, str) else list(countries)
    if chosen is not None:
        odd = [country for country in chosen if country not in capital]
        if odd or len({*chosen}) < 2:
            raise OptionError(
                f"countries = {chosen!r}",
                expected="at least two of " + ", ".join(sorted(capital)),
                fix="See known_capitals",
            )
        capital = {country: capital[country] for country in chosen}
    names = sorted(capital)
    draw = random.Random(seed)

    def twins(_: int) -> Twins:
        asked, other = draw.sample(names, 2)
        stated, memorised = capital[other], capital[asked]
        clean, fields = _filled(asked, stated)
        twin = _filled(asked if corrupt == "city" else other, stated if corrupt == "country" else memorised)[0]
        return Twins(clean, twin, cities[stated], cities[memorised], fields, {span: span for span in fields})

    return made(
        model,
        distinct(n, twins),
        metric=metric,
        check=check,
        name="capitals_conflict",
        about="a capital in context (correct) against the memorised one (wrong)",
        seed=seed,
        corrupt=corrupt,
        known=known,
        countries=names if chosen is not None else len(names),
    )


def known_capitals(model: Model, known: bool = True, surest: int | None = None) -> dict[str, str]:
    """Countries that ``capitals_conflict`` can use of a model, with their capitals, in alphabetical order.

    Args:
        model: its tokenizer, and what it knows.
        known: only countries whose capital the model gives when nothing is stated.
        surest: only so many of these, those whose own capital's logit is furthest above every other capital's.

    Raises:
        OptionError: fewer than 1, or ``surest`` without ``known``.
        TaskError: as of ``capitals_conflict``.
    """
    if surest is not None and (surest < 1 or not known):
        raise OptionError(f"surest = {surest}, known = {known}", expected="a number from 1, of known countries")
    return dict(sorted(list(_usable(model, known)[0].items())[:surest]))


def _usable(model: Model, known: bool) -> tuple[dict[str, str], dict[str, int]]:
    """Capital by country, and token by capital."""
    countries = usable(CAPITALS, "The capital of", model, "countries", 3)
    cities = usable([CAPITALS[country] for country in countries], "is the city of", model, "capitals", 3)
    capital = {country: city for country in countries if (city := CAPITALS[country]) in cities}
    return (_known(model, capital, cities) if known else capital), cities


def _filled(country: str, city: str) -> tuple[str, dict[str, int]]:
    return written(WORDING, X1=country, X2=country, X3=country, city=city)


def _known(model: Model, capital: dict[str, str], cities: dict[str, int]) -> dict[str, str]:
    """The countries whose own capital has the largest logit of all capitals, the surest first."""
    prompts = model.tokens([written(QUESTION, X2=country, X3=country)[0] for country in capital])
    lengths = torch.tensor([len(model.tokens(written(QUESTION, X2=c, X3=c)[0])[0]) for c in capital])
    columns = torch.tensor(list(dict.fromkeys(cities[city] for city in capital.values())))
    logits = model.read(prompts, lengths - 1, columns.expand(len(prompts), -1)).float().cpu()
    own = columns == torch.tensor([cities[city] for city in capital.values()])[:, None]
    margin = logits[own] - logits.masked_fill(own, float("-inf")).max(-1).values
    order = [i for i in margin.argsort(descending=True, stable=True).tolist() if margin[i] > 0]
    every = list(capital.items())
    found = dict(every[i] for i in order)
    if len(found) < 2:
        raise TaskError(
            f"{model.name} knows the capital of {len(found)} of {len(capital)} countries",
            expected="at least 2, so that one's capital can be stated of the other",
            fix="Take a larger model, or pass known=False",
        )
    return found
