"""A whole module of the Hub, run once with what is relevant to many sources among its input tokens.

1. Where the stream begins, the relevant part of each source is the activation at its positions. That is the output of
   the module's ``embeddings``, which have their norm and their positions in them; of a decoder it is what the first
   block reads.
2. The module's own code runs on to its logits by the rules, with eager attention, whose operations are all seen.
3. Linear maps of a layer that are not in its attention are stabilised, and so is what each layer puts out.

Hsu et al. 2024 (arXiv 2407.00886), section 3, and appendix on BERT.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..backends.norms import default_epsilon
from ..errors import UnsupportedError
from .modules import in_force
from .rules import stabilised
from .split import Rules, Split


@torch.inference_mode()
def hub_pass(hf: Any, inputs: Mapping[str, Tensor], where: Tensor, rules: Rules) -> Split:
    """Run a module, inside ``library.eager``.

    Args:
        hf: a classifier or masked language model of the Hub.
        inputs: what it is called with, of one text.
        where: positions of each source ``[sources, pos]``, boolean.
        rules: how parts are carried.

    Returns:
        Its logits, as it gives them ``[1, ...]``, and their relevant part ``[sources, 1, ...]``.

    Raises:
        UnsupportedError: a module whose embeddings are not found, or an operation that the rules do not know.
    """
    begin, layers = _begin(hf), _layers(hf)

    def split(x: Any) -> Split:
        if tuple(x.shape[:2]) != (1, where.shape[1]):
            raise UnsupportedError(
                f"{type(hf).__name__} makes {list(x.shape)} of {where.shape[1]} tokens",
                expected="one embedding a token",
            )
        return Split(x, where.to(x.device)[:, None, :, None] * x, rules)

    def into_first(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (split(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": split(kwargs["hidden_states"])}

    with ExitStack() as stack:
        stack.enter_context(in_force(rules, hf, _feed_forward(layers), (), default_epsilon(hf.config)))
        if begin is layers[0]:
            hook = begin.register_forward_pre_hook(into_first, with_kwargs=True)
        else:
            hook = begin.register_forward_hook(lambda _, __, out: split(out))
        stack.callback(hook.remove)
        for layer in layers if rules.stabilise else ():
            stack.callback(layer.register_forward_hook(_stable).remove)
        return hf(**inputs).logits


def _stable(_: nn.Module, __: tuple, out: Any) -> Any:
    x = out[0] if isinstance(out, tuple) else out
    if not isinstance(x, Split) or x.relevant is None:
        return out
    x = Split(x.total, stabilised(x.relevant, x.total), x.rules)
    return (x, *out[1:]) if isinstance(out, tuple) else x


def _begin(hf: Any) -> nn.Module:
    """The module with whose output, or with whose input if it is the first layer, the stream begins."""
    embeddings = getattr(hf.base_model, "embeddings", None)
    if isinstance(embeddings, nn.Module) and not isinstance(embeddings, nn.Embedding):
        return embeddings
    for name in ("layers", "h"):
        blocks = getattr(hf.base_model, name, None)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return blocks[0]
    raise UnsupportedError(
        f"{type(hf).__name__}: its {type(hf.base_model).__name__} has no module `embeddings`",
        expected="an encoder like BERT, whose embeddings are one module, or a decoder with `layers` or `h`",
    )


def _layers(hf: Any) -> nn.ModuleList:
    """The layers: the outermost list of modules."""
    for module in hf.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return module
    raise UnsupportedError(f"{type(hf).__name__} has no list of layers", expected="a transformer")


def _feed_forward(layers: nn.ModuleList) -> list[nn.Module]:
    """Linear maps that are not in attention."""
    return [
        module
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "attn" not in name.lower() and "attention" not in name.lower()
    ]
