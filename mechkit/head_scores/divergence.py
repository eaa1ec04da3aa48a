"""Divergence by context: how much does what a head puts out depend on a span of the text?

1. Run the text with the span and without it. The two are aligned from the right, since all that is removed stands
   before what is compared.
2. At a position of what they share, the divergence of a head is the distance between its two outputs z, before W_O:
   ``l2`` ``|a - b|``; ``cosine`` ``1 - cos(a, b)``; ``relative`` ``|a - b| / |a|``, a being with the span.
3. A head's score is the mean over the compared positions and the prompts. A token's score is the mean over the k heads
   that diverge most at it; a low one tells a token that the model would have written without the span.

He et al. 2024 (arXiv 2412.13949), where the span is an image.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..decomposition.tokens import TokenScores
from ..errors import OptionError, PromptError
from ..prompts import as_batch
from ..results import Scores
from ..sites import SitesLike
from ..tasks.task import Task
from ..tasks.text import pad_right
from .passes import head_vectors
from .tables import about, head_scores, token_scores

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts

Distance = Literal["l2", "cosine", "relative"]
_UNITS = {"l2": "distance of z", "cosine": "1 - cosine", "relative": "share of z"}
_NUMBERS = 1 << 26  # of both runs' z at the compared positions


def divergence(
    model: Model,
    data: Prompts | Sequence[tuple[str, str]],
    *,
    span: str | None = None,
    without: Prompts | None = None,
    distance: Distance = "l2",
    positions: Literal["last", "response"] | int = "last",
    heads: SitesLike | None = None,
    each: bool = False,
) -> Scores:
    """How far each head's output moves when a span of the text is taken away.

    Args:
        model: any.
        data: pairs of texts, with and without the span; or texts, ids or a task, with ``without`` or ``span``.
        span: of a task, the span whose tokens are taken away.
        without: the same prompts without the span, as many.
        distance: see the module.
        positions: ``"last"``: the last token; ``"response"``: every token of the end that both texts share; or a
            number, that many tokens at the end.
        heads: only these; left out: all.
        each: a row a head and prompt, in place of means.

    Raises:
        OptionError: an unknown distance, positions that the texts do not share, none or several of pairs, ``without``
            and ``span``.
        PromptError: texts that are the same, or that have no last token in common.
        TaskError: a span that the task does not have.
    """
    started = time.perf_counter()
    _check_distance(distance)
    chosen = None if heads is None else list(model.heads(heads))
    pairs = _pairs(model, data, span, without)
    counts = _compared(pairs, positions)
    longer, shorter = (pad_right([pair[side] for pair in pairs], 0) for side in (0, 1))
    means = _distances(model, longer, shorter, counts, distance)
    about_data: Any = data if span is not None or without is not None else [pair[0] for pair in data]
    return head_scores(
        model,
        means.nanmean(1).permute(1, 2, 0),
        _UNITS[distance],
        "divergence",
        started,
        about_data,
        each=each,
        heads=chosen,
        span=span,
        distance=distance,
        positions=positions,
    )


def token_divergence(
    model: Model,
    data: tuple[str, str] | Prompts,
    *,
    span: str | None = None,
    without: Prompts | None = None,
    distance: Distance = "l2",
    k: int = 10,
    heads: SitesLike | None = None,
) -> TokenScores:
    """How much each token of the end that two texts share depends on the span that only one of them has.

    Args:
        model: any.
        data: one pair of texts, with and without the span; or one text, with ``without``; or a task of one prompt.
        span, without, distance: as of ``divergence``.
        k: the mean is over the k heads that diverge most at a token.
        heads: only these; left out: all.

    Returns:
        A row a shared token; ``position`` counts in the text with the span, and ``rest`` is 0.

    Raises:
        OptionError: ``k`` outside 1 to the number of heads; as of ``divergence``.
        PromptError: more than one pair; as of ``divergence``.
        TaskError: a span that the task does not have.
    """
    started = time.perf_counter()
    _check_distance(distance)
    chosen = list(model.heads(heads))
    if not isinstance(k, int) or not 1 <= k <= len(chosen):
        raise OptionError(f"k = {k!r}", expected=f"a whole number from 1 to {len(chosen)}")
    given: Any = [data] if isinstance(data, tuple) else data
    pairs = _pairs(model, given, span, without)
    if len(pairs) != 1:
        raise PromptError(f"{len(pairs)} pairs of texts", expected="one", fix="Take divergence for several")
    counts = _compared(pairs, "response")
    longer, shorter = (pad_right([pair[side] for pair in pairs], 0) for side in (0, 1))
    found = _distances(model, longer, shorter, counts, distance)[0]  # [m, layers, heads]
    at = torch.tensor([(one.layer, one.head) for one in chosen])
    scores = found[:, at[:, 0], at[:, 1]].topk(k, dim=1).values.mean(1)
    ids, first = pairs[0][0], len(pairs[0][0]) - len(scores)
    shown: Any = given if span is not None or without is not None else [given[0][0]]
    meta = about(model, shown, "token_divergence", started, span=span, distance=distance, k=k)
    unit = f"{_UNITS[distance]}, mean of the top {k} heads"
    return token_scores(model, None, ids, scores.double().numpy(), unit, meta, first=first)


@where_the_model_is
def _distances(
    model: Model, longer: tuple[Tensor, Tensor], shorter: tuple[Tensor, Tensor], counts: Tensor, distance: str
) -> Tensor:
    """Distances ``[n, m, layers, heads]`` at the last m tokens of each pair, the first of them first; else NaN.

    Args:
        model: any.
        longer, shorter: ids ``[n, pos]`` and lengths ``[n]`` of both sides.
        counts: how many tokens of each pair are compared ``[n]``.
        distance: see the module.
    """
    info, most = model.info, int(counts.max())
    back = torch.arange(most, 0, -1)[None]  # tokens from the end
    parts = []
    size = 2 * most * info.n_layers * info.n_heads * info.d_head
    for rows in torch.arange(len(counts)).split(max(1, _NUMBERS // size)):
        sides = []
        for tokens, lengths in (longer, shorter):
            at = torch.where(back <= counts[rows, None], lengths[rows, None] - back, -1)
            sides.append(head_vectors(model, tokens[rows], lengths[rows], at))
        parts.append(apart(sides[0], sides[1], distance))
    return torch.cat(parts)


def apart(a: Tensor, b: Tensor, distance: str) -> Tensor:
    """The distance of vectors on the last axis; see the module."""
    if distance == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)
    moved = torch.linalg.vector_norm(a - b, dim=-1)
    return moved if distance == "l2" else moved / torch.linalg.vector_norm(a, dim=-1).clamp_min(1e-12)


def _check_distance(distance: str) -> None:
    if distance not in _UNITS:
        raise OptionError(f"distance = {distance!r}", expected="one of " + ", ".join(_UNITS))


def _pairs(model: Model, data: Any, span: str | None, without: Any) -> list[tuple[list[int], list[int]]]:
    """Ids of each prompt with and without the span."""
    if span is not None and without is not None:
        raise OptionError("Both span and without", expected="one of them")
    if span is not None:
        if not isinstance(data, Task):
            raise OptionError(f"span = {span!r} of {type(data).__name__}", expected="a task", fix="Or give without=")
        where = data.span(span)
        rows = _rows(model, data)
        return [
            (_checked(row, row[:start] + row[stop:])) for row, (start, stop) in zip(rows, where.tolist(), strict=True)
        ]
    if without is None:
        whole = isinstance(data, Sequence) and not isinstance(data, str) and len(data) > 0
        if not whole or not all(isinstance(one, tuple) and len(one) == 2 for one in data):
            raise OptionError(
                f"{type(data).__name__} alone",
                expected="pairs (with, without)",
                fix="Or give without= or a task's span=",
            )
        data, without = [one[0] for one in data], [one[1] for one in data]
    sides = _rows(model, data), _rows(model, without)
    if len(sides[0]) != len(sides[1]):
        raise PromptError(f"{len(sides[0])} prompts with the span and {len(sides[1])} without", expected="as many")
    return [_checked(*pair) for pair in zip(*sides, strict=True)]


def _rows(model: Model, prompts: Prompts) -> list[list[int]]:
    tokens, lengths = as_batch(model, prompts)
    return [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def _checked(longer: list[int], shorter: list[int]) -> tuple[list[int], list[int]]:
    if not shorter or _shared(longer, shorter) == 0:
        raise PromptError(
            "Texts with and without the span that end otherwise",
            expected="the same last token",
            fix="Take a span that ends before the last token",
        )
    if longer == shorter:
        raise PromptError("Texts with and without the span that are the same", expected="texts that differ")
    return longer, shorter


def _shared(longer: list[int], shorter: list[int]) -> int:
    """How many tokens the ends of two texts have in common."""
    n = 0
    while n < min(len(longer), len(shorter)) and longer[-1 - n] == shorter[-1 - n]:
        n += 1
    return n


def _compared(pairs: list[tuple[list[int], list[int]]], positions: Any) -> Tensor:
    """How many tokens at the end of each pair are compared ``[n]``."""
    shared = torch.tensor([_shared(*pair) for pair in pairs])
    if positions == "response":
        return shared
    wanted = 1 if positions == "last" else positions
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise OptionError(f"positions = {positions!r}", expected='"last", "response", or a whole number from 1')
    if int(shared.min()) < wanted:
        raise OptionError(
            f"positions = {positions!r}, where a pair shares its last {int(shared.min())} tokens",
            expected=f"1 to {int(shared.min())}",
        )
    return torch.full_like(shared, wanted)
