"""Which tokens are looked back to, and which look far: WAAD and FAI, a number a token.

1. A head's span is how far back it looks in the mean over the queries of the response. The 30% with the shortest are
   the local heads, the 30% with the longest the global ones.
2. WAAD of token t, over the local heads: ``sum over s of A[t, s] min(t - s, 10)``. High where a query leaves its
   neighbourhood.
3. FAI of token s, over the global heads: the mean of ``A[t, s]`` over the queries t of the response that come 10 to 50
   tokens later. High where later tokens come back to it. The first token, which most heads use as a sink, gets 0, and
   so do the last ten, which no query comes late enough to look back to: that says nothing of them.

arXiv 2510.13554, section 3; its window and horizons were not told there and are a choice made here.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..decomposition.tokens import TokenScores
from ..errors import OptionError, PromptError
from ..prompts import as_batch
from .places import Place, place_mask, real_mask
from .streamed import LATE, NEAR, SOON, streamed
from .tables import about, token_scores

if TYPE_CHECKING:
    from ..model import Model


def waad(
    model: Model, data: str | Tensor, *, response: Place | None = None, share: float = 0.3, skip_first: int = 1
) -> TokenScores:
    """Windowed average attention distance of each token; see the module.

    Args:
        model: any that gives patterns.
        data: one text, or ids ``[pos]``.
        response: where spans are measured, a piece of the text or (first, one past the last); left out: everywhere.
        share: of all heads, how many count as local.
        skip_first: not used by WAAD, which has a window.

    Raises:
        OptionError: ``share`` outside (0, 1], or a response outside the text.
        PromptError: several prompts.
    """
    return _curve(model, data, "waad", response, share, skip_first)


def fai(
    model: Model, data: str | Tensor, *, response: Place | None = None, share: float = 0.3, skip_first: int = 1
) -> TokenScores:
    """Future attention influence of each token; see the module.

    Args:
        model, data, response: as of ``waad``.
        share: of all heads, how many count as global.
        skip_first: so many first tokens get 0.

    Raises:
        OptionError, PromptError: as of ``waad``.
    """
    return _curve(model, data, "fai", response, share, skip_first)


def _curve(model: Model, data: Any, name: str, response: Place | None, share: float, skip_first: int) -> TokenScores:
    started = time.perf_counter()
    if not 0 < share <= 1:
        raise OptionError(f"share = {share}", expected="above 0, at most 1")
    tokens, lengths = as_batch(model, data)
    if len(tokens) != 1:
        raise PromptError(f"{len(tokens)} prompts", expected="one text")
    width = tokens.shape[1]
    real = real_mask(lengths, width)
    queries = real if response is None else place_mask(model, data, response, lengths, width)
    found = streamed(model, tokens, lengths, ["distance", name], queries)
    spans = found["distance"][..., 0].flatten()
    count = max(1, round(share * len(spans)))
    heads = spans.argsort(stable=True)[:count] if name == "waad" else spans.argsort(stable=True)[-count:]
    values = found[name][:, :, 0].flatten(0, 1)[heads].mean(0)
    if name == "fai":
        values[:skip_first] = 0.0
    told = {
        "heads": [str(list(model.heads())[i]) for i in heads.tolist()],
        **about(model, data, name, started, share=share, window=NEAR, horizon=(SOON, LATE), skip_first=skip_first),
    }
    unit = "tokens back" if name == "waad" else "share of later attention"
    return token_scores(model, data, tokens[0].tolist(), values.double().numpy(), unit, told, n=count)
