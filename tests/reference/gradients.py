"""Gradients of the Hub's own model by autograd, a prompt at a time. Knows nothing of mechkit's engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from .taps import _first, _fused, _sizes, attention, tapped

Measure = Callable[[Tensor, Tensor], Tensor]  # logits [1, pos, vocab], ids [1, pos] to one number


def loss(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


def gates(model: torch.nn.Module, ids: Tensor, measure: Measure) -> Tensor:
    """Derivative for a number that multiplies each head's z ``[layers, heads, n]``."""
    layers, heads = model.config.num_hidden_layers, _sizes(model)[0]
    found = []
    for row in ids:
        gate = torch.ones(layers, heads, requires_grad=True)
        with ExitStack() as stack:
            for layer in range(layers):
                stack.enter_context(tapped(model, "z", layer, partial(torch.mul, gate[layer][:, None])))
            value = measure(model(row[None], use_cache=False).logits, row[None])
        found.append(torch.autograd.grad(value, gate)[0])
    return torch.stack(found, -1)


def query_norms(model: torch.nn.Module, ids: Tensor, measure: Measure) -> Tensor:
    """Squared norm of each head's part of the gradient of the Hub's own query weight ``[layers, heads, n]``."""
    layers = model.config.num_hidden_layers
    heads, _, width = _sizes(model)
    weights = [_weight(model, layer) for layer in range(layers)]
    found = []
    for row in ids:
        value = measure(model(row[None], use_cache=False).logits, row[None])
        norms = []
        grads = torch.autograd.grad(value, [weight for weight, _ in weights])
        for (_, fused), grad in zip(weights, grads, strict=True):
            by_input = grad if type(model).__name__ == "GPT2LMHeadModel" else grad.T  # [d_model, outputs]
            own = _fused(model, "q", by_input) if fused else by_input.unflatten(-1, (heads, width))
            norms.append(own.square().sum((0, 2)))
        found.append(torch.stack(norms))
    return torch.stack(found, -1)


def _weight(model: torch.nn.Module, layer: int) -> tuple[Tensor, bool]:
    """The weight that makes queries, and whether it makes keys and values as well."""
    module = attention(model, layer)
    if hasattr(module, "q_proj"):
        return module.q_proj.weight, False
    return _first(module, ("c_attn", "query_key_value", "qkv_proj")).weight, True
