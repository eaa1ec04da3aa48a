"""First-order effects of every edge, from what sources write and the gradients of a run.

The effect of an edge u -> t is (what u writes in the source run - what u writes in the base run) . dL/d(what t reads),
summed over positions. Nothing is ever as wide as [batch, pos, head, d_model] of all heads and slots:

1. What a head writes in addition is ``dz W_O``, times Granite's multiplier. With a norm behind attention (Gemma 2,
   Gemma 3, OLMo 2) it is the linear part of that, at the base run, so that heads still add up.
2. A slot's gradient is ``J^T W g``: g the gradient at q, k or v, W its projection, J the Jacobian of the norm in front
   of attention at the stream of the run whose gradients these are.
3. An MLP's gradient is what is left of the gradient of the stream entering its block when that of the stream leaving it
   and those of the block's slots are taken off. In half precision, in which too little would be left of the
   difference, it is the MLP's own backward pass.
4. The logits' gradient is that of the stream leaving the last block.
5. A few prompts and positions at a time, targets go by layer, and each layer's meet every source before them in one
   product of matrices ``[sources, pos * d_model] [pos * d_model, targets]`` a prompt.

Syed et al. 2023 (arXiv 2310.10348), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..graph import SLOTS
from .branches import Branches
from .gradients import Gradients, Pair, plain_tensors, without_parameters
from .memory import TOKENS_AT_ONCE, fitting

if TYPE_CHECKING:
    from .lens import LensBackend

_HALF = (torch.float16, torch.bfloat16)
_SHARE = 48  # of the tokens that a device runs at once, that are multiplied at once


def needed(backend: LensBackend) -> list[tuple[str, int]]:
    """What ``products`` needs to be kept besides streams, q, k and v."""
    half = next(backend.hf.parameters()).dtype in _HALF
    return [("z", layer) for layer in range(backend.info.n_layers)] if half else []


def products(
    pair: Pair, rows: Tensor, found: Gradients, by_query_head: Mapping[tuple[str, int], Tensor] | None = None
) -> Tensor:
    """First-order effects ``[rows, sources, targets]``, in the order of ``Graph``; only where there is an edge.

    Args:
        pair: whose runs differ.
        rows: the prompt of each row.
        found: the gradients of each row.
        by_query_head: gradients of k and v for each query head ``[rows, pos, heads, d_head]``; then these are targets.
    """
    backend = pair.backend
    info, rows = backend.info, rows.to(found.values.device)
    at = {**found.at, **(by_query_head or {})}
    per_layer = sum(at[kind, 0].shape[2] for kind in SLOTS) + 1
    n_sources, n_targets = 1 + info.n_layers * (info.n_heads + 1), info.n_layers * per_layer + 1
    scores = torch.zeros(len(rows), n_sources, n_targets, device=rows.device)
    with plain_tensors(), torch.no_grad(), without_parameters(backend.hf):
        for some, where in _parts(pair, len(rows), n_sources + 4 * per_layer):
            first = 0
            for before, gradients in _layers(pair, rows[some], found, at, some, where):
                wide = slice(first, first + len(gradients))
                scores[some, : len(before), wide] += before.transpose(0, 1).flatten(2) @ (
                    gradients.transpose(0, 1).flatten(2).mT
                )
                first += len(gradients)
    return scores


def _layers(
    pair: Pair, rows: Tensor, found: Gradients, at: Mapping[tuple[str, int], Tensor], some: slice, where: slice
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each layer, what the sources before it write and its targets' gradients ``[.., rows, pos, d_model]``.

    Targets come one MLP late: that of the layer before, then the slots of this one. The MLP meets one source more than
    it reads, and heads beside it in a parallel block; these are no edges.
    """
    branches, n_layers = pair.backend.branches, pair.backend.info.n_layers

    def gradient(kind: str, layer: int) -> Tensor:
        return at[kind, layer][some, where]

    mlp = gradient("resid", 0)[:0]
    for layer, written in enumerate(sources_before(pair, rows, where)):
        after = gradient("resid", min(layer + 1, n_layers))
        if layer == n_layers:
            yield written, torch.stack([*mlp, after])
            return
        stream = found.seen["resid", layer][some, where]
        slots = slot_gradients(branches, layer, stream, {kind: gradient(kind, layer) for kind in SLOTS})
        yield written, torch.cat([mlp, slots]) if layer else slots
        if slots.dtype in _HALF:
            mlp = _mlp_gradient(branches, layer, stream, found.seen["z", layer][some, where], after)[None]
        else:
            mlp = (gradient("resid", layer) - after - slots.sum(0))[None]


