"""A Hub model as it is, with what the engine asks of TransformerLens' bridge, from the names of an ``Anatomy``.

Where a model runs that mechkit did not load, there is no TransformerLens. The same engine runs there: this has a
bridge's blocks, norms and weights under the names that the engine uses, and sites are the edges of the Hub's modules.

1. A site is what goes into a module or comes out of it; of a fused projection, those of its numbers that are the
   site's.
2. Scores and patterns are the argument and the result of the one softmax that the attention module calls, which it
   calls with eager attention alone; see ``hooks``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedError
from .anatomy import PARTS, Anatomy, Place
from .hooks import Hooks
from .lens import LensBackend


def plain_backend(hf: Any, parts: Anatomy, name: str) -> LensBackend:
    """The engine on a Hub model, inside ``library.eager``.

    Args:
        hf: a causal language model; it is left as it is.
        parts: where its parts are.
        name: what to call it.

    Raises:
        UnsupportedError: a part is not there.
    """
    hf.eval()
    return LensBackend(PlainBridge(hf, parts), name, PlainHooks)


class PlainBridge:
    """What the engine asks of a bridge.

    Attributes:
        original_model: the Hub's module.
        cfg: dimensions.
        blocks: the blocks, each with its norms, attention and MLP.
        ln_final: the norm before the unembedding.
        parts: the names.

    Raises:
        UnsupportedError: a part is not there.
    """

    def __init__(self, hf: Any, parts: Anatomy):
        self.original_model, self.parts = hf, parts
        self.cfg = SimpleNamespace(**parts.cfg)
        self.hook_dict: dict[str, Any] = {}  # it has no hook points
        self._modules = dict(hf.named_modules())
        self.blocks = [_Block(self, layer) for layer in range(self.cfg.n_layers)]
        self.ln_final = self.module("ln_final")

    def module(self, part: str, layer: int = 0) -> nn.Module:
        """A part of a layer."""
        return self.named(self.parts.modules[part], layer)

    def named(self, name: str, layer: int) -> nn.Module:
        """The module of a name, ``{}`` for the layer.

        Raises:
            UnsupportedError: there is none.
        """
        module = self._modules.get(name.format(layer))
        if module is None:
            raise UnsupportedError(
                f"{type(self.original_model).__name__} has no module {name.format(layer)!r} where it runs",
                expected="layers that are all alike, of the model that the configuration describes",
            )
        return module

    def rows(self, kind: str, layer: int) -> Tensor:
        """The rows of the matrix behind a site: ``[numbers, d_model]``, of z ``[heads * d_head, d_model]``."""
        place = self.parts.points[kind]
        weight: Any = self.named(place.module, layer).weight
        across = isinstance(self.named(place.module, layer), Conv1D)  # its matrix is [in, out]
        return _of(weight if across == (place.side == "in") else weight.T, place.numbers, 0)

    def bias(self, kind: str, layer: int) -> Tensor | None:
        """What is added behind a site: ``[numbers]``, of z ``[d_model]``."""
        place = self.parts.points[kind]
        bias: Any = getattr(self.named(place.module, layer), "bias", None)
        return None if bias is None else _of(bias, place.numbers, 0)


class _Block:
    """A block of the Hub's, callable as it is; the names of its parts are a bridge's."""

    def __init__(self, bridge: PlainBridge, layer: int):
        self.hub_module: Any = bridge.module("block", layer)
        for part in PARTS:
            # OPT has no module for its MLP; the bridge then takes the whole block.
            if part in bridge.parts.modules and bridge.parts.modules[part] != bridge.parts.modules["block"]:
                setattr(self, part, bridge.module(part, layer))
        self.attn = _Attention(bridge, layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.hub_module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("register_") or name == "modules":
            return getattr(self.hub_module, name)
        raise AttributeError(name)


class _Attention:
    """An attention module of the Hub's with its matrices by head, as a bridge gives them."""

    def __init__(self, bridge: PlainBridge, layer: int):
        self.hub_module: Any = bridge.module("attn", layer)
        self._bridge, self._layer = bridge, layer
        named = bridge.parts.modules
        self._modules = {kind: bridge.module(kind, layer) for kind in ("q", "k", "v", "o") if kind in named}
        for norm in ("q_norm", "k_norm"):
            if norm in named:
                setattr(self, norm, bridge.module(norm, layer))

    def __getattr__(self, name: str) -> Any:
        if name == "W_O":
            return self._bridge.rows("z", self._layer).unflatten(0, (-1, self._bridge.cfg.d_head))
        if name in ("W_Q", "W_K", "W_V"):
            rows = self._bridge.rows(name[-1].lower(), self._layer)  # [numbers, d_model]
            return rows.unflatten(0, (-1, self._bridge.cfg.d_head)).mT
        if name == "b_O":
            return self._bridge.bias("z", self._layer)
        if name in ("b_Q", "b_K", "b_V"):
            bias = self._bridge.bias(name[-1].lower(), self._layer)
            return None if bias is None else bias.unflatten(0, (-1, self._bridge.cfg.d_head))
        if name.startswith("register_"):
            return getattr(self.hub_module, name)
        raise AttributeError(name)


