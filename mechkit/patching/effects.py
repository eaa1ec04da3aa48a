"""What a sweep measured as a table of effects, with its provenance."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import Interrupted
from ..results import Scores, provenance

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import Model
    from ..tasks.task import Task
    from .cells import Cell
    from .sweep import Sweep


def effects(cells: Sequence[Cell], patched: Tensor, done: Sweep, with_position: bool) -> pd.DataFrame:
    """A row a cell, over the prompts on which it was measured; cells without any are left out.

    Args:
        cells: what was patched.
        patched: metric values ``[cells, n]``.
        done: the sweep: base and source, and which cells were measured.
        with_position: give each row its position.
    """
    gap = float((done.source - done.base).mean())
    measured = done.done.numpy()
    values = np.where(measured, patched.double().numpy(), np.nan)
    effects = (values - done.base.double().numpy()) / gap
    n = measured.sum(1)
    rows = [
        {
            "site": str(cell.site),
            "layer": cell.site.layer,
            "head": cell.site.head,
            "kind": cell.site.kind,
            **({"position": cell.positions} if with_position else {}),
        }
        for cell in cells
    ]
    some, several = n > 0, n > 1
    score, metric, se = (np.full(len(cells), np.nan) for _ in range(3))
    score[some], metric[some] = np.nanmean(effects[some], 1), np.nanmean(values[some], 1)
    se[several] = np.nanstd(effects[several], 1, ddof=1) / np.sqrt(n[several])
    frame = pd.DataFrame(rows).assign(score=score, metric=metric, se=se, n=n)
    frame["head"] = frame["head"].astype("Int64")
    return frame.loc[some].reset_index(drop=True)


def finished(
    model: Model,
    task: Task,
    tables: Sequence[pd.DataFrame],
    done: Sweep,
    method: str,
    started: float,
    kept: bool,
    options: Mapping[str, Any],
) -> Scores:
    """The tables as scores.

    Args:
        model, task: what was swept.
        tables: as from ``effects``.
        done: the sweep.
        method: for provenance.
        started: when, by ``time.perf_counter``.
        kept: there is a checkpoint.
        options: for provenance.

    Raises:
        Interrupted: the sweep was stopped; ``error.scores`` has what was measured.
    """
    ends = {"base_metric": float(done.base.mean()), "source_metric": float(done.source.mean())}
    meta = provenance(model, task, method, time.perf_counter() - started, **options, **ends)
    scores = Scores(pd.concat(tables, ignore_index=True), "fraction of the metric gap", meta)
    return or_interrupted(scores, done.done, "patches", kept)


def or_interrupted(scores: Scores, done: Tensor, things: str, kept: bool) -> Scores:
    """The scores, where all of them were measured.

    Args:
        scores: what was measured.
        done: which of the things were.
        things: what they are, for the message.
        kept: there is a checkpoint.

    Raises:
        Interrupted: the work was stopped; ``error.scores`` has what was measured.
    """
    if bool(done.all()):
        return scores
    fix = "the same call goes on from there" if kept else "with checkpoint=path the same call would go on"
    raise Interrupted(
        f"Stopped after {int(done.sum())} of {done.numel()} {things}. What was measured is in the error's .scores "
        f"(in a notebook: import sys; sys.last_value.scores); {fix}.",
        scores,
    )
