"""What edges into queries and keys do to attention patterns, by the softmax itself and not its gradient.

A saturated softmax has no gradient, and hides what a larger change of a query or key would do. So:

1. Block l of the base run is entered with the stream and what one source writes in addition. Its own code makes
   queries, keys and patterns of that; the keys are set back to the base run's for edges into queries, the queries for
   edges into keys. The block is left as soon as the patterns are there.
2. The effect of the edge is (those patterns - the base run's) . dL/d(patterns), for the head of the query, or the heads
   that read the key. Norm, projection, rotation and softmax are exact; only what comes after is linear.
3. Heads do not see each other's queries and keys, so that all of a layer are done together. Where one norm is over all
   of them (OLMo 2) that is not so, and they are refused.

Kramar et al. 2024 (arXiv 2403.00745), the correction of queries and keys of AtP*.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .branches import Enough
from .gradients import Gradients, Pair
from .memory import fitting, rows_at_once
from .products import sources_before
from .window import Change, Key


class PatternEffects:
    """Effects by way of patterns, on the base run of a pair.

    Args:
        pair: whose base run it is.
        by_query_head: keys are counted for each query head.

    Raises:
        UnsupportedError: the heads of a layer see each other's queries.
    """

    def __init__(self, pair: Pair, by_query_head: bool):
        self._pair, self._info = pair, pair.backend.info
        self._apart = by_query_head or not self._info.grouped
        layers = range(self._info.n_layers)
        record = [(kind, layer) for layer in layers for kind in ("q", "k", "pattern")]
        self._replay = pair.backend.start(pair.tokens, pair.first, record)
        if self._coupled():
            raise UnsupportedError(
                f"{self._info.name} ({self._info.family}) has one norm over the queries of all heads of a layer, so "
                "that an edge into one of them changes the patterns of all",
                fix='Leave out correction="atp*"',
            )

    def correct(self, scores: Tensor, rows: Tensor, found: Gradients) -> Tensor:
        """Scores ``[rows, sources, targets]`` with those of queries and keys replaced.

        Args:
            scores: as from ``products``.
            rows: the prompt of each row.
            found: their gradients, those of patterns among them.
        """
        info = self._info
        shared = info.n_heads if self._apart else info.n_kv_heads
        width = info.n_heads + 2 * shared + 1
        rows = rows.to(scores.device)
        # What all sources write is kept for these rows at once.
        stream = self._pair.base["resid", 0]
        at_once = fitting(scores.shape[1] * stream[0].numel() * stream.element_size(), stream.device, len(rows))
        with torch.no_grad():
            for some in torch.arange(len(rows), device=rows.device).split(at_once):
                written = sources_before(self._pair, rows[some])
                for layer, before in zip(range(info.n_layers), written, strict=False):
                    gradient = found.at["pattern", layer][some]
                    queries, keys = (self._effects(layer, rows[some], before, gradient, kind) for kind in ("q", "k"))
                    if not self._apart:
                        keys = keys.unflatten(-1, (shared, -1)).sum(-1)
                    first = layer * width
                    wide = slice(first, first + info.n_heads + shared)
                    scores[some, : len(before), wide] = torch.cat([queries, keys], -1)
        return scores

    def _effects(self, layer: int, rows: Tensor, before: Tensor, gradient: Tensor, kind: str) -> Tensor:
        """Effects ``[rows, sources, heads]`` of what sources write ``[sources, rows, pos, d_model]``."""
        base = self._replay.recorded("pattern", layer)
        wrote = before.flatten(0, 1)
        out = wrote.new_empty(len(wrote), self._info.n_heads, dtype=torch.float32)
        every = torch.arange(len(wrote), device=wrote.device)
        for some in every.split(rows_at_once(self._replay.row_bytes, before.shape[2], before.device)):
            which = some % len(rows)
            stream = self._replay.stream(layer)[rows[which]] + wrote[some]
            changed = self._patterns(layer, rows[which], stream, "k" if kind == "q" else "q")
            out[some] = ((changed - base[rows[which]]) * gradient[which]).sum((-1, -2)).float()
        return out.unflatten(0, (len(before), len(rows))).transpose(0, 1)

    def _patterns(self, layer: int, rows: Tensor, stream: Tensor, held: str, scale: float = 1.0) -> Tensor:
        """Patterns ``[rows, heads, query, key]`` of base prompts with another stream, q or k as they were.

        Args:
            layer: of the block.
            rows: which prompts.
            stream: that enters it.
            held: ``"q"`` or ``"k"``.
            scale: of what head 0 or group 0 has held.
        """
        found: list[Tensor] = []

        def take(pattern: Tensor) -> None:
            found.append(pattern.clone())
            raise Enough

        own = self._replay.recorded(held, layer)[rows].clone()
        own[:, :, 0] *= scale
        changes: dict[Key, Change] = {(held, layer): lambda _: own}
        hung = self._pair.backend.hooks({**changes, ("pattern", layer): take})
        with torch.no_grad(), hung, suppress(Enough):
            self._replay.block(layer, stream, rows)
        return found[0]

    def _coupled(self) -> bool:
        """Whether what one head attends to depends on the query of another."""
        row = torch.zeros(1, dtype=torch.long, device=self._pair.tokens.device)
        stream = self._replay.stream(0)[row]
        one, four = (self._patterns(0, row, stream, "q", scale)[:, 1:] for scale in (1.0, 4.0))
        return not torch.equal(one, four)
