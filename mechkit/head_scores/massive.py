"""Massive dimensions: of the stream, those that are far larger than the others.

1. Run the prompts and divide each stream by its root mean square.
2. A dimension is massive in a prompt where its size is above ``tau`` at any position after any block.
3. Kept are those that are massive in at least half of the prompts.

Kang et al. 2025 (arXiv 2503.03321), who tell sink tokens by such dimensions of each model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.hooks import Function
from ..backends.lens import local_backend
from ..backends.window import Key
from ..errors import OptionError
from ..prompts import as_batch
from ..results import Table
from .passes import run_past
from .tables import about

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts


@dataclass(frozen=True, eq=False, repr=False)
class MassiveDims(Table):
    """Dimensions of the stream that are much larger than the others.

    Attributes:
        frame: a row a dimension, the largest first: ``dim``, ``score`` (the largest size over the root mean square, the
            mean over prompts), ``share`` (of prompts above ``tau``), ``layer`` (the stream in which it is largest, as
            of ``resid.<n>``, on most prompts), ``n`` (prompts).
        unit: of ``score``.
        meta: of every result.
        dims: the dimensions ``[k]``.
    """

    _things: ClassVar[str] = "dimensions"

    @property
    def dims(self) -> list[int]:
        """See the class."""
        return [int(one) for one in self.frame["dim"]]


def massive_dims(model: Model, data: Prompts, *, tau: float = 20.0) -> MassiveDims:
    """Dimensions of the stream that are massive in at least half of the prompts.

    Args:
        model: any.
        data: text, texts, ids ``[batch, pos]``, or a task (its clean prompts).
        tau: from how many times the root mean square on; a stream of ``d_model`` dimensions has none above
            ``sqrt(d_model)``, and thresholds of large models may be too high for small ones.

    Raises:
        OptionError: a ``tau`` that no dimension can reach.
    """
    started = time.perf_counter()
    if not 0 < tau < model.d_model**0.5:
        raise OptionError(
            f"tau = {tau!r} with d_model = {model.d_model}",
            expected=f"above 0 and below {model.d_model**0.5:.3g}, the most that one dimension can be",
        )
    tokens, lengths = as_batch(model, data)
    sizes, layers = _largest(model, tokens, lengths)
    shares = (sizes > tau).double().mean(0)
    dims = (shares >= 0.5).nonzero()[:, 0]
    dims = dims[sizes[:, dims].mean(0).argsort(descending=True)]
    frame = pd.DataFrame(
        {
            "dim": dims.numpy(),
            "score": sizes[:, dims].double().mean(0).numpy(),
            "share": shares[dims].numpy(),
            "layer": layers[:, dims].mode(0).values.numpy(),
            "n": len(tokens),
        }
    )
    return MassiveDims(frame, "times the root mean square", about(model, data, "massive_dims", started, tau=tau))


@where_the_model_is
def _largest(model: Model, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The largest size of each dimension over the root mean square, and the stream that has it ``[n, d_model]``."""
    backend = local_backend(model, "Massive dimensions of")
    info = backend.info
    sizes = torch.zeros(len(tokens), info.d_model)
    layers = torch.zeros(len(tokens), info.d_model, dtype=torch.long)

    def listen(rows: Tensor) -> dict[Key, Function]:
        inside = torch.arange(int(lengths[rows].max()))[None] < lengths[rows, None]

        def stream(layer: int) -> Callable[[Tensor], None]:
            def function(resid: Tensor) -> None:
                resid = resid.float()
                scale = resid.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
                found = (resid.abs() / scale * inside[..., None].to(resid)).amax(1).cpu()
                larger = found > sizes[rows]
                layers[rows] = torch.where(larger, layer, layers[rows])
                sizes[rows] = torch.where(larger, found, sizes[rows])

            return function

        return {("resid", layer): stream(layer) for layer in range(info.n_layers + 1)}

    run_past(backend, tokens, lengths, 8 * info.d_model * int(lengths.max()), listen)
    return sizes, layers
