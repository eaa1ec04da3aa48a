"""Semantic distance: how far what a head moves is from what the heads of its layer move in common.

1. A prompt's last ``window`` queries look back. Where the prompt is longer than ``keys``, only the keys are kept that
   these queries attend to most, after a mean over ``pool`` neighbours; the query head's own.
2. The head's vector is the mean over the window of its attention times its values, put through W_O: what it writes to
   the stream. (Before W_O, heads that share a value would be closer than what they write.)
3. The centre is the mean over the heads of the layer, and the score the distance to it, the mean over prompts.
4. In each layer the f farthest heads are "heterogeneous"; of the others, the nearest to the centre is "central". f
   falls linearly from ``beta`` times the number of heads in the first layer to ``top`` in the last one.

He et al. 2025 (arXiv 2501.15113): ``beta`` and ``top`` are 0.25 and 4 there for Llama-2-7B, 0.3 and 1 for
Mistral-7B.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.hooks import Function
from ..backends.lens import local_backend
from ..backends.window import Key
from ..errors import OptionError
from ..prompts import as_batch
from ..results import Scores
from .passes import pattern_numbers, run_past
from .tables import head_scores

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts


def semantic_distance(
    model: Model,
    data: Prompts,
    *,
    window: int = 32,
    keys: int = 256,
    pool: int = 7,
    beta: float = 0.25,
    top: int = 1,
    each: bool = False,
) -> Scores:
    """How far each head's contribution is from the centre of its layer.

    Args:
        model: any whose attention patterns and weights can be seen.
        data: text, texts, ids ``[batch, pos]``, or a task (its clean prompts).
        window: how many queries, from the end.
        keys: how many keys are kept at most.
        pool: over how many neighbours attention is averaged before keys are chosen, an odd number.
        beta: the share of heterogeneous heads in the first layer.
        top: how many there are in the last one.
        each: a row a head and prompt, in place of means.

    Returns:
        A row a head; column ``role`` is ``"heterogeneous"``, ``"central"`` or ``"other"``, by the mean over prompts.

    Raises:
        OptionError: a number outside its range.
        UnsupportedError: patterns that cannot be seen.
    """
    started = time.perf_counter()
    for name, value in (("window", window), ("keys", keys), ("pool", pool)):
        if not isinstance(value, int) or value < 1 or (name == "pool" and value % 2 == 0):
            raise OptionError(
                f"{name} = {value!r}", expected=f"{'an odd' if name == 'pool' else 'a whole'} number from 1"
            )
    if not 0 <= beta <= 1:
        raise OptionError(f"beta = {beta!r}", expected="a number from 0 to 1")
    if not isinstance(top, int) or not 0 <= top <= model.n_heads:
        raise OptionError(f"top = {top!r}", expected=f"a whole number from 0 to {model.n_heads}")
    tokens, lengths = as_batch(model, data)
    found = _distances(model, tokens, lengths, window, keys, pool)
    scores = head_scores(
        model,
        found,
        "distance",
        "semantic_distance",
        started,
        data,
        each=each,
        window=window,
        keys=keys,
        pool=pool,
        beta=beta,
        top=top,
    )
    role = roles(found.double().mean(-1), beta, top)
    told = [role[layer][head] for layer, head in zip(scores.frame["layer"], scores.frame["head"], strict=True)]
    return replace(scores, frame=scores.frame.assign(role=told))


def roles(distances: Tensor, beta: float, top: int) -> list[list[str]]:
    """What each head is in its layer, of ``[layers, heads]``; point 4 of the module."""
    n_layers, n_heads = distances.shape
    told = []
    for layer, row in enumerate(distances):
        part = layer / max(1, n_layers - 1)
        far = round((1 - part) * beta * n_heads + part * top)
        order = row.argsort(descending=True, stable=True).tolist()
        names = dict.fromkeys(order, "other") | dict.fromkeys(order[:far], "heterogeneous")
        if far < n_heads:
            names[order[-1]] = "central"
        told.append([names[head] for head in range(n_heads)])
    return told


@where_the_model_is
def _distances(model: Model, tokens: Tensor, lengths: Tensor, window: int, keys: int, pool: int) -> Tensor:
    """Distance of each head to its layer's centre ``[layers, heads, n]``."""
    backend = local_backend(model, "Semantic distances of")
    info, branches = backend.info, backend.branches
    times = float(getattr(backend.hf.config, "residual_multiplier", 1.0))  # Granite's
    out = torch.zeros(info.n_layers, info.n_heads, len(tokens))

    def listen(rows: Tensor) -> dict[Key, Function]:
        values: dict[int, Tensor] = {}

        def value(layer: int) -> Callable[[Tensor], None]:
            def function(v: Tensor) -> None:
                values[layer] = v.float().clone()

            return function

        def pattern(layer: int) -> Callable[[Tensor], None]:
            def function(weights: Tensor) -> None:
                v = values.pop(layer)
                v = v.repeat_interleave(info.n_heads // v.shape[2], 2)  # [batch, pos, heads, d_head]
                for slot, i in enumerate(rows.tolist()):
                    n = int(lengths[i])
                    looked = kept(weights[slot, :, max(0, n - window) : n, :n].float(), keys, pool)
                    moved = torch.einsum("hk,khd->hd", looked.mean(1), v[slot, :n])
                    # One vector a head and prompt: d_model wide is no more than the Gram matrices of W_O would be.
                    written = torch.einsum("hd,hdm->hm", moved, branches.weight("o", layer).float()) * times
                    far = torch.linalg.vector_norm(written - written.mean(0), dim=-1)
                    out[layer, :, i] = far.cpu()

            return function

        functions: dict[Key, Function] = {("v", layer): value(layer) for layer in range(info.n_layers)}
        functions |= {("pattern", layer): pattern(layer) for layer in range(info.n_layers)}
        return functions

    run_past(backend, tokens, lengths, pattern_numbers(info, lengths), listen)
    return out


def kept(pattern: Tensor, keys: int, pool: int) -> Tensor:
    """A window's attention ``[heads, query, key]`` with all but the keys at 0 that it attends to most."""
    n = pattern.shape[-1]
    if n <= keys:
        return pattern
    near = torch.nn.functional.avg_pool1d(pattern.mean(1), pool, 1, pool // 2, count_include_pad=False)
    best = near.topk(keys, dim=-1).indices  # [heads, keys]
    mask = torch.zeros_like(near, dtype=torch.bool).scatter_(1, best, True)
    return pattern * mask[:, None]
