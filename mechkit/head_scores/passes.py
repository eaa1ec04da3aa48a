"""Prompts run past listeners: what a layer puts out is reduced as it passes, and never kept for all layers at once.

1. Prompts run a batch at a time, cut to the longest of the batch; as many as half of the free memory holds.
2. ``run_past`` hangs the caller's functions on the sites of a batch. ``head_vectors`` takes what heads have at some
   positions; it asks the backend for recordings, which every backend gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.hooks import Function
from ..backends.lens import LensBackend
from ..backends.memory import rows_at_once
from ..backends.protocol import ModelInfo, Read
from ..backends.window import Key
from ..errors import UnsupportedError
from ..sites import Site

if TYPE_CHECKING:
    from ..model import Model

_BYTES = 4  # of a number


def batches(info: ModelInfo, lengths: Tensor, numbers: int) -> Iterator[Tensor]:
    """Which prompts to run together ``[rows]``, the longest first, so that a batch's are of about one length.

    Args:
        info: of the model that runs them.
        lengths: tokens of each prompt ``[n]``.
        numbers: how many numbers are held of one of the longest prompt.
    """
    device = torch.device(info.device)
    order = lengths.argsort(descending=True, stable=True)
    yield from order.split(rows_at_once(_BYTES * numbers, int(lengths.max()), device))


def pattern_numbers(info: ModelInfo, lengths: Tensor) -> int:
    """Numbers that are held while one layer's patterns of one prompt pass: scores, pattern, and a copy of it."""
    return 3 * info.n_heads * int(lengths.max()) ** 2


def run_past(
    backend: LensBackend, tokens: Tensor, lengths: Tensor, numbers: int, listen: Callable[[Tensor], Mapping]
) -> None:
    """Run prompts with functions on their sites.

    Args:
        backend: that runs them.
        tokens, lengths: ``[n, pos]`` padded at the right, and ``[n]``.
        numbers: see ``batches``.
        listen: is given which prompts run next ``[rows]``, and gives functions by (kind, layer). A function is given
            the site of these prompts, as of ``backends.protocol``, and gives nothing back, or what takes its place.

    Raises:
        UnsupportedError: the family computes one of the sites elsewhere.
    """
    for rows in batches(backend.info, lengths, numbers):
        functions: Mapping[Key, Function] = listen(rows)
        some = tokens[rows, : int(lengths[rows].max())].to(backend.info.device)
        with torch.inference_mode(), backend.hooks(functions) as fired:
            backend.body(some, use_cache=False)
        if silent := sorted(set(functions) - fired):
            kind, layer = silent[0]
            raise UnsupportedError(f"{backend.info.name} never ran a site of kind {kind!r} in layer {layer}")


@where_the_model_is
def head_vectors(model: Model, tokens: Tensor, lengths: Tensor, positions: Tensor, kind: str = "z") -> Tensor:
    """What heads have at some positions of prompts, in float32 ``[n, m, layers, heads, d_head]``.

    Args:
        model: any.
        tokens, lengths: ``[n, pos]`` padded at the right, and ``[n]``.
        positions: ``[n, m]``; -1 where a prompt has none, which gives NaN.
        kind: ``"z"``, ``"q"``, ``"k"`` or ``"v"``; of these two, a group's for each of its heads.
    """
    info = model.info
    record = [Site(layer, 0, kind) for layer in range(info.n_layers)]
    out = torch.full((*positions.shape, info.n_layers, info.n_heads, info.d_head), torch.nan)
    held = 2 * info.n_layers * info.n_heads * info.d_head * int(lengths.max())
    for rows in batches(info, lengths, held):
        read = Read(lengths[rows] - 1, torch.zeros(len(rows), 1, dtype=torch.long))
        done = model.backend.forward(tokens[rows, : int(lengths[rows].max())], (), record, read)
        there = positions[rows] >= 0
        which, slot = there.nonzero(as_tuple=True)
        where = positions[rows][there]
        for layer in range(info.n_layers):
            found = done.recorded[kind, layer][which, where].float().cpu()  # [there, heads or groups, d_head]
            out[rows[which], slot, layer] = found.repeat_interleave(info.n_heads // found.shape[1], 1)
    return out
