"""A text with its tokens coloured by score, live: numbers where one points, and a token to lock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import traitlets

from ..decomposition.tokens import TokenScores
from ..errors import OptionError
from .coloured_text import ColouredText, token_figure
from .widget import LiveView, script, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TokensView(LiveView):
    """The view; make one with ``mk.view.tokens``.

    Attributes:
        token: the token that is locked, from 0; -1: none.
    """

    _esm = script("parts", "elements", "controls", "frame", "tokens")
    _css = style("views")
    _exported = ("about", "token")
    _shared: ClassVar[dict[str, str]] = {"token": "token"}

    about = traitlets.Dict().tag(sync=True)
    token = traitlets.Int(-1).tag(sync=True)

    def __init__(self, scores: TokenScores):
        self._scores = scores
        rows = {kind: _rows(scores.frame.loc[scores.frame["kind"] == kind]) for kind in ("token", "phrase")}
        first = scores.frame.iloc[0]
        self._n_tokens = len(rows["token"])
        whole = "" if np.isnan(first["rest"]) else f"{scores.unit} = {first['score'] + first['rest']:+.3f}."
        super().__init__(
            about={
                "title": " ".join(["Tokens", *([f"of {scores.meta['model']}"] if "model" in scores.meta else [])]),
                "unit": scores.unit,
                "limit": float(scores.frame["score"].abs().max()) or 1.0,
                "total": whole,
                "tokens": rows["token"],
                "phrases": rows["phrase"],
            }
        )

    @property
    def title(self) -> str:
        """What stands above it."""
        return self.about["title"]

    def picture(self) -> Figure:
        """The text, each token with its score below it."""
        return token_figure(self._scores)

    def sentence(self) -> str:
        """Every token with its score."""
        return repr(ColouredText(self._scores))

    def to_circuitsvis(self) -> Any:
        """The same text as ``colored_tokens`` of CircuitsVis."""
        from circuitsvis.tokens import colored_tokens

        tokens = self.about["tokens"]
        return colored_tokens([one["token"] for one in tokens], [one["score"] for one in tokens])


def tokens(
    scores: TokenScores | Sequence[str], values: Sequence[float] | np.ndarray | None = None, unit: str = "score"
) -> TokensView:
    """The text of token scores, its tokens coloured: blue for the answer, orange against it.

    Args:
        scores: of ``mk.token_scores``; or the tokens of a text, with a value each.
        values: one number a token ``[pos]``, where ``scores`` are tokens.
        unit: of ``values``.

    Raises:
        OptionError: another number of values than tokens, or none at all.
    """
    if isinstance(scores, TokenScores):
        return TokensView(scores)
    words = list(scores)
    numbers = np.asarray([] if values is None else values, float)
    if isinstance(scores, str) or not words or numbers.shape != (len(words),) or not np.isfinite(numbers).all():
        raise OptionError(
            f"{len(words)} tokens with values of shape {list(numbers.shape)}",
            expected="one finite number a token",
            fix="mk.view.tokens(model.to_text(...) of each token, values)",
        )
    frame = pd.DataFrame({"token": words, "kind": "token", "score": numbers, "rest": np.nan})
    return TokensView(TokenScores(frame, unit))


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rest = [None if np.isnan(one) else round(float(one), 6) for one in frame["rest"]]
    columns = zip(frame["token"].map(str), frame["score"].astype(float).round(6), rest, strict=True)
    return [{"token": token, "score": score, "rest": other} for token, score, other in columns]
