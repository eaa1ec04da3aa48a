"""Still pictures with matplotlib: the head map, the faithfulness curve, attention patterns.

Colours are safe for colour-blind readers: signed maps run from blue (for) over white to brown-orange (against), darker
on both sides; attention is one hue. Numbers that matter are printed, never only coloured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from ..circuits.evaluate import Evaluation
    from ..results import Scores

FOR, AGAINST = "#0072B2", "#D55E00"
SIGNED = LinearSegmentedColormap.from_list("for and against", ["#9E4203", "#FFFFFF", "#08306B"])  # as in the live views
ATTENTION = "Blues"
CIRCUIT, RANDOM, FULL = "#B2182B", "#4D4D4D", "#2166AC"


class Picture(Figure):
    """A matplotlib figure that notebooks show by itself, without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        import io

        with io.BytesIO() as buffer:
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()


_DOWN = {"z": "head", "k": "head or group", "v": "head or group"}


def site_map(scores: Scores, mark: Sequence[tuple[int, int]] = ()) -> Figure:
    """Scores of one kind of site, layers across, heads or positions down, the ten largest with their numbers.

    ``mark``: (layer, head) pairs that get a frame.
    """
    from matplotlib.patches import Rectangle

    by_head = bool(scores.frame["head"].notna().all())
    grid = scores.grid().T  # [heads or positions, layers]
    rows, layers = grid.shape
    limit = float(np.nanmax(np.abs(grid))) or 1.0
    figure = Picture(figsize=(max(5.0, 0.36 * layers + 1.6), max(2.2, 0.34 * rows + 1.0)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto")
    for place in np.argsort(-np.nan_to_num(np.abs(grid)).ravel(), kind="stable")[:10]:
        row, layer = np.unravel_index(place, grid.shape)
        if np.isnan(grid[row, layer]):
            continue
        colour = "white" if abs(grid[row, layer]) > 0.6 * limit else "black"
        text = _short(float(grid[row, layer]), limit)
        axes.text(layer, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    for layer, head in mark:
        axes.add_patch(Rectangle((layer - 0.5, head - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.4))
    axes.set_xlabel("layer")
    axes.set_ylabel(_DOWN.get(scores.frame["kind"].iloc[0], "head") if by_head else "position")
    axes.set_xticks(range(0, layers, 1 if layers <= 16 else 2))
    axes.set_yticks(range(0, rows, 1 if rows <= 20 else 4) if by_head or rows > 1 else [])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label(scores.unit, size=8 if rows > 5 else 6)
    bar.ax.tick_params(labelsize=8 if rows > 5 else 6)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _short(value: float, largest: float) -> str:
    """A number for a cell: with fewer decimals where numbers are large, and no zero before the point."""
    decimals = 3 if largest <= 0.1 else 2 if largest < 10 else 1 if largest < 100 else 0
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{decimals}f}")


def faithfulness_curve(evaluation: Evaluation) -> Figure:
    """Faithfulness of the first 1, 2, 3 ... nodes, beside the random sets of the whole circuit's size."""
    figure = Picture(figsize=(6.8, 3.8), layout="constrained")
    axes = figure.subplots()
    curve, control = evaluation.curve, evaluation.control
    last = int(curve["size"].iloc[-1])
    axes.axhline(1, color=FULL, linewidth=1, linestyle="--")
    axes.axhline(0, color="#BBBBBB", linewidth=0.8)
    axes.text(last + 1.25, 1, "the whole\nmodel", va="center", fontsize=8, color=FULL)
    axes.plot(
        curve["size"], curve["faithfulness"], "-o", color=CIRCUIT, markersize=4, label="the circuit's first nodes"
    )
    low, high = evaluation.interval
    if np.isfinite([low, high]).all():
        axes.errorbar(
            [last],
            [evaluation.faithfulness],
            [[max(0.0, evaluation.faithfulness - low)], [max(0.0, high - evaluation.faithfulness)]],
            color=CIRCUIT,
            capsize=3,
            linewidth=1.2,
        )
    for size, node, value in curve[["size", "node", "faithfulness"]].itertuples(index=False):
        axes.annotate(
            f"+{node}", (size, value), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=7, color=CIRCUIT
        )
    if len(control):
        spread = np.linspace(-0.18, 0.18, len(control)) if len(control) > 1 else np.zeros(1)
        label = f"{len(control)} random sets, as many heads a layer"
        axes.plot(last + 0.55 + spread, control["faithfulness"], ".", color=RANDOM, alpha=0.6, label=label)
        mean = control["faithfulness"].mean()
        axes.plot([last + 0.3, last + 0.8], [mean, mean], color=RANDOM, linewidth=2)
    axes.set_xlim(0, last + 1.2)
    axes.set_xticks(range(1, last + 1, 1 if last <= 20 else 5))
    axes.set_xlabel("heads left in")
    axes.set_ylabel("faithfulness")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def attention_pattern(pattern: np.ndarray, tokens: Sequence[str], title: str) -> Figure:
    """One head's attention ``[query, key]``, tokens on both axes."""
    size = max(2.6, 0.17 * len(tokens) + 1.1)
    figure = Picture(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(pattern, cmap=ATTENTION, vmin=0, vmax=1)
    axes.set_xticks(range(len(tokens)), [visible(token) for token in tokens], rotation=90, fontsize=7)
    axes.set_yticks(range(len(tokens)), [visible(token) for token in tokens], fontsize=7)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("looks at", fontsize=8)
    axes.set_ylabel("from", fontsize=8)
    axes.spines[:].set_visible(False)
    return figure


def visible(token: str) -> str:
    """A token as it can be read on an axis: spaces and line ends shown, what has no glyph a box, dollars harmless."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace("$", r"\$")
    shown = "".join(one if one.isprintable() else "□" for one in shown)
    return shown.strip() or "␣" * max(1, len(shown))


def svg(figure: Figure, description: str) -> str:
    """The figure as an inline ``<svg>`` element with a description for screen readers."""
    import io
    import re
    from html import escape

    import matplotlib

    with io.StringIO() as buffer, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
        text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
