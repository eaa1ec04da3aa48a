"""Edits of where heads look.

1. ``attend`` adds to the scores, hides keys, sets the pattern, sharpens it, or mixes it with a target. Sink tuning
   (ZeroTuning, 2505.11739) is a bias of log gamma on key 0; weight on a span (PASTA, 2311.02262) a bias on its keys
   or, with ``outside``, on all others.
2. ``redistribute`` takes attention from some keys and gives it to others (Visual Attention Redistribution,
   2503.03321).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ..errors import EditError, OptionError
from ..sites import SitesLike
from .kinds import Amount, Attend, Redistribute
from .reading import Positions, amount, each, number, patterns, where

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = ("uniform", "identity", "first", "previous")
_OF_KEYS = ("bias", "mask", "median")


def attend(
    heads: SitesLike,
    *,
    bias: Amount | Mapping | None = None,
    mask: Positions = None,
    set: Tensor | Mapping[int | str, float] | None = None,
    sharpen: float | None = None,
    toward: Literal["uniform", "identity", "first", "previous"] | None = None,
    median: float | None = None,
    keys: Positions = None,
    outside: bool = False,
    alpha: float = 1.0,
    positions: Positions = None,
) -> Attend:
    """Change where heads look; one of the six, and never at what the model itself hides from a query.

    Args:
        heads: addresses such as ``"9.9"``.
        bias: add to the scores, a number or a tensor that broadcasts to ``[batch, query, key]``, or a mapping from
            address to either; with ``keys``, only there. On key 0, log gamma multiplies its attention by gamma before
            rows are made to add up to 1 again.
        mask: key positions (or a span) that become invisible. A query that can then see nothing attends to nothing.
        set: the pattern itself: a weight a key position (or span, shared evenly), all other keys 0; or a tensor that
            broadcasts to ``[batch, query, key]``. Queries that see none of those keys stay as they are.
        sharpen: multiply the scores: above 1 sharper, below 1 flatter, 0 even (attention sinks apart).
        toward: mix the pattern with ``"uniform"`` (every visible key), ``"identity"`` (the query itself), ``"first"``
            (the first visible key) or ``"previous"`` (the key before the query; the query itself where it sees none):
            ``(1 - alpha) * pattern + alpha * target``.
        median: add to the scores this many times the median of the head's scores of the prompt, over every query and
            each key that it sees (of an even number, the lower of the two in the middle); with ``keys``, only there.
        keys: for ``bias`` and ``median``, which keys.
        outside: for ``bias``, ``median`` and ``mask``: every key but those.
        alpha: for ``toward``, from 0 (no change) to 1.
        positions: the queries; None for all.

    Raises:
        EditError: none or several of the six, or addresses that are not heads; a head without a bias.
        OptionError: a number outside its range.
    """
    given = {"bias": bias, "mask": mask, "set": set, "sharpen": sharpen, "toward": toward, "median": median}
    chosen = {how: value for how, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise EditError(
            f"attend with {' and '.join(chosen) or 'nothing to do'}",
            expected="exactly one of " + ", ".join(given),
            fix="Give several edits: they are carried out in order",
        )
    ((how, value),) = chosen.items()
    if keys is not None and how not in ("bias", "median"):
        raise EditError(f"attend with {how} and keys", expected="keys together with bias or median only")
    if how == "mask":
        keys = value
    if outside and (keys is None or how not in _OF_KEYS):
        raise EditError(f"attend with {how} outside of no keys", expected="keys together with bias or median, or mask")
    queries = patterns(heads, "attend")
    value = _read(how, value, queries)
    share = number("alpha", alpha, 0, 1)
    return Attend(queries, where(positions), how, value, where(keys, "keys"), share, bool(outside))


def redistribute(
    heads: SitesLike,
    keys: Positions,
    to: Positions,
    keep: float = 0.6,
    least: float = 0.0,
    most: float = 1.0,
    positions: Positions = None,
) -> Redistribute:
    """Take attention from some keys and give it to others, in proportion to what these have.

    A query whose keys ``to`` get nothing, or none besides ``keys``, stays as it is. What a query gives in all does not
    change. Visual Attention Redistribution (2503.03321) takes from sinks and gives to the image, in heads and queries
    that look at the image anyway: ``keep=0.6, least=0.2, most=0.5``.

    Args:
        heads: addresses such as ``"9.9"``.
        keys: key positions (or a span) that lose; None: every key outside ``to``.
        to: key positions (or a span) that gain, without those of ``keys``; None: every other key.
        keep: what ``keys`` keep of their attention, from 0 to 1, which changes nothing.
        least: only queries whose attention to ``to``, ``keys`` among them included, is at least this.
        most: only queries of whose attention to ``to`` at most this share is on ``keys``.
        positions: the queries; None for all.

    Raises:
        EditError: neither keys that lose nor keys that gain.
        SiteError: addresses that are not heads.
        OptionError: a number outside 0 to 1.
    """
    if keys is None and to is None:
        raise EditError("redistribute from every key to every key", expected="keys, or to, or both")
    return Redistribute(
        patterns(heads, "redistribute"),
        where(positions),
        where(keys, "keys"),
        where(to, "to"),
        *(number(name, value, 0, 1) for name, value in (("keep", keep), ("least", least), ("most", most))),
    )


def _read(how: str, value: Any, queries: tuple) -> Any:
    """What goes with a way of attending, checked."""
    if how == "sharpen":
        number(how, value, 0)
    if how == "median":
        return number(how, value)
    if how == "toward" and value not in TARGETS:
        raise OptionError(f"toward = {value!r}", expected="one of " + ", ".join(TARGETS))
    if isinstance(value, Mapping):
        if not value:
            raise EditError(f"attend with {how}={{}}", expected="a value for at least one key")
        if how == "bias":
            return each(queries, value, partial(amount, "bias"), partial(patterns, what="attend"))
    return value
