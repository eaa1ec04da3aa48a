"""The branches of a block, each by itself: what a head reads and writes, what an MLP makes of a stream.

A block adds two branches to the stream, attention and MLP. Which modules they are made of differs by family; what is
needed of them does not:

1. What q, k and v are of a stream x: ``norm(x) W + b``, with the norm in front of attention (none in OLMo 2).
2. What heads write to the stream: ``after(sum of z W_O + b_O)``, with the norm behind attention (Gemma 2, Gemma 3,
   OLMo 2) and Granite's multiplier.
3. What a block makes of a stream when its attention is taken as known: the block's own code, with a stand-in for its
   attention module. Positions are then independent of each other, and a block may be run on any of them. The MLP's
   part by itself is what such a run gives at the MLP's site.
4. All of this is compared with a run of the model, once; a family for which it does not hold is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..sites import Site
from .hooks import TOLERANCE

if TYPE_CHECKING:
    from .lens import LensBackend


class Enough(Exception):  # noqa: N818, it is no error
    """Ends a call of a block whose rest is not needed."""


class Branches:
    """The parts of every block of a model.

    Args:
        backend: whose bridge has the blocks.

    Attributes:
        parallel: the MLP of a layer does not read what the heads of the layer write.

    Raises:
        UnsupportedError: what they give together is not what the model gives.
    """

    def __init__(self, backend: LensBackend):
        self._backend = backend
        self._blocks = backend.bridge.blocks
        self._times = float(getattr(backend.hf.config, "residual_multiplier", 1.0))  # Granite's
        self._calls: list[dict[str, Any]] = []  # what each block is given besides the stream
        self._answers: dict[int, Any] = {}  # what each attention module gives besides its output
        self._adds_stream = False  # the attention module adds the stream to its output itself
        self.parallel = False
        self._check()

    # -- attention --------------------------------------------------------------------------------------------

    def norm(self, layer: int, stream: Tensor) -> Tensor:
        """What the projections of a layer are given for a stream ``[..., d_model]``."""
        if not hasattr(self._blocks[layer], "ln1"):
            return stream
        return self._blocks[layer].ln1(self._backend.placed.there(layer, stream)).to(stream.device)

    def weight(self, kind: str, layer: int) -> Tensor:
        """W_Q, W_K or W_V ``[heads or groups, d_model, d_head]``; of ``"o"``, W_O ``[heads, d_head, d_model]``."""
        return getattr(self._blocks[layer].attn, f"W_{kind.upper()}").to(self._backend.info.device)

    def bias(self, kind: str, layer: int) -> Tensor | None:
        """The bias that goes with ``weight``: ``[heads or groups, d_head]``; of ``"o"``, ``[d_model]``."""
        bias = getattr(self._blocks[layer].attn, f"b_{kind.upper()}")
        return None if bias is None else bias.to(self._backend.info.device)

    def project(self, kind: str, layer: int, normed: Tensor, heads: list[int] | None = None) -> Tensor:
        """q, k or v of some heads or groups ``[..., heads, d_head]`` of what ``norm`` gives ``[..., d_model]``."""
        weight, bias = self.weight(kind, layer), self.bias(kind, layer)
        if heads is not None:
            weight, bias = weight[heads], None if bias is None else bias[heads]
        out = torch.einsum("...d,hde->...he", normed, weight)
        return out if bias is None else out + bias

    def attention_out(self, layer: int, z: Tensor) -> Tensor:
        """What the attention module puts out ``[..., d_model]`` for z ``[..., heads, d_head]``."""
        bias = self.bias("o", layer)
        return self.heads_out(layer, z) if bias is None else self.heads_out(layer, z) + bias

    def heads_out(self, layer: int, z: Tensor) -> Tensor:
        """z W_O, summed over heads, without the bias: what a change of z changes ``[..., d_model]``."""
        return torch.nn.functional.linear(z.flatten(-2), self.weight("o", layer).flatten(0, 1).T)

    def written(self, layer: int, attention_out: Tensor) -> Tensor:
        """What a block adds to the stream for what its attention module puts out ``[..., d_model]``."""
        block = self._blocks[layer]
        if not hasattr(block, "ln1_post"):
            return attention_out * self._times
        return block.ln1_post(self._backend.placed.there(layer, attention_out)).to(attention_out.device) * self._times

    @property
    def norm_after(self) -> bool:
        """True where a norm stands between what heads put out and the stream, so that they do not add up exactly."""
        return hasattr(self._blocks[0], "ln1_post")

    # -- blocks -----------------------------------------------------------------------------------------------

    def block(self, layer: int, stream: Tensor, attention_out: Tensor) -> Tensor:
        """The stream that leaves a block, its attention taken as known: ``[rows, pos, d_model]``, any positions."""
        with self._known(layer, stream, attention_out):
            out = self._blocks[layer](self._backend.placed.there(layer, stream), **self._calls[layer])
        return (out[0] if isinstance(out, tuple) else out).to(stream.device)

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        """What the MLP of a layer adds to the stream for the stream that it reads: ``[rows, pos, d_model]``."""
        found: list[Tensor] = []

        def take(value: Tensor) -> None:
            found.append(value)
            raise Enough

        # Attention that puts out nothing: the MLP reads the stream as it is, before attention or after it.
        none = self._known(layer, stream, torch.zeros_like(stream))
        with self._backend.hooks({("mlp", layer): take}), none, suppress(Enough):
            self._blocks[layer](self._backend.placed.there(layer, stream), **self._calls[layer])
        return found[0].view(stream.shape)

    # -- how ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _known(self, layer: int, stream: Tensor, attention_out: Tensor) -> Iterator[None]:
        """While active, the attention module of a layer gives this, whatever it is given."""
        attention = self._blocks[layer].attn
        module = getattr(attention, "hub_module", attention)
        rest = self._answers[layer]
        if self._adds_stream:  # Bloom's
            attention_out = stream + attention_out
        attention_out = self._backend.placed.there(layer, attention_out)
        # In the instance's own dictionary: a bridge passes attributes that are set on it on to the Hub's module.
        own, before = vars(module), vars(module).get("forward")
        own["forward"] = lambda *_, **__: attention_out if rest is None else (attention_out, *rest)
        try:
            yield
        finally:
            if before is None:
                del own["forward"]
            else:  # accelerate's, of a model on several devices
                own["forward"] = before

    def _check(self) -> None:
        """Run a few tokens and compare.

        Raises:
            UnsupportedError: the branches do not give what the model gives.
        """
        info = self._backend.info
        tokens = torch.arange(1, min(6, info.d_vocab), device=info.device)[None]
        kinds = ("q", "k", "v", "z", "mlp")
        record = [Site(layer, None if kind == "mlp" else 0, kind) for layer in range(info.n_layers) for kind in kinds]
        record += [Site(layer, None, "resid") for layer in range(info.n_layers + 1)]
        with torch.inference_mode():
            with self._noting() as first_out:
                seen = self._backend.forward(tokens, record=record).recorded
            out = self.attention_out(0, seen["z", 0])
            self._adds_stream = _off(out + seen["resid", 0], first_out[0]) < _off(out, first_out[0])
            off, kind, layer = max(self._differences(seen))
        if off > TOLERANCE.get(seen["z", 0].dtype, 1e-4):
            raise UnsupportedError(
                f"The {kind} of layer {layer} of {info.name} ({info.family}) is not what mechkit takes it to be "
                f"(off by {off:.2g})",
                fix="Activation patching (mk.patch) makes no such assumption",
            )

    def _differences(self, seen: Mapping[tuple[str, int], Tensor]) -> Iterator[tuple[float, str, int]]:
        """How far each branch is off, relative to the size of what it should be."""
        for layer in range(self._backend.info.n_layers):
            stream, after = seen["resid", layer], seen["resid", layer + 1]
            normed = self.norm(layer, stream)
            for kind in ("q", "k", "v"):
                yield _off(self.project(kind, layer, normed), seen[kind, layer]), kind, layer
            out = self.attention_out(layer, seen["z", layer])
            wrote = self.written(layer, out)
            yield _off(stream + wrote + seen["mlp", layer], after), "stream", layer
            yield _off(self.block(layer, stream, out), after), "block", layer
            some = [[3, 1]] if stream.shape[1] > 3 else [[0]]  # positions by themselves, and in another order
            yield _off(self.block(layer, stream[0, some], out[0, some]), after[0, some]), "block", layer
            offs = [_off(self.mlp(layer, read), seen["mlp", layer]) for read in (stream + wrote, stream)]
            if layer == 0:
                self.parallel = offs[1] < offs[0]
            yield offs[int(self.parallel)], "mlp", layer

    @contextmanager
    def _noting(self) -> Iterator[list[Tensor]]:
        """While a run is on, note what each block is given, and what its attention gives besides its output.

        Gives the output of the first attention module.
        """
        handles: list[Any] = []
        first: list[Tensor] = []

        def given(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            self._calls.append({key: value for key, value in kwargs.items() if key != "hidden_states"})

        def answered(layer: int) -> Any:
            def function(_: Any, __: Any, out: Any) -> None:
                self._answers[layer] = tuple(None for _ in out[1:]) if isinstance(out, tuple) else None
                if layer == 0:
                    first.append((out[0] if isinstance(out, tuple) else out).clone().to(self._backend.info.device))

            return function

        for layer, block in enumerate(self._blocks):
            handles += [
                block.register_forward_pre_hook(given, with_kwargs=True),
                block.attn.register_forward_hook(answered(layer)),
            ]
        try:
            yield first
        finally:
            for handle in handles:
                handle.remove()


def _off(ours: Tensor, own: Tensor) -> float:
    return float((ours - own).abs().max()) / max(1.0, float(own.abs().max()))
