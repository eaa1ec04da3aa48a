"""A text with its tokens coloured by score: as a piece of HTML, as a figure, as plain text.

Blue is for the answer and orange against it, which colour-blind readers can tell apart; what is against it is also
underlined by dots. Colours lie half transparent on whatever the page has, so that its own text colour stays readable
in the light and in the dark.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..decomposition.tokens import TokenScores

_BLUE, _ORANGE = (0, 114, 178), (230, 159, 0)
_DENSEST = 0.6  # of the colour of the largest score: text stays readable on it
_COLUMNS = 84  # characters a line of the figure


@dataclass(frozen=True, eq=False)
class ColouredText:
    """A text with its tokens coloured by score; a notebook shows it by itself."""

    scores: TokenScores

    def to_html(self) -> str:
        """One element with its styles in it, whose tokens tell their score when pointed at."""
        unit, limit = self.scores.unit, _limit(self.scores)
        parts = {kind: [] for kind in ("token", "phrase")}
        for kind, token, score, rest in self._rows():
            told = f"{_visible(token)}: {score:+.3f} (rest {rest:+.3f})"
            red, green, blue = _BLUE if score >= 0 else _ORANGE
            style = (
                f"background:rgba({red},{green},{blue},{_DENSEST * abs(score) / limit:.3f});color:inherit;"
                f"border-bottom:2px {'solid' if score >= 0 else 'dotted'} rgba({red},{green},{blue},0.9);"
                "border-radius:2px;padding:1px 0;white-space:pre-wrap"
            )
            shown = escape(token.strip() if kind == "phrase" else token).replace("\n", "⏎\n")
            number = f" <small>{score:+.3f}</small>" if kind == "phrase" else ""
            label = escape(told, quote=True)
            parts[kind].append(
                f'<span role="listitem" title="{label}" aria-label="{label}" style="{style}">{shown}</span>{number}'
            )
        label = escape(f"Scores of tokens, in {unit}", quote=True)
        total = float(self.scores.frame["score"].iloc[0] + self.scores.frame["rest"].iloc[0])
        html = (
            f'<div role="figure" aria-label="{label}" style="color:inherit;font-family:sans-serif;line-height:1.9">'
            f'<div role="list" aria-label="tokens" style="white-space:pre-wrap">{"".join(parts["token"])}</div>'
        )
        if parts["phrase"]:
            html += f'<div role="list" aria-label="phrases">Phrases: {" · ".join(parts["phrase"])}</div>'
        return html + (
            f"<div><small>{escape(unit)} = {total:+.3f}. Blue, solid line: for it; orange, dotted line: against it; "
            f"full colour: {limit:.3g}.</small></div></div>"
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def __repr__(self) -> str:
        rows = [f"{_visible(token)} ({score:+.3f})" for _, token, score, _ in self._rows()]
        return f"{self.scores.unit}: " + " ".join(rows)

    def _rows(self) -> list[tuple[str, str, float, float]]:
        frame = self.scores.frame
        return list(zip(frame["kind"], frame["token"], frame["score"], frame["rest"], strict=True))


def token_figure(scores: TokenScores) -> Figure:
    """The coloured text as a figure: each token with its score below it, then each phrase on a line of its own."""
    from matplotlib.patches import Rectangle

    from .figures import Picture, visible

    cells, row, column, limit = [], 0, 0, _limit(scores)
    frame = scores.frame
    for kind, token, score in zip(frame["kind"], frame["token"], frame["score"], strict=True):
        width = max(len(_visible(token)), 5) + 1
        if column and (column + width > _COLUMNS or kind == "phrase"):
            row, column = row + 1, 0
        cells.append((row, column, width, visible(token), float(score)))
        column += width
    columns = max(column + width for _, column, width, _, _ in cells)
    figure = Picture(figsize=(0.085 * columns + 0.3, 0.42 * (row + 1) + 0.5), layout="constrained")
    axes = figure.subplots()
    for row, column, width, token, score in cells:
        colour = [part / 255 for part in (_BLUE if score >= 0 else _ORANGE)]
        axes.add_patch(
            Rectangle((column, row + 0.06), width - 0.3, 0.86, color=colour, alpha=_DENSEST * abs(score) / limit, lw=0)
        )
        middle = column + (width - 0.3) / 2
        axes.text(middle, row + 0.36, token, ha="center", va="center", fontsize=8, family=["monospace", "sans-serif"])
        axes.text(middle, row + 0.74, f"{score:+.2f}", ha="center", va="center", fontsize=6, color="#333333")
    axes.set_xlim(0, columns)
    axes.set_ylim(row + 1, 0)
    axes.set_axis_off()
    axes.set_title(scores.unit.replace("$", r"\$"), fontsize=8)
    return figure


def _limit(scores: TokenScores) -> float:
    return float(scores.frame["score"].abs().max()) or 1.0


def _visible(token: str) -> str:
    """A token without the space around it; of space alone, signs for it."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥")
    return shown.strip() or "␣" * max(1, len(shown))
