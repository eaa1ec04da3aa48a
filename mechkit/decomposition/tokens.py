"""How much of a prediction comes from each token of the text, and from phrases? Contextual decomposition (CD-T).

1. Each token by itself, and each phrase as a whole, is a source: the activation at its positions where the stream
   begins is relevant, and nothing else is.
2. One pass carries all of them through the model, by the rules of ``rules``.
3. The score is the relevant part of the answer's logit, less that of what it is held against; the rest makes up the
   model's own difference.

What tokens make only together (in activations, in norms) goes by conventions, so that a phrase's score is not the sum
of its tokens' scores: the difference is what the words make of each other.

Hsu et al. 2024 (arXiv 2407.00886), section 3; Murdoch et al. 2018 (arXiv 1801.05453) for phrases.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from ..backends.memory import in_batches
from ..errors import OptionError
from ..results import Table
from .asked import of_decoder, of_hub
from .split import Rules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..model import Model
    from ..view.tokens_view import TokensView


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores(Table):
    """One score a token, and one a phrase.

    Attributes:
        frame: a row each: ``position`` (of the first token), ``token`` (the piece of the text, space before it
            included), ``start`` and ``stop`` (first token, one past the last), ``kind`` (``"token"`` or ``"phrase"``),
            ``score``, ``rest`` (what makes it up to the model's own value), ``n`` (1).
        unit: of ``score``: ``"logit(a) - logit(b)"``.
        meta: model, text, answer, method, options, versions, seconds.
    """

    _things: ClassVar[str] = "tokens and phrases"

    def show(self) -> TokensView:
        """The text with its tokens coloured by score, as a live view; ``to_html()`` of it is a page."""
        from ..view.tokens_view import tokens

        return tokens(self)

    def plot(self) -> Figure:
        """The coloured text as a matplotlib figure."""
        from ..view.coloured_text import token_figure

        return token_figure(self)

    def _repr_html_(self) -> str:
        from ..view.coloured_text import ColouredText

        return ColouredText(self).to_html()


def token_scores(
    model: Model | tuple[Any, Any],
    text: str,
    *,
    method: Literal["cd-t"] = "cd-t",
    answer: str | int | None = None,
    against: str | int | None = None,
    phrases: Sequence[str | tuple[int, int]] | None = None,
    reference: Literal["zero"] = "zero",
    attention: Literal["frozen", "product"] = "frozen",
    activation: Literal["remainder", "shapley"] = "shapley",
    biases: Literal["shared", "irrelevant"] = "shared",
    stabilise: bool = True,
) -> TokenScores:
    """How much of a prediction comes from each token of a text.

    Args:
        model: a local decoder (the prediction is its next token); or ``(hf_model, tokenizer)`` of the Hub, a sequence
            classifier or a masked language model, whose text has one mask token. It is left as it was.
        text: one text.
        method: contextual decomposition, so far the only one.
        answer: a class, by name or index; or a token, as text or id. Left out: what the model itself predicts.
        against: another class, or token, whose logit is taken off. Left out: of two classes the other one; otherwise
            nothing is taken off.
        phrases: pieces of the text that are there once, or ``(first token, one past the last)``; each is a row more,
            of all its tokens together.
        reference: what is irrelevant of a source's activation: nothing (``"zero"``), so far the only one.
        attention, biases, stabilise: as of ``mk.decompose``.
        activation: as of ``mk.decompose``, but by default ``"shapley"``: beside a reference of nothing,
            ``"remainder"`` would give each token all that it makes together with the others.

    Returns:
        One row a token, special ones included, then one a phrase.

    Raises:
        PromptError: no text, or one that is too long; no tokenizer; a phrase that is not in the text, or not once; a
            masked language model's text without exactly one mask.
        OptionError: an unknown option or class; an answer that a masked model's tokenizer makes several tokens of;
            parts that grew past all bounds, as they can in deep models that are not stabilised.
        TaskError: an answer that is several tokens for a decoder.
        UnsupportedError: a module of another kind, one whose embeddings are not found, or an operation that no rule
            is for: it is named, and where.
        CapacityError: it does not fit in memory.
    """
    started = time.perf_counter()
    for name, value, known in (("method", method, "cd-t"), ("reference", reference, "zero")):
        if value != known:
            raise OptionError(f"{name} = {value!r}", expected=repr(known))
    if isinstance(phrases, str):
        raise OptionError(f"phrases = {phrases!r}", expected="a list of phrases")
    rules = Rules(attention, activation, biases, stabilise)
    if isinstance(model, tuple):
        asked = of_hub(*_pair(model), text, answer, against, rules)
    else:
        asked = of_decoder(model, text, answer, against, rules)
    n = len(asked.pieces.ids)
    spans = [(i, i + 1) for i in range(n)] + [asked.pieces.span(one) for one in phrases or ()]
    at = torch.arange(n)
    where = torch.stack([(at >= start) & (at < stop) for start, stop in spans])
    found = [part for _, part, _ in in_batches(where, asked.rows, asked.run)]
    scores, total = torch.cat([relevant for relevant, _ in found]).numpy(), found[0][1]
    if not np.isfinite(scores).all():
        raise OptionError(
            f"stabilise = {stabilise}, activation = {activation!r}: parts grew past what a number can hold",
            fix='Take stabilise=True, or activation="shapley", or load the model with dtype="float32"',
        )
    frame = pd.DataFrame(
        {
            "position": [start for start, _ in spans],
            "token": ["".join(asked.pieces.shown[start:stop]) for start, stop in spans],
            "start": [start for start, _ in spans],
            "stop": [stop for _, stop in spans],
            "kind": ["token"] * n + ["phrase"] * (len(spans) - n),
            "score": scores,
            "rest": total - scores,
            "n": 1,
        }
    )
    unit = f"logit({asked.answer})" + (f" - logit({asked.against})" if asked.against is not None else "")
    packages = {"mechkit": "mechkit-interp", "torch": "torch", "transformers": "transformers"}
    meta = {
        **asked.about,
        "text": text,
        "answer": asked.answer,
        "against": asked.against,
        "total": total,
        "method": method,
        "options": {"reference": reference, **rules.options},
        "versions": {name: version(package) for name, package in packages.items()},
        "seconds": round(time.perf_counter() - started, 2),
    }
    return TokenScores(frame, unit, meta)


def _pair(model: tuple[Any, ...]) -> tuple[Any, Any]:
    from transformers import PreTrainedModel

    if len(model) != 2 or not isinstance(model[0], PreTrainedModel):
        raise OptionError(f"A tuple of {[type(one).__name__ for one in model]}", expected="(hf_model, tokenizer)")
    return model[0], model[1]
