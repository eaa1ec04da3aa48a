"""Direct logit attribution, part by part, on the Hub's own model. Knows nothing of mechkit's engine."""

from __future__ import annotations

import torch
from torch import Tensor

from .patching import value_of
from .taps import _FINAL_NORM, _OUT, _first, _sizes, attention


@torch.no_grad()
def logits_before_cap(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits at the last position ``[n, vocab]``, undoing a cap on them."""
    logits = model(ids, use_cache=False).logits[:, -1]
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.atanh(logits.double() / cap).float() if cap else logits


@torch.no_grad()
def through_final_norm(model: torch.nn.Module, ids: Tensor, written: Tensor) -> Tensor:
    """Logits ``[n, vocab]`` of what is written at the last position ``[n, d_model]``, by the run's own scale.

    The norm itself is called on what is written, its bias taken off, and its scale exchanged for the run's.
    """
    norm, last = _first(model, _FINAL_NORM), model.config.num_hidden_layers
    x = value_of(model, ids, "resid", last)[:, -1]
    centred = isinstance(norm, torch.nn.LayerNorm) or type(norm).__name__ == "CohereLayerNorm"
    epsilon = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)

    def scale(y: Tensor) -> Tensor:
        y = y - y.mean(-1, keepdim=True) if centred else y
        return (y.square().mean(-1, keepdim=True) + epsilon).sqrt()

    def linear(y: Tensor) -> Tensor:
        return (norm(y) - (getattr(norm, "bias", None) if getattr(norm, "bias", None) is not None else 0)) * scale(y)

    out = linear(written) / scale(x)
    config = model.config
    times = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return out @ model.get_output_embeddings().weight.T * times


@torch.no_grad()
def head_writes(model: torch.nn.Module, ids: Tensor, layer: int, head: int) -> Tensor:
    """What a head adds to the stream at the last position ``[n, d_model]``, where no norm follows."""
    width = _sizes(model)[2]
    z = value_of(model, ids, "z", layer)[:, -1, head]
    module = _first(attention(model, layer), _OUT)
    matrix = module.weight if type(module).__name__ == "Conv1D" else module.weight.T  # [heads * d_head, d_model]
    own = z @ matrix[head * width : (head + 1) * width] * getattr(model.config, "residual_multiplier", 1.0)
    after = getattr(_block(model, layer), "post_attention_layernorm", None)
    if after is None or type(model).__name__ not in ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM"):
        return own
    whole = value_of(model, ids, "z", layer)[:, -1].flatten(1) @ matrix
    # With its own scale kept, an RMSNorm multiplies every number by the same whatever part of it goes in.
    return own * (after(whole) / whole)


def _block(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    from .taps import block

    return block(model, layer)
