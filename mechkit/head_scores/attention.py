"""Scores of heads by their patterns, all that are asked for in one pass; what each means is told in ``looking`` and
``pattern_metrics``.

1. Without prompts, ``induction``, ``previous_token`` and the like are measured on random tokens that are repeated.
2. Queries are all positions but the first, which can see nothing but itself, unless they are named.
3. A score is the mean over prompts of a head's own value in each; the standard error is over prompts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import OptionError
from ..prompts import Prompts, as_batch
from ..results import Scores
from .looking import LINEAR
from .pattern_metrics import SHAPES, SINGULAR
from .places import Place, place_mask, real_mask
from .repeated import repeated_tokens
from .streamed import streamed
from .tables import head_scores

if TYPE_CHECKING:
    from ..model import Model

UNITS = {
    **dict.fromkeys(LINEAR, "share of attention"),
    "distance": "tokens",
    "entropy": "nats",
    "effective_rank": "singular values",
    "top_singular": "share of the singular values",
    **dict.fromkeys(SHAPES, "share of large entries"),
}
NAMES = tuple(UNITS)
IN_ONE_PASS = tuple(name for name in NAMES if name not in (*SINGULAR, "share"))


def attention_scores(
    model: Model,
    data: Prompts | None,
    names: Sequence[str],
    *,
    span: Place | None = None,
    queries: Place | None = None,
    threshold: float = 0.04,
    each: bool = False,
    seed: int = 0,
) -> dict[str, Scores]:
    """Scores of every head by its pattern, by name.

    Args:
        model: any that gives patterns.
        data: prompts; None: 8 rows of 32 random tokens, twice.
        names: of ``NAMES``.
        span: of ``share``, the keys: a task's span, a piece of each text, a position, or (first, one past the last).
        queries: where patterns are looked at, given in the same way; left out: all but the first position, and of
            ``share`` all that come after the span.
        threshold: of ``diagonal``, ``vertical`` and ``horizontal``: what counts as a large entry.
        each: a row a head and prompt, with ``prompt``.
        seed: of the random tokens.

    Raises:
        OptionError: ``share`` without a span, a part outside a prompt, or queries that measure nothing.
        PromptError: see ``model.tokens``.
        UnsupportedError: this model's patterns are not to be seen.
    """
    started = time.perf_counter()
    if "share" in names and span is None:
        raise OptionError("The share of a span, without a span", expected='span="a piece of the text", or a pair')
    if not 0 < threshold < 1:
        raise OptionError(f"threshold = {threshold}", expected="between 0 and 1")
    given = repeated_tokens(model, seed=seed) if data is None else data
    tokens, lengths = as_batch(model, given)
    where = _queries(model, given, queries, lengths, tokens.shape[1])
    keys = None if span is None else place_mask(model, given, span, lengths, tokens.shape[1])
    found: dict[str, Tensor] = {}
    others = [name for name in names if name != "share"]
    if others:
        found |= streamed(model, tokens, lengths, others, where, None, threshold)
    if "share" in names and keys is not None:
        after = where if queries is not None else where & (keys.long().cumsum(1) == keys.sum(1, keepdim=True)) & ~keys
        found |= streamed(model, tokens, lengths, ["share"], after, keys)
    for name, values in found.items():
        if bool(values.isnan().all()):
            raise OptionError(f"{name} at no query of any prompt", expected=_needs(name))
    options = {"span": span, "queries": queries, "threshold": threshold, "seed": seed if data is None else None}
    told = {key: value for key, value in options.items() if value is not None}
    return {
        name: head_scores(model, found[name], UNITS[name], name, started, given, each=each, **told) for name in names
    }


def _queries(model: Model, data: Prompts, queries: Place | None, lengths: Tensor, width: int) -> Tensor:
    where = real_mask(lengths, width) if queries is None else place_mask(model, data, queries, lengths, width)
    where = where.clone()
    where[:, 0] = False
    if not bool(where.any()):
        raise OptionError(
            f"Queries at {queries!r}, of prompts of {int(lengths.max())} tokens", expected="a second token"
        )
    return where


def _needs(name: str) -> str:
    needs = {
        "induction": "a token that was there before, and something behind it",
        "duplicate_token": "a token that was there before",
        "share": "a query behind the span",
    }
    return needs.get(name, "entries above the threshold" if name in SHAPES else "queries behind the first position")
