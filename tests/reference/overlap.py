"""Overlap by chance as in a textbook: draw whole sets, one after the other, and count."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any


def random_pairs(left: Iterable, right: Iterable, everything: Iterable, place: Callable[[Any], Any], draws: int):
    """Number shared by each of ``draws`` pairs of sets that have as many members of each place as the real ones."""
    pools = defaultdict(list)
    for one in everything:
        pools[place(one)].append(one)
    draw = random.Random(0)

    def like(members: list) -> set:
        chosen: set = set()
        for key in {place(one) for one in members}:
            chosen.update(draw.sample(pools[key], sum(place(one) == key for one in members)))
        return chosen

    left, right = list(left), list(right)
    return [len(like(left) & like(right)) for _ in range(draws)]
