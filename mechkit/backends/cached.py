"""Whether a family's key/value cache gives exactly what running the whole text gives."""

from __future__ import annotations

from typing import Any

import torch

from .hooks import TOLERANCE
from .memory import ran_out
from .protocol import ModelInfo


def cache_is_exact(hf: Any, info: ModelInfo) -> bool:
    """Whether generating with a cache gives the logits of generating without; tried out on a few tokens."""
    from transformers import DynamicCache

    ids = torch.arange(1, min(6, info.d_vocab), device=info.device).expand(2, -1)
    try:
        with_cache, without = (
            hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=3,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                **how,
            ).logits
            for how in ({"past_key_values": DynamicCache()}, {"use_cache": False})
        )
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        if ran_out(error):
            raise
        return False
    off = max(float((a - b).abs().max()) for a, b in zip(with_cache, without, strict=True))
    largest = max(1.0, *(float(logits.abs().max()) for logits in without))
    return off <= TOLERANCE.get(hf.dtype, 1e-4) * largest
