"""A model on several devices: where its blocks are, and where everything else is.

1. What the engine holds, residuals, recordings and what is made of them, is on one device: that of the model's first
   parameter. It is never asked of which block a tensor is.
2. What goes into a block, or its norms, is taken to the block's device first, and what comes out is taken back. With
   all blocks on one device nothing is copied.
3. Parameters that are elsewhere while the model does not run, on a disk or in the CPU's memory beside a GPU, cannot be
   read, and are an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError


class Placement:
    """Where the parts of a model are.

    Args:
        bridge: with the blocks.
        last: the number of the last block.
    """

    def __init__(self, bridge: Any, last: int):
        self._bridge, self._last = bridge, last
        self._devices: dict[int, torch.device] = {}

    def there(self, layer: int, tensor: Tensor) -> Tensor:
        """A tensor on the device of a block."""
        if layer not in self._devices:
            block = self._bridge.blocks[layer]
            module = getattr(block, "hub_module", block)
            self._devices[layer] = next(module.parameters()).device
        return tensor.to(self._devices[layer])

    def normalised(self, stream: Tensor) -> Tensor:
        """The final norm of a stream that leaves the last block ``[..., d_model]``, on the device of the stream."""
        # Not all norms have parameters that say where they are; where the last block is, it can be run.
        return self._bridge.ln_final(self.there(self._last, stream)).to(stream.device)


def check_placed(model: Any, name: str) -> None:
    """Whether all parameters are there to be read.

    Raises:
        UnsupportedError: some are kept elsewhere while the model does not run.
    """
    away = [key for key, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if away:
        raise UnsupportedError(
            f"{name} has {len(away)} parameters on a disk or in other memory while it does not run, such as {away[0]}",
            expected="parameters on devices that compute",
            fix='Give a device_map without "disk", "meta", or "cpu" beside GPUs; or load it with remote=True',
        )
