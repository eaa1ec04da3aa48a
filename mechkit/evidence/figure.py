"""A still picture of an edit's effect beside its controls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..view.figures import CIRCUIT, FULL, RANDOM, Picture

if TYPE_CHECKING:
    from .evaluate import EditEvaluation

_COLOURS = {"edit": CIRCUIT, "random": RANDOM, "reversed": FULL, "shuffled labels": FULL}


def effects_figure(evaluation: EditEvaluation) -> Figure:
    """A line a condition: the effect with its 95% interval; the random draws as points."""
    rows: pd.DataFrame = evaluation.frame.loc[evaluation.frame["condition"] != "none"]
    lines = list(dict.fromkeys(zip(rows["split"], rows["condition"], strict=True)))
    figure = Picture(figsize=(6.8, 0.45 * len(lines) + 1.0), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#BBBBBB", linewidth=0.8)
    for at, (split, condition) in enumerate(lines):
        here: pd.DataFrame = rows.loc[(rows["split"] == split) & (rows["condition"] == condition)]
        effect, low, high = (here[name].to_numpy(float) for name in ("effect", "low", "high"))
        colour = _COLOURS[condition]
        if condition == "random":
            axes.plot(effect, np.full(len(effect), at), ".", color=colour, alpha=0.6)
            continue
        axes.plot(effect, [at], "o", color=colour, markersize=5)
        if np.isfinite(low).all():
            axes.hlines([at], low, high, color=colour, linewidth=1.4)
    several = rows["split"].nunique() > 1
    names = [f"{condition} ({split})" if several else condition for split, condition in lines]
    axes.set_yticks(range(len(lines)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"effect on the metric, {evaluation.unit}" if evaluation.unit else "effect on the metric")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure
