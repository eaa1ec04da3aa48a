"""Random tokens, then the same again: what induction heads are found on.

Olsson et al. 2022, arXiv 2209.11895. Each row is [BOS, r, r], with BOS where the tokenizer has one and r different
tokens drawn evenly from the vocabulary but its special tokens.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import OptionError
from ..tasks.induction import vocabulary

if TYPE_CHECKING:
    from ..model import Model


def repeated_tokens(model: Model, n: int = 8, length: int = 32, seed: int = 0) -> Tensor:
    """Ids ``[n, pos]``, pos = 2 ``length`` and one more where the tokenizer has a beginning-of-sequence token.

    Raises:
        OptionError: ``n`` below 1, ``length`` below 2 or more than there are tokens to draw from.
        PromptError: longer than the model's context.
    """
    tokens = vocabulary(model)
    if n < 1:
        raise OptionError(f"n = {n}", expected="at least 1 row")
    if not 2 <= length <= len(tokens):
        raise OptionError(f"length = {length}", expected=f"2 to {len(tokens)} different tokens")
    bos = getattr(model.tokenizer, "bos_token_id", None)
    draw = random.Random(seed)
    rows = [draw.sample(tokens, length) for _ in range(n)]
    start = [] if bos is None else [bos]
    return model.tokens(torch.tensor([[*start, *row, *row] for row in rows]))