class PlainHooks(Hooks):
    """Hangs functions on the edges of the Hub's modules."""

    def _hang(self, key: tuple[str, int], listener: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
        kind, layer = key
        if kind == "resid" and layer == self._info.n_layers:
            module, place = self._bridge.module("block", layer - 1), Place("", "out")
        else:
            if kind not in self._bridge.parts.points:
                raise self._none(kind, layer, "one that TransformerLens serves")
            place = self._bridge.parts.points[kind]
            module = self._bridge.named(place.module, max(layer, 0))
        shape: list[torch.Size] = []
        if kind == "mlp":  # OPT lays prompts and positions on one axis there
            block = self._bridge.module("block", layer)
            stack.callback(block.register_forward_pre_hook(_noting(shape), with_kwargs=True).remove)
        change = changed_at(listener, place, shape)
        if place.side == "in":
            stack.callback(module.register_forward_pre_hook(_going_in(change), with_kwargs=True).remove)
        else:
            stack.callback(module.register_forward_hook(_coming_out(change)).remove)

    def _only_reports(self, layer: int) -> bool:
        """Scores and patterns are always taken around the softmax; that they are what it says is tried out once."""
        if self._reporting is None:
            self._reporting = frozenset(range(self._info.n_layers))
            if dead := self._without_effect():
                self._reporting = None
                raise self._none("pattern", dead[0], "attention with one softmax over its keys")
        return layer in self._reporting


def changed_at(
    listener: Callable[[Tensor], Tensor], place: Place, shape: Sequence[torch.Size] = ()
) -> Callable[[Tensor], Tensor]:
    """What a module's tensor becomes when a listener is given the site in it.

    Args:
        listener: is given the site ``[batch, pos, ...]``, and gives what takes its place.
        place: where the site is in the tensor.
        shape: of the stream, where it was noted: ``[batch, pos, d_model]``.
    """

    def function(tensor: Tensor) -> Tensor:
        if shape and tensor.ndim == 2:
            new = on_site(tensor.unflatten(0, tuple(shape[-1][:-1])))
            return new.flatten(0, 1)
        return on_site(tensor)

    def on_site(tensor: Tensor) -> Tensor:
        whole, numbers = tensor, place.numbers
        site = whole if numbers is None else _of(whole, numbers, -1)
        site = site if place.times == 1 else site * place.times
        new = listener(site)
        if new is site:
            return tensor
        new = new if place.times == 1 else new / place.times
        return new if numbers is None else _put(whole, numbers, new)

    return function


def _of(tensor: Tensor, numbers: tuple[int, ...] | None, axis: int) -> Tensor:
    """Some of an axis's numbers; a view where they stand together."""
    if numbers is None:
        return tensor
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return tensor.narrow(axis, numbers[0], len(numbers))
    return tensor.index_select(axis, _indices(numbers, tensor.shape[axis], tensor.device)[0])


def _put(whole: Tensor, numbers: tuple[int, ...], new: Tensor) -> Tensor:
    """A tensor with some numbers of its last axis replaced, made of parts so that autograd and CD-T follow."""
    _, rest, order = _indices(numbers, whole.shape[-1], whole.device)
    return torch.cat([whole.index_select(-1, rest), new], -1).index_select(-1, order)


@lru_cache(maxsize=64)  # at every call of every layer, the same few
def _indices(numbers: tuple[int, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Some numbers of an axis, the others, and where each number is when the others come first."""
    with torch.inference_mode(False):  # a backward pass may want them
        these = torch.tensor(numbers)
        others = torch.ones(width, dtype=torch.bool)
        others[these] = False
        rest = others.nonzero()[:, 0]
        order = torch.cat([rest, these]).argsort()
        return these.to(device), rest.to(device), order.to(device)


def _noting(shape: list[torch.Size]) -> Callable[..., None]:
    def hook(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        shape[:] = [(args[0] if args else kwargs["hidden_states"]).shape]

    return hook


def _going_in(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


def _coming_out(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_: Any, __: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return hook
