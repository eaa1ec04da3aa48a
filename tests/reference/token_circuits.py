"""The OV and QK circuits over the vocabulary as whole matrices, by the model's own modules; small vocabularies only.

Nothing is folded: tokens go through the norm, the projections and the readout as the model has them, one after the
other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def ov_circuit(model: Any, layer: int, head: int, sources: Tensor) -> Tensor:
    """What head puts into the logits for each source token ``[vocab, vocab]``, the last norm's scale taken as one.

    Not for families with a norm behind attention, whose scale is of all heads together.
    """
    attn, block = model.bridge.blocks[layer].attn, model.bridge.blocks[layer]
    group = head * model.n_kv_heads // model.n_heads
    with torch.no_grad():
        read = block.ln1(sources) if hasattr(block, "ln1") else sources
        value = read @ attn.W_V[group]
        if attn.b_V is not None:
            value = value + attn.b_V[group]
        written = value @ attn.W_O[head] * getattr(model.hf.config, "residual_multiplier", 1.0)
        return _last_norm_linear(model, written) @ model.hf.get_output_embeddings().weight.T


def qk_circuit(model: Any, layer: int, head: int, queries: Tensor, sources: Tensor) -> Tensor:
    """Scores of each query with each source token ``[queries, vocab]``, without rotation, divided by sqrt(d_head)."""
    attn, block = model.bridge.blocks[layer].attn, model.bridge.blocks[layer]
    group = head * model.n_kv_heads // model.n_heads
    with torch.no_grad():
        q, k = (block.ln1(x) if hasattr(block, "ln1") else x for x in (queries, sources))
        q, k = q @ attn.W_Q[head], k @ attn.W_K[group]
        q = q if attn.b_Q is None else q + attn.b_Q[head]
        k = k if attn.b_K is None else k + attn.b_K[group]
        return q @ k.T / model.d_head**0.5


def _last_norm_linear(model: Any, written: Tensor) -> Tensor:
    """The last norm's Jacobian where its scale is one: its gain, and with LayerNorm its taking off of the mean."""
    norm = model.bridge.ln_final
    weight = norm.weight
    if "Gemma" in type(model.hf).__name__:
        weight = weight + 1
    layer_norm = getattr(norm, "bias", None) is not None or "LayerNorm" in type(norm.original_component).__name__
    centred = written - written.mean(-1, keepdim=True) if layer_norm else written
    return centred * weight
