"""Backward passes by the rules of relevance propagation (RelP), on the Hub's own modules.

Values stay as they are; only what a backward pass makes of three kinds of module changes:

1. A norm passes on gradients as if its scale were a constant (the mean that a LayerNorm takes off is linear and stays).
2. An activation passes them on as if it were ``x`` times the constant ``act(x) / x``.
3. Of a gated MLP's product, each factor gets half of its gradient.

Attention keeps its own gradients, and so do caps. Norms are recognised by what they compute, activations by their
class, gates by the projection behind them; a family in which one of them is not found is refused.

Jafari et al. 2025 (arXiv 2508.21258), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .gradients import plain_tensors
from .norms import Norm, elementwise_activation, norms_of

if TYPE_CHECKING:
    from .lens import LensBackend

_GATES = ("gate_proj", "gate_up_proj")


@contextmanager
def relevance(backend: LensBackend) -> Iterator[None]:
    """While active, backward passes through a model go by the rules.

    Raises:
        UnsupportedError: a norm, activation or gate is not where it is looked for.
    """
    norms, activations, products = norms_of(backend.hf), _activations(backend), _gated_products(backend)
    ran: set[nn.Module] = set()
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(_with_fixed_scale(backend, norm, ran)).remove)
        for activation in activations:
            stack.callback(activation.register_forward_hook(_as_if_linear(ran)).remove)
        for product in products:
            stack.callback(product.register_forward_pre_hook(_half).remove)
        with plain_tensors(), torch.no_grad():
            tokens = torch.arange(1, min(4, backend.info.d_vocab), device=backend.info.device)[None]
            backend.hf(input_ids=tokens, use_cache=False)
        if silent := [module for module in (*norms, *activations) if module not in ran]:
            raise _unknown(backend, f"a {type(silent[0]).__name__} that is not called")
        yield


def _activations(backend: LensBackend) -> list[nn.Module]:
    found: list[nn.Module] = []
    for layer, block in enumerate(backend.bridge.blocks):
        own = {id(module): module for module in block.modules() if elementwise_activation(module)}
        if len(own) != 1:
            raise _unknown(backend, f"{len(own)} activations in layer {layer}")
        found += own.values()
    return list(dict.fromkeys(found))


def _gated_products(backend: LensBackend) -> list[nn.Module]:
    """The projections that are given the products of gated MLPs."""
    found: list[nn.Module] = []
    for layer, block in enumerate(backend.bridge.blocks):
        for module in block.modules():
            names = {**dict(module.named_parameters(recurse=False)), **dict(module.named_children())}
            if any(name in names for name in _GATES):
                if not isinstance(names.get("down_proj"), nn.Module):
                    raise _unknown(backend, f"a {type(module).__name__} in layer {layer} whose products are inside it")
                found.append(names["down_proj"])
    return list(dict.fromkeys(found))


def _with_fixed_scale(backend: LensBackend, module: nn.Module, ran: set[nn.Module]) -> Callable[..., Tensor]:
    """A forward hook."""
    norm = Norm(module, backend.bridge.cfg.eps, lambda what: _unknown(backend, what))

    def hook(_: nn.Module, args: tuple, out: Tensor) -> Tensor:
        centre, gain = norm.parts(args[0], out)
        ran.add(module)
        return _moved(out, centre * gain if norm.bias is None else centre * gain + norm.bias)

    return hook


def _as_if_linear(ran: set[nn.Module]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        ran.add(module)
        x = args[0]
        slope = torch.where(x == 0, 0, out / x).detach()
        return _moved(out, x * slope)

    return hook


def _half(_: nn.Module, args: tuple) -> tuple:
    return (_moved(args[0], args[0] / 2), *args[1:])


def _moved(value: Tensor, like: Tensor) -> Tensor:
    """A tensor with one's value and the other's gradient."""
    return value.detach() + (like - like.detach()).to(value.dtype)


def _unknown(backend: LensBackend, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{backend.info.name} ({backend.info.family}) has {what}",
        expected="norms, activations and gated MLPs of the usual form",
        fix='Use gradients="plain"',
    )
