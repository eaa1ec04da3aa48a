"""Normalisation modules: where they are, and which part of what they do is linear.

1. A norm is recognised by its class's name; of those inside each other, the outermost counts.
2. What it computes is told from its values: with or without the mean taken off, with weights kept as they are or less 1
   (Gemma). One that is neither LayerNorm nor RMSNorm is refused.
3. Given the scale that a norm took from an activation, what is left is linear: take the mean off, times the gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError

_OFF = 1e-3  # of a norm's values from what it is taken to compute, relative to the largest


def norms_of(root: nn.Module) -> list[nn.Module]:
    """Every norm under a module, of those inside each other the outermost."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if "norm" in type(child).__name__.lower():
                found.append(child)
            else:
                walk(child)

    walk(root)
    return list(dict.fromkeys(found))


class Norm:
    """What a normalisation module computes.

    Args:
        module: the module.
        epsilon: where the module does not tell its own.
        refuse: makes the error for a module that is no norm of a known kind.
    """

    def __init__(self, module: Any, epsilon: float, refuse: Callable[[str], UnsupportedError]):
        # Own attributes only: a bridge looks for others in what it wraps, and in vain.
        own = [getattr(module, name, None) for name in ("eps", "variance_epsilon")]
        self.module, self._refuse = module, refuse
        self._epsilon = next(float(one) for one in (*own, epsilon) if one is not None)
        self._known: tuple[bool, float] | None = None

    @property
    def bias(self) -> Tensor | None:
        """What is added at the end."""
        return getattr(self.module, "bias", None)

    @property
    def centres(self) -> bool:
        """Whether the mean is taken off; known once ``parts`` was called."""
        assert self._known is not None
        return self._known[0]

    @property
    def gain(self) -> Tensor | None:
        """What is multiplied by once the scale is taken out ``[d]``; known once ``parts`` was called."""
        assert self._known is not None
        weight = getattr(self.module, "weight", None)
        return None if weight is None else (weight.float() + self._known[1]).detach()

    def parts(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """An activation with its mean off, and the gain, whose product is what comes out, the bias apart.

        Args:
            x: what goes in ``[..., d]``.
            out: what comes out.

        Returns:
            Both in float32, ``[..., d]``.

        Raises:
            UnsupportedError: this is neither LayerNorm nor RMSNorm.
        """
        if self._known is None:
            self._known = self._learned(x, out)
        return self._parts(x, *self._known)

    def centred(self, x: Tensor) -> Tensor:
        """An activation with its mean off where this norm takes it off; known once ``parts`` was called."""
        return x - x.mean(-1, keepdim=True) if self.centres else x

    def _parts(self, x: Tensor, centred: bool, offset: float) -> tuple[Tensor, Tensor]:
        x = x.float()
        centre = x - x.mean(-1, keepdim=True) if centred else x
        gain = (centre.square().mean(-1, keepdim=True) + self._epsilon).rsqrt()
        weight = getattr(self.module, "weight", None)
        return centre, (gain.expand_as(x) if weight is None else gain * (weight.float() + offset)).detach()

    def _learned(self, x: Tensor, out: Tensor) -> tuple[bool, float]:
        for centred in (True, False) if isinstance(self.module, nn.LayerNorm) else (False, True):
            for offset in (0.0, 1.0):  # Gemma's weights are kept less 1
                centre, gain = self._parts(x, centred, offset)
                value = centre * gain if self.bias is None else centre * gain + self.bias
                off = max(_OFF, 4 * torch.finfo(out.dtype).eps)
                if float((value - out).abs().max()) <= off * max(1.0, float(out.abs().max())):
                    return centred, offset
        raise self._refuse(f"a {type(self.module).__name__} that is no LayerNorm and no RMSNorm")


def elementwise_activation(module: nn.Module) -> bool:
    """True of modules that do the same to every number by itself."""
    known = type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")
    of_axes = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d, nn.GLU)
    return (known or type(module).__name__ == "BloomGelu") and not isinstance(module, of_axes)


def default_epsilon(config: Any) -> float:
    """The epsilon that a model's configuration gives, 1e-5 where it gives none."""
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    return next((float(getattr(config, name)) for name in names if getattr(config, name, None) is not None), 1e-5)
