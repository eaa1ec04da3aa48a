"""The tokens of a text as pieces of it, and phrases as spans of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, PromptError

if TYPE_CHECKING:
    from ..model import Model

Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Pieces:
    """A text in tokens.

    Attributes:
        text: the text.
        ids: token ids.
        shown: each token as the piece of the text that it is, space before it included.
        offsets: first character and one past the last of each token; empty ones of tokens that were put in; None from
            tokenizers that do not tell.
    """

    text: str
    ids: list[int]
    shown: list[str]
    offsets: Offsets | None

    def span(self, phrase: Any) -> tuple[int, int]:
        """First token and one past the last of a phrase, which is such a pair or a piece of the text.

        Raises:
            PromptError: the text does not have it, or more than once; it begins or ends inside a token.
            OptionError: neither text nor a pair; a pair outside the text.
        """
        if isinstance(phrase, str):
            return self._found(phrase.strip())
        n, whole = len(self.ids), isinstance(phrase, Sequence) and all(type(one) is int for one in phrase)
        if not whole or len(phrase) != 2 or not 0 <= phrase[0] < phrase[1] <= n:
            raise OptionError(
                f"The phrase {phrase!r}",
                expected=f"a piece of the text, or (first token, one past the last) with 0 <= first < last <= {n}",
            )
        return phrase[0], phrase[1]

    def _found(self, phrase: str) -> tuple[int, int]:
        if self.offsets is None:
            raise PromptError(
                f"The phrase {phrase!r}: this tokenizer does not tell where in the text its tokens are",
                fix="Give spans of tokens, (first, one past the last), or load the tokenizer's fast form",
            )
        begins, ends = {}, {}
        for token, (a, b) in enumerate(self.offsets):
            if piece := self.text[a:b].strip():
                a += self.text[a:b].index(piece)
                begins.setdefault(a, token)
                ends[a + len(piece)] = token + 1
        at = [i for i in range(len(self.text)) if phrase and self.text.startswith(phrase, i)]
        found = [(begins[i], ends[i + len(phrase)]) for i in at if i in begins and i + len(phrase) in ends]
        if len(found) == 1:
            return found[0]
        wrong = "is not in the text" if not at else "begins or ends inside a token" if not found else "is in it twice"
        raise PromptError(
            f"The phrase {phrase!r} {wrong}: {list(enumerate(self.shown))}",
            expected="a piece of the text that is there once, of whole tokens",
            fix="Or give a span of tokens, (first, one past the last)",
        )


def pieces(tokenizer: Any, text: str, ids: list[int], offsets: Offsets | None) -> Pieces:
    """A text in tokens, with what stands between them; tokens that were put in by their names."""
    shown, end = [], 0
    for i, token in enumerate(ids):
        a, b = (0, 0) if offsets is None else offsets[i]
        shown.append((text[end:b] if b > a else "") or tokenizer.decode([token], clean_up_tokenization_spaces=False))
        end = max(end, b)
    return Pieces(text, ids, shown, offsets)


def pieces_of(model: Model, text: str) -> Pieces:
    """A text in the tokens that a decoder reads of it, with the one that its tokenizer puts first.

    Raises:
        PromptError: as of ``model.tokens``; a model without a tokenizer.
    """
    tokenizer = model.need_tokenizer()
    ids: list[int] = model.tokens(text)[0].tolist()
    offsets = None
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        offsets = [(0, 0)] * (len(ids) - len(found)) + [tuple(one) for one in found]
    return pieces(tokenizer, text, ids, offsets)
