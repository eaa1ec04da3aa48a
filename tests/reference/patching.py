"""Patching and ablation with plain PyTorch hooks on the Hub's own modules. Knows nothing of mechkit's engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor


def out_projection(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    """The module that multiplies by W_O; its input is z, heads side by side."""
    return _part(model, layer, ("attn.c_proj", "attention.dense", "self_attn.o_proj"))


def mlp(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    """The MLP of a layer."""
    return _part(model, layer, ("mlp",))


def block(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    """A whole block."""
    for blocks in ("transformer.h", "gpt_neox.layers", "model.layers"):
        with suppress(AttributeError):
            return model.get_submodule(f"{blocks}.{layer}")
    raise KeyError(type(model).__name__)


def _part(model: torch.nn.Module, layer: int, names: tuple[str, ...]) -> torch.nn.Module:
    for name in names:
        with suppress(AttributeError):
            return block(model, layer).get_submodule(name)
    raise KeyError(type(model).__name__)


@torch.no_grad()
def z_of(model: torch.nn.Module, tokens: Tensor, layer: int, d_head: int) -> Tensor:
    """z of one layer ``[batch, pos, heads, d_head]``."""
    kept: list[Tensor] = []
    handle = out_projection(model, layer).register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    model(tokens, use_cache=False)
    handle.remove()
    return kept[0].unflatten(-1, (-1, d_head))


@torch.no_grad()
def run_with_z(model: torch.nn.Module, tokens: Tensor, changes: dict[int, Callable[[Tensor], Tensor]], d_head: int):
    """Logits ``[batch, pos, vocab]`` of a run in which z of some layers is changed."""

    def hook(change: Callable[[Tensor], Tensor]):
        def function(_: torch.nn.Module, args: tuple) -> tuple:
            return (change(args[0].unflatten(-1, (-1, d_head)).clone()).flatten(-2), *args[1:])

        return function

    handles = [out_projection(model, layer).register_forward_pre_hook(hook(f)) for layer, f in changes.items()]
    try:
        return model(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def patch_head(model, base: Tensor, source: Tensor, layer: int, head: int, d_head: int, where=slice(None)) -> Tensor:
    """Logits of the base prompts with one head's output taken from the source prompts."""
    z = z_of(model, source, layer, d_head)

    def change(own: Tensor) -> Tensor:
        own[:, where, head] = z[:, where, head]
        return own

    return run_with_z(model, base, {layer: change}, d_head)


@torch.no_grad()
def patch_output(model, module: torch.nn.Module, base: Tensor, source: Tensor, where=slice(None)) -> Tensor:
    """Logits of the base prompts with one module's output (an MLP's, a block's) taken from the source prompts."""
    kept: list[Tensor] = []
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    handle = module.register_forward_hook(lambda _, __, out: kept.append(first(out).clone()))
    model(source, use_cache=False)
    handle.remove()

    def change(_: torch.nn.Module, __: tuple, out):
        new = first(out).clone()
        new[:, where] = kept[0][:, where]
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = module.register_forward_hook(change)
    try:
        return model(base, use_cache=False).logits
    finally:
        handle.remove()


def keep_only(model, tokens: Tensor, kept: set[tuple[int, int]], values: list[Tensor], d_head: int) -> Tensor:
    """Logits with every head outside ``kept`` set to ``values[layer] [batch, pos, heads, d_head]``."""

    def change(layer: int):
        def function(own: Tensor) -> Tensor:
            for head in range(own.shape[2]):
                if (layer, head) not in kept:
                    own[:, :, head] = values[layer][..., head, :]
            return own

        return function

    return run_with_z(model, tokens, {layer: change(layer) for layer in range(len(values))}, d_head)
