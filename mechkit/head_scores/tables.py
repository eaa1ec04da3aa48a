"""What was measured of heads as a tidy table, with its provenance."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from ..decomposition.token_spans import pieces_of
from ..decomposition.tokens import TokenScores
from ..results import Scores, model_provenance
from ..sites import Site
from ..tasks.task import Task

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts

ENOUGH = 20  # runs, for a ranking of a score of which each run gives little


def head_scores(
    model: Model,
    values: Tensor,
    unit: str,
    method: str,
    started: float,
    data: Prompts | None,
    *,
    each: bool = False,
    metric: Tensor | None = None,
    heads: Sequence[Site] | None = None,
    unranked: str = "",
    **options: Any,
) -> Scores:
    """A row a head.

    Args:
        model: whose heads.
        values: ``[layers, heads, n]``, a number a prompt, of which the table has mean and standard error; NaN where a
            prompt has none. Or ``[layers, heads]``, what is measured once.
        unit: of the values.
        method: the name of the score.
        started: when, by ``time.perf_counter``.
        data: what it was measured on, for provenance.
        each: a row a head and prompt, with ``prompt``, in place of means.
        metric: mean raw metric under the intervention ``[layers, heads]``.
        heads: only these; left out: all.
        unranked: why heads must not be ranked by these scores, where that is so.
        options: for provenance.
    """
    numbers = values.detach().double().cpu().numpy()
    numbers = numbers[..., None] if numbers.ndim == 2 else numbers
    chosen = list(model.heads()) if heads is None else list(heads)
    at = np.array([(one.layer, one.head) for one in chosen], dtype=int).reshape(-1, 2)
    rows = numbers[at[:, 0], at[:, 1]]  # [heads, n]
    frame = pd.DataFrame(
        {
            "site": [str(one) for one in chosen],
            "layer": at[:, 0],
            "head": pd.array(at[:, 1], dtype="Int64"),
            "kind": "z",
        }
    )
    if each:
        frame = frame.loc[frame.index.repeat(rows.shape[1])].reset_index(drop=True)
        frame["prompt"] = np.tile(np.arange(rows.shape[1]), len(chosen))
        frame["score"], frame["se"], frame["n"] = rows.reshape(-1), np.nan, 1
    else:
        n = np.isfinite(rows).sum(1)
        total = np.nansum(rows, 1)
        frame["score"] = np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)
        spread = np.nansum((rows - frame["score"].to_numpy()[:, None]) ** 2, 1)
        frame["se"] = np.sqrt(np.divide(spread, n * (n - 1.0), out=np.full(len(n), np.nan), where=n > 1))
        frame["n"] = n
        if metric is not None:
            frame["metric"] = metric.detach().double().cpu().numpy()[at[:, 0], at[:, 1]]
    return Scores(frame, unit, about(model, data, method, started, unranked, **options))


def token_scores(
    model: Model,
    text: Any,
    ids: Sequence[int],
    score: np.ndarray,
    unit: str,
    meta: Mapping[str, Any],
    *,
    first: int = 0,
    rest: np.ndarray | float = 0.0,
    n: Sequence[int] | int = 1,
) -> TokenScores:
    """A row a token of one prompt.

    Args:
        model: whose tokens.
        text: the prompt, where it is text; anything else: its tokens are decoded one by one.
        ids: all of its tokens.
        score, rest, n: numbers of the tokens from ``first`` on ``[tokens]``; of ``rest`` and ``n``, or one for all.
        unit: of the score.
        meta: provenance.
        first: the first token that has a score.
    """
    if isinstance(text, str):
        shown = pieces_of(model, text).shown
    else:
        shown = [str(one) if model.tokenizer is None else model.to_text(one) for one in ids]
    at = np.arange(first, len(ids))
    frame = pd.DataFrame(
        {
            "position": at,
            "token": shown[first:],
            "start": at,
            "stop": at + 1,
            "kind": "token",
            "score": score,
            "rest": rest,
            "n": n,
        }
    )
    return TokenScores(frame, unit, {**meta, "text": text if isinstance(text, str) else "".join(shown)})


def about(
    model: Model, data: Prompts | None, method: str, started: float, unranked: str = "", **options: Any
) -> dict[str, Any]:
    """Provenance of a score; see ``head_scores``."""
    meta = {**model_provenance(model), "data": _named(data), "method": method, "options": options}
    if isinstance(data, Task):
        meta["task"] = {"name": data.name, "n": len(data), "metric": data.metric.name, "made": dict(data.meta)}
    if unranked:
        meta["unranked"] = unranked
    return {**meta, "seconds": round(time.perf_counter() - started, 2)}


def _named(data: Prompts | None) -> dict[str, Any]:
    """What data was, small enough to keep: the text where it is short, else how much there was of it."""
    if data is None:
        return {}
    if isinstance(data, Task):
        return {"task": data.name, "n": len(data)}
    if isinstance(data, Tensor):
        return {"ids": list(data.shape)}
    texts = [data] if isinstance(data, str) else list(data)
    return {"texts": len(texts), "begins": texts[0][:80]}
