"""Where the parts of the Hub's own models are, and how to see and change one with plain PyTorch hooks.

Knows nothing of mechkit. A tap is a function that gets the tensor of one kind of part in one layer and gives back
what is to take its place: q, k, v, z as ``[batch, pos, heads, d_head]``; scores, pattern as
``[batch, heads, query, key]``; mlp, resid, embed as ``[batch, pos, d_model]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from unittest import mock

import torch
from torch import Tensor

Tap = Callable[[Tensor], Tensor]

_BLOCKS = ("transformer.h", "gpt_neox.layers", "model.decoder.layers", "model.layers")
_ATTENTION = ("attn.attention", "attn", "attention", "self_attention", "self_attn")
_OUT = ("c_proj", "out_proj", "dense", "o_proj")
_MLP = ("post_feedforward_layernorm", "mlp", "block_sparse_moe", "fc2")
_FINAL_NORM = ("transformer.ln_f", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm",
               "model.final_layernorm", "model.norm")  # fmt: skip


def _first(parent: torch.nn.Module, names: tuple[str, ...]) -> torch.nn.Module:
    for name in names:
        with suppress(AttributeError):
            return parent.get_submodule(name)
    raise KeyError(f"{type(parent).__name__} has none of {names}")


def block(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    return _first(model, _BLOCKS)[layer]


def attention(model: torch.nn.Module, layer: int) -> torch.nn.Module:
    return _first(block(model, layer), _ATTENTION)


def _sizes(model: torch.nn.Module) -> tuple[int, int, int]:
    """Heads, key/value heads, width of a head."""
    config = model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if type(model).__name__ == "FalconForCausalLM":
        groups = 1 if config.multi_query else heads
    return heads, groups, getattr(config, "head_dim", None) or config.hidden_size // heads


def _fused(model: torch.nn.Module, kind: str, out: Tensor) -> Tensor:
    """The view ``[batch, pos, heads, d_head]`` of q, k or v in the output of one fused projection."""
    heads, groups, width = _sizes(model)
    number, name = "qkv".index(kind), type(model).__name__
    if name in ("GPTNeoXForCausalLM", "BloomForCausalLM") or (name == "FalconForCausalLM" and groups == heads):
        return out.unflatten(-1, (heads, 3, width))[..., number, :]  # head by head
    parts = (heads, heads, heads) if name == "GPT2LMHeadModel" else (heads, groups, groups)
    first = sum(parts[:number]) * width
    return out[..., first : first + parts[number] * width].unflatten(-1, (-1, width))


@contextmanager
def tapped(model: torch.nn.Module, kind: str, layer: int, tap: Tap) -> Iterator[None]:
    """Put one tap in place for the length of a ``with``."""
    if kind in ("scores", "pattern"):
        with _softmax(model, kind, layer, tap):
            yield
        return
    handle = _hook(model, kind, layer, tap)
    try:
        yield
    finally:
        handle.remove()


def _mlp(model: torch.nn.Module, layer: int, tap: Tap):
    """What the MLP adds to the stream."""
    name = type(model).__name__
    if name == "BloomForCausalLM":  # its MLP adds the stream itself
        module = block(model, layer).mlp.dense_4h_to_h
        return module.register_forward_hook(lambda _, __, out: tap(out.clone()))
    scale = getattr(model.config, "residual_multiplier", 1.0)  # Granite multiplies outside the module
    shapes: list[torch.Size] = []
    if name == "OPTForCausalLM":  # its block puts all prompts' positions on one axis
        block(model, layer).self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(kwargs["hidden_states"].shape), with_kwargs=True
        )

    def after(_, args: tuple, out):
        own = out[0] if isinstance(out, tuple) else out
        shaped = own.view(shapes[-1]) if shapes else own
        new = (tap(shaped * scale) / scale).view(own.shape)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    return _first(block(model, layer), _MLP).register_forward_hook(after)


def _hook(model: torch.nn.Module, kind: str, layer: int, tap: Tap):
    width = _sizes(model)[2]

    def before(change: Tap):
        def hook(_, args: tuple, kwargs: dict) -> tuple:
            if args:
                return (change(args[0].clone()), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"].clone())}

        return hook

    def after(_, args: tuple, out):
        if isinstance(out, tuple):
            return (tap(out[0].clone()), *out[1:])
        return tap(out.clone())

    if kind == "embed":  # as it enters the stream: Granite multiplies it outside the module
        scale = getattr(model.config, "embedding_multiplier", 1.0)
        return model.get_input_embeddings().register_forward_hook(lambda _, __, out: tap(out * scale) / scale)
    if kind == "resid":
        last = layer == model.config.num_hidden_layers
        module = _first(model, _FINAL_NORM) if last else block(model, layer)
        return module.register_forward_pre_hook(before(tap), with_kwargs=True)
    if kind == "mlp":
        return _mlp(model, layer, tap)
    if kind == "z":
        flat = before(lambda z: tap(z.unflatten(-1, (-1, width))).flatten(-2))
        return _first(attention(model, layer), _OUT).register_forward_pre_hook(flat, with_kwargs=True)
    with suppress(AttributeError):
        own = attention(model, layer).get_submodule(f"{kind}_proj")
        return own.register_forward_hook(lambda _, __, out: tap(out.unflatten(-1, (-1, width)).clone()).flatten(-2))
    fused = _first(attention(model, layer), ("c_attn", "query_key_value", "qkv_proj"))

    def within(_, __, out: Tensor) -> Tensor:
        out = out.clone()
        view = _fused(model, kind, out)
        view.copy_(tap(view.clone()))
        return out

    return fused.register_forward_hook(within)


@contextmanager
def _softmax(model: torch.nn.Module, kind: str, layer: int, tap: Tap) -> Iterator[None]:
    """Around the softmax that the attention module of a layer calls."""
    own, inside = torch.nn.functional.softmax, []

    def softmax(scores: Tensor, *args, **kwargs) -> Tensor:
        if not inside or scores.ndim != 4:
            return own(scores, *args, **kwargs)
        # gpt-oss has one more column than there are keys: the sink.
        sink = 1 if hasattr(attention(model, layer), "sinks") else 0
        keys = scores.shape[-1] - sink
        if kind == "scores":
            own_scores, column = scores[..., :keys], scores[..., keys:]
            # With a sink, the row's maximum was taken off all of them.
            off = column - attention(model, layer).sinks[:, None, None] if sink else 0.0
            scores = torch.cat([tap((own_scores - off).clone()) + off, column], -1)
            return own(scores, *args, **kwargs)
        pattern = own(scores, *args, **kwargs)
        return torch.cat([tap(pattern[..., :keys].clone()), pattern[..., keys:]], -1)

    module = attention(model, layer)
    handles = [
        module.register_forward_pre_hook(lambda *_: inside.append(True)),
        module.register_forward_hook(lambda *_: inside.clear()),
    ]
    try:
        with mock.patch("torch.nn.functional.softmax", softmax):
            yield
    finally:
        for handle in handles:
            handle.remove()
