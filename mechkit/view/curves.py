"""Still pictures of faithfulness by how much of a ranking, or of a circuit of edges, is left in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from .figures import CIRCUIT, FULL, RANDOM, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..circuits.curve import Curve
    from ..circuits.evaluate import Evaluation

_LINES = (("size", "-o", CIRCUIT, "by size of score (CMD {:.2f})"), ("signed", "--s", RANDOM, "by score (CPR {:.2f})"))


def fraction_curve(curve: Curve) -> Figure:
    """Faithfulness by fraction of the edges, or nodes, for both rankings, with 95% intervals."""
    figure = Picture(figsize=(6.8, 3.8), layout="constrained")
    axes = figure.subplots()
    areas = {"size": curve.cmd, "signed": curve.cpr}
    for ranking, style, colour, label in _LINES:
        rows = curve.frame[curve.frame["ranking"] == ranking]
        axes.plot(rows["fraction"], rows["faithfulness"], style, color=colour, markersize=4,
                  label=label.format(areas[ranking]))  # fmt: skip
        if np.isfinite(rows["low"]).all():
            axes.fill_between(rows["fraction"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
    first = float(curve.frame["fraction"].min())
    what = "edges" if "edges" in curve.frame else "nodes"
    return _framed(figure, axes, f"fraction of the {what} left in", first, 1.0)


def size_curve(evaluation: Evaluation) -> Figure:
    """Faithfulness of a circuit's first edges, beside the random sets of the whole circuit's size."""
    figure = Picture(figsize=(6.8, 3.8), layout="constrained")
    axes = figure.subplots()
    curve, control = evaluation.curve, evaluation.control
    axes.plot(
        curve["size"], curve["faithfulness"], "-o", color=CIRCUIT, markersize=4, label="the circuit's first edges"
    )
    last = max(1, int(curve["size"].iloc[-1]))
    low, high = evaluation.interval
    if np.isfinite([low, high]).all():
        axes.vlines([last], low, high, color=CIRCUIT, linewidth=1.2)
    if len(control):
        label = f"{len(control)} random sets, as many edges into each kind of target of a layer"
        axes.plot(np.full(len(control), last), control["faithfulness"], ".", color=RANDOM, alpha=0.6, label=label)
    return _framed(figure, axes, "edges left in", 1, last)


def _framed(figure: Figure, axes: Axes, label: str, first: float, last: float) -> Figure:
    """Lines at the empty circuit and the whole model, a logarithmic axis of sizes, and the legend."""
    axes.axhline(1, color=FULL, linewidth=1, linestyle="--")
    axes.axhline(0, color="#BBBBBB", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(first / 1.2, last * 1.2)
    axes.text(first / 1.1, 1, "the whole model", va="bottom", fontsize=8, color=FULL)
    axes.set_xlabel(label)
    axes.set_ylabel("faithfulness")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure
