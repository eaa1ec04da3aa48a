"""One head on one page, with matplotlib: where it looks, what it does to tokens, whom it hears and speaks to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from .figures import ATTENTION, CIRCUIT, FULL, RANDOM, Picture, visible

if TYPE_CHECKING:
    from ..weights.head_card import HeadCard

_KINDS = {"q": "query", "k": "key", "v": "value"}


def head_figure(card: HeadCard) -> Figure:
    """A card as a figure: pattern and scores above, tokens and partners below."""
    figure = Picture(figsize=(12.0, 8.6), layout="constrained")
    figure.suptitle(f"Head {card.head} of {card.model}", fontsize=13, fontweight="bold")
    grid = figure.add_gridspec(2, 12, height_ratios=(1.15, 1.0))
    _pattern(figure.add_subplot(grid[0, :5]), card)
    _scores(figure.add_subplot(grid[0, 5:8]), card)
    _partners(figure.add_subplot(grid[0, 8:]), card)
    _pairs(figure.add_subplot(grid[1, :3]), card, "ov", "+", "attended to, it promotes", "source", "destination")
    _pairs(figure.add_subplot(grid[1, 3:6]), card, "ov", "-", "attended to, it suppresses", "source", "destination")
    _pairs(
        figure.add_subplot(grid[1, 6:9]),
        card,
        "qk",
        "+",
        "where this is predicted, it looks at",
        "destination",
        "source",
    )
    _directions(figure.add_subplot(grid[1, 9:]), card)
    return figure


def _pattern(axes: Any, card: HeadCard) -> None:
    axes.imshow(card.pattern, cmap=ATTENTION, vmin=0, vmax=1)
    shown = [visible(token) for token in card.tokens]
    axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=7)
    axes.set_yticks(range(len(shown)), shown, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("where it looks (from rows to columns)", fontsize=9, loc="left")


def _scores(axes: Any, card: HeadCard) -> None:
    """Shares as bars from 0 to 1; those that can be negative from -1; other numbers as text alone."""
    shown = [(name, value) for name, value in card.scores.items() if name != "mean own logit"][::-1]
    for row, (name, value) in enumerate(shown):
        axes.barh(row, value, height=0.4, color=CIRCUIT if value < 0 else FULL)
        axes.text(0.01, row + 0.24, name, fontsize=7.5, va="bottom")
        axes.text(max(0, value) + 0.03, row, f"{value:.2f}", fontsize=7.5, va="center")
    low = min(0.0, *(value for _, value in shown))
    axes.set_xlim(low - 0.02, 1.18)
    axes.set_ylim(-0.5, len(shown) - 0.1)
    axes.axvline(0, color="#999999", linewidth=0.8)
    _bare(axes, "what its weights do, and where it looks")


def _partners(axes: Any, card: HeadCard) -> None:
    """The strongest channels, as two columns of names with bars by z."""
    for column, direction in enumerate(("hears", "speaks to")):
        rows = card.partners.loc[card.partners["direction"] == direction]
        left = column * 1.1
        axes.text(left, 1.0, direction, fontsize=9, fontweight="bold", va="top")
        if rows.empty:
            axes.text(left, 0.93, "no head", fontsize=8, va="top", color=RANDOM)
            continue
        largest, height = float(rows["z"].max()), 0.92
        for kind, some in rows.groupby("kind", sort=False):
            label = f"by its {_KINDS[str(kind)]}" if direction == "hears" else f"to the {_KINDS[str(kind)]} of"
            axes.text(left, height, label, fontsize=7.5, color=RANDOM, va="top")
            height -= 0.05
            for row in some.itertuples():
                axes.barh(height - 0.017, 0.5 * row.z / largest, left=left + 0.22, height=0.03, color=FULL)
                axes.text(left, height, str(row.head), fontsize=7.5, va="top")
                axes.text(left + 0.24 + 0.5 * row.z / largest, height, f"{row.z:.0f}", fontsize=6.5, va="top")
                height -= 0.045
            height -= 0.015
    axes.set_xlim(0, 2.15)
    axes.set_ylim(0, 1.02)
    _bare(axes, "its strongest channels (z of the best component)")


def _pairs(axes: Any, card: HeadCard, circuit: str, end: str, title: str, first: str, second: str) -> None:
    rows = card.pairs.loc[(card.pairs["circuit"] == circuit) & (card.pairs["end"] == end)]
    for i, row in enumerate(rows.to_dict("records")):
        height = 0.95 - 0.115 * i
        axes.text(0.0, height, _short(row[first]), fontsize=8, va="top")
        axes.text(0.42, height, "→", fontsize=8, va="top", color=RANDOM)
        axes.text(0.5, height, _short(row[second]), fontsize=8, va="top", color=CIRCUIT if end == "-" else FULL)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    _bare(axes, title)


def _directions(axes: Any, card: HeadCard) -> None:
    frame: pd.DataFrame = card.directions
    height = 0.95
    for component, some in frame.groupby("component"):
        axes.text(0, height, f"component {component}", fontsize=8, fontweight="bold", va="top")
        height -= 0.075
        for key, part in some.groupby(["side", "end"], sort=False):
            side, end = str(key[0]), str(key[1])  # type: ignore[index]
            words = ", ".join(_short(token, 9) for token in part["token"][:4])
            axes.text(0, height, f"{side}s {end}", fontsize=7, va="top", color=RANDOM)
            axes.text(0.2, height, words, fontsize=7, va="top", clip_on=True)
            height -= 0.058
        height -= 0.02
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    _bare(axes, "tokens along its first directions")


def _bare(axes: Any, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9, loc="left")


def _short(token: str, most: int = 13) -> str:
    shown = visible(str(token))
    return shown if len(shown) <= most else shown[: most - 1] + "…"
