"""The iterative search of CD-T: from the logits backwards, to whatever is most of what arrives there.

1. Decompose the logits into heads (and MLPs). Take the ``width`` whose relevant part moves the metric most.
2. What these read (queries, keys and values of heads, inputs of MLPs) are the next targets. Decompose them into the
   parts before; a part's relevance is the sum, over targets, of the share that it is of what is there.
3. Relevance is divided by the sum over the part's layer, so that layers that write much do not drown the others; take
   the largest ``width`` that are not in yet.
4. Go on until there are as many parts as were asked for, or nothing comes before the targets.

A part's score is its relevance in the step with its largest one, as a fraction of the largest of that step.

Hsu et al. 2024 (arXiv 2407.00886), algorithm 1; the authors' notebooks take two parts a step and divide by layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..results import Scores
from ..sites import Site, site
from .cdt import decompose

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task


def by_nodes(
    model: Model, task: Task, sites: str, size: int, width: int, min_share: float, progress: bool = True, **options: Any
) -> tuple[list[Site], Scores]:
    """The parts found, in order, and the scores of all.

    Args:
        model, task: as of ``decompose``.
        sites: ``"heads"``, ``"mlps"`` or both words.
        size: how many parts at most.
        width: how many parts a step takes.
        min_share: leave out what is below this share of the largest relevance in a step.
        progress: show bars.
        options: of ``decompose``.
    """
    found: list[Site] = []
    first = decompose(model, task, sites, "logits", progress=progress, **options)
    step = first.frame.assign(relevance=first.frame["score"])
    best: pd.DataFrame | None = None
    while len(found) < size:
        largest = float(step["relevance"].abs().max())
        step["score"] = step["relevance"] / largest if largest else 0.0
        step["se"] = np.nan if best is not None else step["se"] / largest if largest else np.nan
        best = step if best is None else _larger(best, step)
        sizes = step["relevance"].abs().sort_values(ascending=False, kind="stable")
        order = step.loc[sizes[(sizes > 0) & (sizes >= min_share * largest)].index, "site"]
        new = [one for one in map(site, order) if one not in found][: min(width, size - len(found))]
        found += new
        targets = [one for node in new for one in _read_by(model, node, sites)]
        if not targets:
            break
        arrived = decompose(model, task, sites, targets, progress=progress, relevance="size", **options).frame
        step = _relevance(arrived)
    assert best is not None
    frame = best.drop(columns=["relevance", "sender", "receiver", "signed", "size"], errors="ignore")
    return found, replace(first, frame=frame.reset_index(drop=True), unit="relevance, of the largest in its step")


def _read_by(model: Model, node: Site, sites: str) -> list[Site]:
    """What a part reads, where one of the sites comes before it; of an MLP, what it writes."""
    if node.kind == "mlp":
        return [node] if node.layer > 0 or "heads" in sites else []
    return [slot for slot in model.graph().slots(node) if slot.layer > 0]


def _relevance(arrived: pd.DataFrame) -> pd.DataFrame:
    """One row a part: shares of all targets together, divided by the sum over its layer."""
    rows = arrived.drop_duplicates("site").set_index("site", drop=False).copy()
    sums: Any = arrived.groupby("site")["score"].sum()  # the stubs take it for one number
    rows["relevance"] = sums.reindex(rows.index)
    layer = rows.groupby("layer")["relevance"].transform("sum")
    rows["relevance"] = np.where(layer > 0, rows["relevance"] / layer.clip(lower=1e-12), 0.0)
    return rows.reset_index(drop=True)


def _larger(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Of each part the row with the larger score, in the order of ``old``."""
    both = pd.concat([old, new])
    both = both.assign(by=both["score"].abs()).sort_values("by", ascending=False, kind="stable")
    return both.drop_duplicates("site").set_index("site", drop=False).loc[old["site"]].drop(columns="by")