def sources_before(pair: Pair, rows: Tensor, where: slice = slice(None)) -> Iterator[Tensor]:
    """What the sources before each layer, and before the logits, write in addition ``[sources, rows, pos, d_model]``.

    Args:
        pair: whose runs differ.
        rows: the prompt of each row.
        where: positions.
    """
    branches, info = pair.backend.branches, pair.backend.info
    start = pair.delta["resid", 0][rows, where]
    written = start.new_empty(1 + info.n_layers * (info.n_heads + 1), *start.shape)
    written[0] = start
    yield written[:1]
    for layer in range(info.n_layers):
        mlp = (layer + 1) * (info.n_heads + 1)
        base = pair.base["z", layer][rows, where] if branches.norm_after else None
        head_writes(branches, layer, pair.delta["z", layer][rows, where], base, out=written[mlp - info.n_heads : mlp])
        written[mlp] = pair.delta["mlp", layer][rows, where]
        yield written[: mlp + 1]


def slot_gradients(branches: Branches, layer: int, stream: Tensor, gradients: Mapping[str, Tensor]) -> Tensor:
    """Gradients of the stream as each slot of a layer reads it ``[slots, rows, pos, d_model]``.

    Args:
        branches: of the model.
        layer: whose slots.
        stream: that enters the block ``[rows, pos, d_model]``.
        gradients: of q, k, v ``[rows, pos, heads, d_head]``; of k and v by groups, or by query heads.
    """
    normed = [_through(branches.weight(kind, layer), grad) for kind, grad in gradients.items()]
    cotangents = torch.cat(normed)
    with torch.enable_grad():
        leaf = stream.detach().requires_grad_()
        out = branches.norm(layer, leaf)
        if out is leaf:
            return cotangents
        return torch.autograd.grad(out, leaf, cotangents, is_grads_batched=True)[0]


def head_writes(branches: Branches, layer: int, dz: Tensor, base: Tensor | None, out: Tensor) -> None:
    """What each head writes to the stream for a change of its z ``[rows, pos, heads, d_head]``.

    Args:
        branches: of the model.
        layer: whose heads.
        dz: the change.
        base: z of the base run, where a norm follows; else None.
        out: where it goes ``[heads, rows, pos, d_model]``.
    """
    own = torch.einsum("bphe,hed->hbpd", dz, branches.weight("o", layer))
    if base is None:
        out.copy_(branches.written(layer, own))
        return
    at, written = branches.attention_out(layer, base), partial(branches.written, layer)
    out.copy_(torch.vmap(lambda change: torch.func.jvp(written, (at,), (change,))[1])(own))


def _through(weight: Tensor, gradient: Tensor) -> Tensor:
    """Gradients of what is projected ``[heads, rows, pos, d_model]``, for those of the projections."""
    per_head = gradient.shape[2] // len(weight)
    weight = weight.repeat_interleave(per_head, 0) if per_head > 1 else weight
    return torch.einsum("bphe,hde->hbpd", gradient, weight)


def _mlp_gradient(branches: Branches, layer: int, stream: Tensor, z: Tensor, after: Tensor) -> Tensor:
    wrote = 0 if branches.parallel else branches.written(layer, branches.attention_out(layer, z))
    with torch.enable_grad():
        leaf = (stream + wrote).detach().requires_grad_()
        return torch.autograd.grad(branches.mlp(layer, leaf), leaf, after)[0]


def _parts(pair: Pair, rows: int, vectors: int) -> Iterator[tuple[slice, slice]]:
    """Rows and positions that are multiplied together."""
    device, length = pair.base["resid", 0].device, pair.length
    bytes_each = vectors * pair.backend.info.d_model * pair.base["resid", 0].element_size()
    useful = TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE["cuda"]) // _SHARE
    at_once = fitting(bytes_each, device, useful)
    n_rows, n_positions = max(1, at_once // length), min(at_once, length)
    for row in range(0, rows, n_rows):
        for position in range(0, length, n_positions):
            yield slice(row, row + n_rows), slice(position, min(position + n_positions, length))
