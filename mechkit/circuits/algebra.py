"""Set algebra of circuits.

1. Circuits are compared at one level, edges with edges or nodes with nodes, and within models of the same dimensions.
2. Union, intersection, difference and symmetric difference keep the left side's order and its rows of scores; what
   only the right circuit has brings the right's rows with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pandas as pd

from ..edge_scores import EdgeScores
from ..errors import OptionError
from ..results import Scores
from .circuit import Circuit, row_texts


def check_alike(left: Circuit, right: object) -> None:
    """Nothing, if the two can be compared.

    Raises:
        OptionError: the right one is no circuit, is of the other level, or of a model of other dimensions.
    """
    if not isinstance(right, Circuit):
        raise OptionError(f"A circuit beside {type(right).__name__}", expected="two circuits")
    if left.level != right.level:
        raise OptionError(
            f"A circuit at {left.level} level beside one at {right.level} level",
            expected="both of edges or both of nodes",
            fix="Take .as_nodes() of the one with edges",
        )
    mine, theirs = left.dimensions, right.dimensions
    if left.level == "node":
        mine.pop("ungrouped", None)  # keys and values are counted otherwise; heads are the same
    if differ := [name for name in mine if name in theirs and mine[name] != theirs[name]]:
        raise OptionError(
            "Circuits of models with " + ", ".join(f"{name} {mine[name]} and {theirs[name]}" for name in differ),
            expected="circuits of the same dimensions",
        )


_WORDS = {"|": "union", "&": "intersection", "-": "difference", "^": "symmetric difference"}


def combine(left: Circuit, right: Circuit, sign: Literal["|", "&", "-", "^"]) -> Circuit:
    """Union, intersection, difference or symmetric difference; see the module.

    Raises:
        OptionError: circuits that cannot be compared, or whose scores are in different units where both are needed.
    """
    check_alike(left, right)
    mine, theirs = {*left.members}, {*right.members}
    added = [one for one in right.members if one not in mine]
    kept = [one for one in left.members if sign == "|" or (one in theirs) == (sign == "&")]
    chosen: list[Any] = kept + added if sign in "|^" else kept
    scores = _joined(left.scores, right.scores, {str(one) for one in added}) if sign in "|^" else left.scores
    meta = {
        **right.dimensions,
        **left.dimensions,
        "method": _WORDS[sign],
        "left": dict(left.meta),
        "right": dict(right.meta),
    }
    if isinstance(scores, EdgeScores):
        return Circuit.of_edges(chosen, scores, meta)
    return Circuit(tuple(chosen), scores, meta)


def _joined(left: Scores | EdgeScores, right: Scores | EdgeScores, added: set[str]) -> Scores | EdgeScores:
    """The left's rows, but the right's of what is added to the left circuit and of what the left did not score."""
    if left.unit != right.unit:
        raise OptionError(
            f"Scores in {left.unit!r} beside scores in {right.unit!r}",
            expected="one unit",
            fix="Score both circuits in the same way, or take & or -, which need the left's scores only",
        )
    mine, theirs = row_texts(left), row_texts(right)
    scored, brought = {*mine}, added.intersection(theirs)
    frames = [
        left.frame[[text not in brought for text in mine]],
        right.frame[[text in brought or text not in scored for text in theirs]],
    ]
    if not len(frames[1]):
        return left
    table = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    return replace(left, frame=table, meta={**left.meta, "joined_with": dict(right.meta)})
