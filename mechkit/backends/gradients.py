"""Two runs of the same prompts, and gradients of a metric in runs between them.

1. Both runs are the same before their first difference: those positions run once, and leave their keys and values in
   the Hub's own cache. No gradient goes to them.
2. From there on both run once, and what the parts wrote is noted.
3. A run whose gradients are wanted is the Hub's plain forward pass of the later positions, from the stream that enters
   block 0 on, with what is to be changed changed. Parameters get no gradients; the stream entering block 0 does.
4. One backward pass a batch: the metric is summed over prompts, which do not know of each other. It gives the gradients
   of the streams entering every block and leaving the last, and of every q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MetricError, UnsupportedError
from .branches import Enough
from .hooks import Function
from .memory import OutputBytes
from .protocol import ModelInfo, Read
from .window import Change, Key

if TYPE_CHECKING:
    from .lens import LensBackend

Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What one backward pass gave, at the positions from the first difference on.

    Attributes:
        values: the metric ``[rows]``.
        seen: values by (kind, layer), in the layouts of ``protocol``.
        at: gradients of the metric, for the same keys.
    """

    values: Tensor
    seen: Mapping[Key, Tensor]
    at: Mapping[Key, Tensor]


class Pair:
    """Runs of base and source prompts that agree before position ``first``.

    Args:
        backend: what runs them.
        base, source: token ids ``[n, pos]``.
        first: the first position that may differ.
        read: which logits.

    Attributes:
        tokens: of the base run.
        base: what parts gave in the base run, from ``first`` on: z, mlp, and the stream entering block 0.
        delta: what they gave in the source run, less that.
        logits: of the base run and of the source run, ``[n, k]`` each.
    """

    def __init__(self, backend: LensBackend, base: Tensor, source: Tensor, first: int, read: Read):
        self.backend, self.first, self._read = backend, first, read
        self.tokens = base.to(backend.info.device)
        backend.check_readout()
        layers = range(backend.info.n_layers)
        keys = [("resid", 0), *((kind, layer) for layer in layers for kind in ("z", "mlp"))]
        n, store = len(base), {}
        with plain_tensors(), torch.no_grad():
            self._prefix = self._run_prefix()
            both = torch.cat([self.tokens, source.to(self.tokens)])[:, first:]
            rows = torch.arange(n, device=both.device).repeat(2)
            with backend.hooks(backend.sites.recording(store, keys)):
                self.logits = self._logits(self._body(both, rows), rows).split(n)
        self.base = {key: value[:n] for key, value in store.items()}
        self.delta = {key: value[n:] - value[:n] for key, value in store.items()}

    @property
    def length(self) -> int:
        """Number of positions from the first difference on."""
        return self.tokens.shape[1] - self.first

    def gradients(
        self,
        rows: Tensor,
        measure: Measure,
        changes: Mapping[Key, Change] | None = None,
        also: Sequence[Key] = (),
        graph: Callable[[Mapping[Key, Tensor], Mapping[Key, Tensor]], None] | None = None,
    ) -> Gradients:
        """A base run of some prompts with some parts changed, and its gradients.

        Args:
            rows: which prompts ``[rows]``; one may be there several times.
            measure: one number a row from their logits.
            changes: what becomes of parts.
            also: whose gradients are wanted besides those of the streams, q, k and v.
            graph: called with the tensors and their gradients while autograd can still go through them.

        Raises:
            MetricError: the metric has no gradient.
            UnsupportedError: the logits do not depend on one of the sites.
        """
        backend, changes = self.backend, changes or {}
        layers = range(backend.info.n_layers)
        keys = [*(("resid", layer) for layer in range(len(layers) + 1)), *also]
        keys += [(kind, layer) for layer in layers for kind in ("q", "k", "v")]
        kept: dict[Key, Tensor] = {}
        functions = dict(changes) | {key: _keep(key, kept, changes.get(key)) for key in keys}
        rows = rows.to(self.tokens.device)
        with plain_tensors(), torch.enable_grad(), without_parameters(backend.hf):
            with backend.hooks(functions):
                hidden = self._body(self.tokens[rows, self.first :], rows)
            values = measure(self._logits(hidden, rows))
            if not values.requires_grad:
                raise MetricError(
                    "The metric has no gradient with respect to the logits",
                    expected="sums, products and other differentiable functions of them",
                    fix="Use a metric such as logit_diff, or method='exact'",
                )
            found = torch.autograd.grad(values.sum(), list(kept.values()), retain_graph=bool(graph), allow_unused=True)
            at = {key: grad for key, grad in zip(kept, found, strict=True) if grad is not None}
            if lost := [key for key in keys if key not in at]:
                raise UnsupportedError(
                    f"The logits of {backend.info.name} ({backend.info.family}) do not depend on {lost[0][0]} "
                    f"of layer {lost[0][1]} as TransformerLens shows it"
                )
            if graph is not None:
                graph(kept, at)
        return Gradients(values.detach(), {key: value.detach() for key, value in kept.items()}, at)

    def row_bytes(self) -> int:
        """What all blocks put out for one prompt, which is more than its backward pass holds on to."""
        row = torch.zeros(1, dtype=torch.long, device=self.tokens.device)

        def stop(_: Tensor) -> None:
            raise Enough

        first_block = self.backend.hooks({("resid", 1): stop})
        with plain_tensors(), torch.no_grad(), OutputBytes() as spent, first_block, suppress(Enough):
            self._body(self.tokens[:1, self.first :], row)
        return spent.total * self.backend.info.n_layers

    def _run_prefix(self) -> list[tuple[Tensor, Tensor]]:
        if self.first == 0:
            return []
        from transformers import DynamicCache

        # The Hub's default cache drops what a sliding window hides; later queries then have fewer keys than positions.
        cache = DynamicCache()
        self.backend.body(self.tokens[:, : self.first], use_cache=True, past_key_values=cache)
        layers: Any = cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def _body(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Normalised streams ``[rows, pos, d_model]`` of the later tokens, after the prefixes of these prompts."""
        options: dict[str, Any] = {"use_cache": False}
        if self._prefix:
            from transformers import DynamicCache

            cache = DynamicCache()
            for layer, (keys, values) in enumerate(self._prefix):
                each = rows.to(keys.device)
                cache.update(keys[each], values[each], layer)
            options = {"use_cache": True, "past_key_values": cache}
        return self.backend.body(tokens, **options).last_hidden_state.to(tokens.device)

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        positions, columns = self._read.positions.to(rows.device), self._read.columns
        at = positions[rows] - self.first
        ends = hidden[torch.arange(len(rows), device=rows.device), at]
        return self.backend.readout(ends, None if columns is None else columns.to(rows.device)[rows])


def _keep(key: Key, kept: dict[Key, Tensor], change: Change | None) -> Function:
    def function(tensor: Tensor) -> Tensor:
        own = tensor if change is None else change(tensor)
        if key == ("resid", 0):  # where gradients end
            own = own.detach().requires_grad_()
        kept[key] = own
        return own.clone()  # families add to their tensors in place

    return function


def by_query_head(info: ModelInfo, kept: Mapping[Key, Tensor], at: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Gradients of k and v for each query head, where heads share them: ``[rows, pos, heads, d_head]``.

    What reaches a key goes by way of the patterns of the heads that share it, what reaches a value by way of their z.
    Each is followed back through one of these heads at a time; autograd goes no further than one attention module.

    Args:
        info: of the model.
        kept: the tensors k, v, pattern and z of every layer, still part of a graph.
        at: their gradients.
    """
    per_group, found = info.n_heads // info.n_kv_heads, {}
    number = torch.arange(info.n_heads, device=at["z", 0].device) % per_group
    only = (number == torch.arange(per_group, device=number.device)[:, None]).to(at["z", 0].dtype)
    readers = {"k": ("pattern", only[:, None, :, None, None]), "v": ("z", only[:, None, None, :, None])}
    for layer in range(info.n_layers):
        for shared, (reader, mask) in readers.items():
            ends = kept[reader, layer], kept[shared, layer], at[reader, layer] * mask
            back = torch.autograd.grad(*ends, retain_graph=True, is_grads_batched=True)[0]
            found[shared, layer] = back.permute(1, 2, 3, 0, 4).flatten(2, 3)
    return found


@contextmanager
def plain_tensors() -> Iterator[None]:
    """While active, what is computed can take part in gradients, whatever mode the caller is in."""
    with torch.inference_mode(False):
        yield


@contextmanager
def without_parameters(module: torch.nn.Module) -> Iterator[None]:
    """While active, no parameter asks for gradients, so that nothing is kept for them."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
