"""Logits of a few columns at one position, without the rest of the unembedding.

That this equals the model's own logits is checked once a model: families scale or cap their logits after the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .hooks import TOLERANCE
from .protocol import ModelInfo


class Readout:
    """The unembedding of a Hub model.

    Args:
        hf: the Hub's module.
        info: its dimensions.
    """

    def __init__(self, hf: Any, info: ModelInfo):
        self._hf, self._info, self._checked = hf, info, False

    def __call__(self, hidden: Tensor, columns: Tensor | None) -> Tensor:
        """Logits ``[batch, k]`` (or ``[batch, vocab]``) of normalised residuals ``[batch, d_model]``."""
        unembed = self._hf.get_output_embeddings()
        weight, bias = unembed.weight, getattr(unembed, "bias", None)
        home, hidden = hidden.device, hidden.to(weight.device)
        if columns is None:
            logits = torch.nn.functional.linear(hidden, weight, bias)
        else:
            columns = columns.to(hidden.device)
            logits = torch.einsum("bd,bkd->bk", hidden, weight[columns])
            logits = logits if bias is None else logits + bias[columns]
        return finished(logits, self._hf.config).to(home)

    def check(self, body: Callable[[Tensor], Tensor]) -> None:
        """Compare with the model's own logits, once.

        Args:
            body: normalised residuals ``[batch, pos, d_model]`` of token ids.

        Raises:
            UnsupportedError: they differ.
        """
        if self._checked:
            return
        with torch.inference_mode():
            tokens = torch.arange(1, min(6, self._info.d_vocab), device=self._info.device)[None]
            own = self._hf(input_ids=tokens, use_cache=False).logits[:, -1]
            ours = self(body(tokens)[:, -1], None)
        tolerance = TOLERANCE.get(own.dtype, 1e-4) * max(1.0, float(own.abs().max()))
        if float((own - ours.to(own.device)).abs().max()) > tolerance:
            raise UnsupportedError(
                f"{self._info.family} does something to its logits that mechkit does not know",
                fix="Use model.run(...).logits, which runs the model's own code to the end",
            )
        self._checked = True


def finished(logits: Tensor, config: Any) -> Tensor:
    """What a family does to the product of its unembedding: scaled, and capped."""
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits
