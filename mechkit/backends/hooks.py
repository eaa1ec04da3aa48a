"""Where sites are in a TransformerLens bridge, and how functions are hung there.

1. A site is one of TransformerLens' hook points; the table below is all there is to know of names.
2. Most of TransformerLens' attention modules compute scores and pattern at their hook points. Some families' only
   report there what was computed elsewhere, so that an edit would be shown and have no effect. Which it is, is tried
   out once a model: with every pattern set to the identity, z must be v.
3. Where it has none, the functions are put around the one softmax of four axes that the attention module calls: its
   argument is the scores, its result the pattern. That is tried out in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedError
from .protocol import ModelInfo
from .window import BY_HEAD, Key

Function: TypeAlias = "Callable[[Tensor], Tensor | None]"

# How far two ways of computing the same may be apart, relative to the largest value.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}

POINTS = {
    "z": "blocks.{}.attn.hook_z",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "pattern": "blocks.{}.attn.hook_pattern",
    "scores": "blocks.{}.attn.hook_attn_scores",
    "mlp": "blocks.{}.hook_mlp_out",
    "resid": "blocks.{}.hook_resid_pre",
    "embed": "embed.hook_out",
}
_HEADED = ("z", "q", "k", "v")
_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, Tensor.softmax)


class Hooks:
    """Hangs functions on a bridge's hook points.

    Args:
        bridge: the bridge, its model in evaluation mode.
        info: the model's dimensions.
    """

    def __init__(self, bridge: Any, info: ModelInfo):
        self._bridge, self._info = bridge, info
        self._points = bridge.hook_dict
        self._reporting: frozenset[int] | None = None  # layers whose points only report; None: not tried out yet

    def point(self, kind: str, layer: int) -> Any:
        """The TransformerLens hook point of a kind of site in a layer.

        Raises:
            UnsupportedError: this family has none.
        """
        if kind == "resid" and layer == self._info.n_layers:
            name = f"blocks.{layer - 1}.hook_resid_post"
        else:
            name = POINTS[kind].format(layer)
        if name not in self._points:
            raise self._none(kind, layer, f"a model that TransformerLens serves at {name}")
        return self._points[name]

    @contextmanager
    def hung(self, functions: Mapping[Key, Function]) -> Iterator[set[Key]]:
        """Hang functions up for the length of a ``with``; gives the set of the keys whose functions ran."""
        fired: set[Key] = set()
        tapped: dict[int, dict[str, Callable[[Tensor], Tensor]]] = {}
        # Trying a model out runs it: before anything is hung up.
        around = {key for key in functions if key[0] in BY_HEAD and self._only_reports(key[1])}
        with ExitStack() as stack:
            for key, function in functions.items():
                listener = self._listener(key, function, fired)
                if key in around:
                    tapped.setdefault(key[1], {})[key[0]] = listener
                else:
                    self._hang(key, listener, stack)
            for layer, listeners in tapped.items():
                stack.enter_context(_tapped(self._bridge.blocks[layer].attn, listeners))
            yield fired

    def recording(self, store: dict[Key, Tensor], keys: Sequence[Key]) -> dict[Key, Callable[[Tensor], None]]:
        """Functions to hang up that copy what passes into ``store``."""

        def keep(key: Key) -> Callable[[Tensor], None]:
            def function(tensor: Tensor) -> None:
                store[key] = tensor.clone()  # families add to their outputs in place

            return function

        return {key: keep(key) for key in keys}

    def _none(self, kind: str, layer: int, expected: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._info.name} ({self._info.family}) has no site of kind {kind!r} in layer {layer}", expected=expected
        )

    def _listener(self, key: Key, function: Function, fired: set[Key]) -> Callable[[Tensor], Tensor]:
        def run(tensor: Tensor) -> Tensor:
            fired.add(key)
            given = tensor.to(self._info.device)  # where all that the engine holds is, whichever block this is in
            apart = key[0] in _HEADED and tensor.ndim == 3  # [batch, pos, heads * d_head]
            result = function(given.unflatten(-1, (-1, self._info.d_head)) if apart else given)
            return tensor if result is None else result.reshape(tensor.shape).to(tensor.device)

        return run

    def _hang(self, key: Key, listener: Callable[[Tensor], Tensor], stack: ExitStack) -> None:
        point = self.point(*key)
        handle = point.add_hook(lambda tensor, hook: listener(tensor))

        def remove() -> None:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)

        stack.callback(remove)

    def _only_reports(self, layer: int) -> bool:
        if self._reporting is None:
            self._reporting = frozenset()  # what is tried out first
            try:
                self._reporting = frozenset(self._without_effect())
                dead = self._without_effect() if self._reporting else []
            except Exception:
                self._reporting = None
                raise
            if dead:
                self._reporting = None
                raise self._none("pattern", dead[0], "attention with one softmax over its keys")
        return layer in self._reporting

    @torch.inference_mode()
    def _without_effect(self) -> list[int]:
        """Layers in which setting the pattern to the identity does not make z equal to v."""
        info, seen = self._info, {}
        tokens = torch.arange(1, min(4, info.d_vocab), device=info.device)[None]
        length = tokens.shape[1]
        eye = torch.eye(length, dtype=torch.bool, device=info.device)

        def only_itself(scores: Tensor) -> Tensor:
            return torch.where(eye, scores, torch.finfo(scores.dtype).min)

        def identity(layer: int) -> Function:
            def function(pattern: Tensor) -> Tensor:
                seen["pattern", layer] = pattern.clone()
                return eye.to(pattern).expand_as(pattern).clone()

            return function

        functions: dict[Key, Function] = {}
        for layer in range(info.n_layers):
            functions |= {("scores", layer): only_itself, ("pattern", layer): identity(layer)}
            functions |= self.recording(seen, [("v", layer), ("z", layer)])
        with warnings.catch_warnings(), self.hung(functions):
            warnings.simplefilter("ignore")  # TransformerLens says which of its hook points only report
            self._bridge.original_model(input_ids=tokens, use_cache=False)
        return [layer for layer in range(info.n_layers) if not _took(seen, layer, eye)]


def _took(seen: dict, layer: int, eye: Tensor) -> bool:
    if not all((kind, layer) in seen for kind in ("pattern", "z", "v")):
        return False
    pattern, z, v = (seen[kind, layer].float() for kind in ("pattern", "z", "v"))
    v = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
    off = float((z - v).abs().max()) / max(1e-6, float(v.abs().max()))
    return off <= TOLERANCE.get(seen["z", layer].dtype, 1e-4) and not bool(pattern[..., ~eye].any())


@contextmanager
def _tapped(attention: torch.nn.Module, listeners: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Put listeners around the softmax of an attention module."""
    modes: list[_Softmax] = []
    sinks = getattr(getattr(attention, "hub_module", attention), "sinks", None)

    def enter(*_: Any) -> None:
        modes.append(_Softmax(listeners, sinks))
        modes[-1].__enter__()

    def leave(*_: Any) -> None:
        modes.pop().__exit__(None, None, None)

    handles = [
        attention.register_forward_pre_hook(enter),
        attention.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Softmax(TorchFunctionMode):
    """Calls listeners before and after every softmax of four axes.

    Where heads have sinks (gpt-oss), the softmax is given one more column, less the largest of its row. Listeners get
    the scores as they were before, and neither scores nor pattern have the sink.
    """

    def __init__(self, listeners: Mapping[str, Callable[[Tensor], Tensor]], sinks: Tensor | None):
        super().__init__()
        self._listeners, self._sinks = listeners, sinks

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in _SOFTMAX or args[0].ndim != 4:
            return func(*args, **(kwargs or {}))
        scores, rest, options = args[0], args[1:], kwargs or {}
        listen, look = (self._listeners.get(kind, _as_it_is) for kind in ("scores", "pattern"))
        if self._sinks is None:
            return look(func(listen(scores), *rest, **options))
        sinks = self._sinks.reshape(1, -1, 1, 1).expand_as(scores[..., -1:])
        scores = listen(scores[..., :-1] + (sinks - scores[..., -1:]))
        pattern = func(torch.cat([scores, sinks], -1), *rest, **options)
        return torch.cat([look(pattern[..., :-1]), pattern[..., -1:]], -1)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
