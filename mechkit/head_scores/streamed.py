"""Patterns seen once, layer by layer, and never kept.

1. Prompts run in batches of about one length, as many as memory allows, and nothing is unembedded (``passes``).
2. At each layer all weighted sums are one product of the patterns with the weights of all scores. The other numbers
   are taken from the same patterns one after the other. Then the patterns are gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.hooks import Function
from ..backends.lens import local_backend
from ..backends.window import Key
from ..model import Model
from .looking import LINEAR, Seen, weights
from .passes import pattern_numbers, run_past
from .pattern_metrics import SHAPES, SINGULAR, entropy, shapes, singular
from .places import real_mask

TOKENS = ("waad", "fai")
NEAR, SOON, LATE = 10, 10, 50  # W, H_lo and H_hi of WAAD and FAI


@where_the_model_is
@torch.inference_mode()
def streamed(
    model: Model,
    tokens: Tensor,
    lengths: Tensor,
    names: Sequence[str],
    queries: Tensor,
    span: Tensor | None = None,
    threshold: float = 0.04,
) -> dict[str, Tensor]:
    """Scores of every head on every prompt, by name.

    Args:
        model: local.
        tokens, lengths: ids ``[n, pos]`` and how many of each count ``[n]``.
        names: of ``LINEAR``, ``entropy``, ``SINGULAR``, ``SHAPES``; ``waad`` and ``fai``.
        queries: which queries count ``[n, pos]``, boolean.
        span: keys of ``share``.
        threshold: of ``SHAPES``.

    Returns:
        ``[layers, heads, n]`` each; of ``waad`` and ``fai`` ``[layers, heads, n, pos]``, by query and by key.
    """
    backend = local_backend(model, "Patterns of")
    info, device = backend.info, torch.device(backend.info.device)
    shape = (info.n_layers, info.n_heads, len(tokens))
    found = {name: torch.zeros(*shape, *tokens.shape[1:] if name in TOKENS else ()) for name in names}

    def listen(rows: Tensor) -> dict[Key, Function]:
        width = int(lengths[rows].max())
        keys = None if span is None else span[rows, :width].to(device)
        seen = Seen(tokens[rows, :width].to(device), queries[rows, :width].to(device), keys)
        measure = _Measure(seen, lengths[rows].to(device), names, threshold)

        def at(layer: int) -> Function:
            def function(pattern: Tensor) -> None:
                for name, values in measure(pattern).items():
                    there = found[name][layer]
                    there = there[..., :width] if name in TOKENS else there
                    there[:, rows] = values.transpose(0, 1).cpu()

            return function

        return {("pattern", layer): at(layer) for layer in range(info.n_layers)}

    run_past(backend, tokens, lengths, pattern_numbers(info, lengths), listen)
    return found


class _Measure:
    """All that is asked of the patterns of some prompts, whatever the layer."""

    def __init__(self, seen: Seen, lengths: Tensor, names: Sequence[str], threshold: float):
        self._names, self._lengths, self._threshold = names, lengths, threshold
        self._queries = seen.queries
        self._real = real_mask(lengths.cpu(), seen.tokens.shape[1]).to(lengths.device)
        self._linear = [name for name in names if name in LINEAR]
        if self._linear:
            self._weights = torch.stack([weights(name, seen) for name in self._linear], -1)  # [n, query, key, scores]
        self._token_weights = {name: _token_weights(name, seen.queries) for name in names if name in TOKENS}

    def __call__(self, pattern: Tensor) -> dict[str, Tensor]:
        """Values ``[n, heads]``, or ``[n, heads, pos]``, by name, of patterns ``[n, heads, query, key]``."""
        pattern, found = pattern.float(), {}
        if self._linear:
            # Query by query: one sum over a quarter of a million products would lose digits.
            sums = (pattern.transpose(1, 2) @ self._weights).sum(1)  # [n, heads, scores]
            found |= dict(zip(self._linear, sums.unbind(-1), strict=True))
        if "entropy" in self._names:
            found["entropy"] = entropy(pattern, self._queries)
        if set(SINGULAR) & set(self._names):
            found |= singular(pattern, self._lengths)
        if set(SHAPES) & set(self._names):
            found |= shapes(pattern, self._real, self._threshold)
        for name, matrix in self._token_weights.items():
            found[name] = torch.einsum(f"nhqk,nqk->nh{'q' if name == 'waad' else 'k'}", pattern, matrix)
        return {name: values for name, values in found.items() if name in self._names}


def _token_weights(name: str, queries: Tensor) -> Tensor:
    """``[n, query, key]``: of WAAD summed over keys, of FAI over queries."""
    at = torch.arange(queries.shape[1], device=queries.device)
    back = at[:, None] - at
    if name == "waad":
        return back.clamp(min=0, max=NEAR).float() * queries[..., None]
    later = ((back >= SOON) & (back <= LATE) & queries[..., None]).float()
    return later / later.sum(1, keepdim=True).clamp(min=1)
