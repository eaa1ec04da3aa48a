"""Edge attribution as its definition reads, by autograd, on the Hub's own models. Knows nothing of mechkit's engine.

Whatever reads the stream gets an input of its own: the stream plus a leaf of zeros. For each q, k and v of each head,
and each MLP, the block is called once more on that sum, and what this part alone makes of it takes the part's place.
The gradient of the metric at the leaf is the target's gradient; there is nothing clever in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from .patching import value_of
from .taps import attention, block, tapped

Metric = Callable[[Tensor], Tensor]
Part = tuple[str, int]


class _Stop(Exception):  # noqa: N818
    pass


class SeparateInputs:
    """A Hub model in which every slot, MLP and the readout reads an input of its own.

    ``leaves`` has them after a run, by (kind, layer, head): ``[batch, pos, d_model]``; head is None for ``mlp`` and
    ``logits``. ``seen`` has what was asked for, by (kind, layer).
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.n_layers = model, model.config.num_hidden_layers
        self.leaves: dict[tuple[str, int, int | None], Tensor] = {}
        self.seen: dict[Part, Tensor] = {}
        self._calls: dict[int, tuple[tuple, dict]] = {}
        self._attention: dict[int, Any] = {}
        self._inner: tuple[str, int, Tensor] | None = None  # what an inner call of a block is after

    def run(
        self,
        tokens: Tensor,
        changes: Mapping[Part, Callable[[Tensor], Tensor]] | None = None,
        added: Mapping[tuple[str, int, int | None], Tensor] | None = None,
        keep: tuple[Part, ...] = (),
        until: Part | None = None,
    ) -> Tensor | None:
        """Logits ``[batch, pos, vocab]``.

        Args:
            tokens: ids ``[batch, pos]``.
            changes: what becomes of the output of some parts.
            added: what some inputs have in addition to the stream; zeros for the others.
            keep: whose values go to ``seen``.
            until: the run ends, without logits, when this part is seen.
        """
        self.leaves, self.seen, self._added, self._until = {}, {}, added or {}, until
        changes = changes or {}
        with ExitStack() as stack:
            for kind, layer in {*changes, *keep} - {*self._reading()}:  # first: blocks are noted with them
                change = changes.get((kind, layer), lambda own: own)
                stack.enter_context(tapped(self.model, kind, layer, self._kept(kind, layer, change)))
            for layer in range(self.n_layers):
                stack.enter_context(self._noted(layer))
                for kind in ("q", "k", "v", "mlp"):
                    change = changes.get((kind, layer), lambda own: own)
                    stack.enter_context(tapped(self.model, kind, layer, self._reader(kind, layer, change, keep)))
            end = self._reader("logits", self.n_layers, lambda own: own, keep)
            stack.enter_context(tapped(self.model, "resid", self.n_layers, end))
            with suppress(_Stop):
                return self.model(tokens, use_cache=False).logits
        return None

    def _reading(self) -> Iterator[Part]:
        return ((kind, layer) for kind in ("q", "k", "v", "mlp") for layer in range(self.n_layers))

    def _kept(self, kind: str, layer: int, change: Callable) -> Callable[[Tensor], Tensor]:
        def tap(own: Tensor) -> Tensor:
            if self._inner is None:
                own = self.seen[kind, layer] = change(own)
                if self._until == (kind, layer):
                    raise _Stop
            return own

        return tap

    def _reader(self, kind: str, layer: int, change: Callable, keep: tuple[Part, ...]) -> Callable[[Tensor], Tensor]:
        def tap(own: Tensor) -> Tensor:
            if self._inner is not None:
                if self._inner[:2] == (kind, layer):
                    self.found = own
                    raise _Stop
                return own
            if kind == "logits":
                return own + self._leaf(kind, layer, None, own)
            if kind == "mlp":
                new = self._inner_call(kind, layer, None)
            else:
                heads = [self._inner_call(kind, layer, head)[:, :, head] for head in range(own.shape[2])]
                new = torch.stack(heads, 2)
            new = change(new)
            if (kind, layer) in keep:
                self.seen[kind, layer] = new
            return new

        return tap

    def _leaf(self, kind: str, layer: int, head: int | None, like: Tensor) -> Tensor:
        leaf = self._added.get((kind, layer, head), torch.zeros_like(like)).detach().requires_grad_()
        self.leaves[kind, layer, head] = leaf
        return leaf

    def _inner_call(self, kind: str, layer: int, head: int | None) -> Tensor:
        """What a part is when it, and nothing else, reads the stream plus its leaf."""
        args, kwargs = self._calls[layer]
        stream = args[0] if args else kwargs["hidden_states"]
        leaf = self._leaf(kind, layer, head, stream)
        given = ((stream + leaf, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": stream + leaf})
        self._inner = (kind, layer, leaf)
        try:
            block(self.model, layer)(*given[0], **given[1])
        except _Stop:
            return self.found
        finally:
            self._inner = None
        raise AssertionError(f"{kind} of layer {layer} never ran")

    @contextmanager
    def _noted(self, layer: int) -> Iterator[None]:
        """Note what the block is given; while an MLP is asked for, attention gives what it gave."""

        def before(_, args: tuple, kwargs: dict) -> None:
            if self._inner is None:
                self._calls[layer] = (args, kwargs)

        def after(_, __, out: Any) -> Any:
            if self._inner is None:
                self._attention[layer] = out
                return None
            if self._inner[0] != "mlp":
                return None
            own = self._attention[layer]
            if type(self.model).__name__ == "BloomForCausalLM":  # its attention adds the stream itself
                return (own[0] + self._inner[2], *own[1:])
            return own

        handles = [
            block(self.model, layer).register_forward_pre_hook(before, with_kwargs=True),
            attention(self.model, layer).register_forward_hook(after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def written(model: torch.nn.Module, base: Tensor, source: Tensor) -> list[Tensor]:
    """What each source writes in the source run less what it writes in the base run, to first order.

    Sources go by layer: the embedding, then each layer's heads and MLP; ``[batch, pos, d_model]`` each. First order
    matters only with a norm behind attention.
    """
    found = [value_of(model, source, "resid", 0) - value_of(model, base, "resid", 0)]
    for layer in range(model.config.num_hidden_layers):
        z = value_of(model, base, "z", layer)
        change = value_of(model, source, "z", layer) - z
        mlp, other = (value_of(model, tokens, "mlp", layer) for tokens in (base, source))
        for head in range(z.shape[2]):
            own = torch.zeros_like(z)
            own[:, :, head] = change[:, :, head]
            found.append(torch.autograd.functional.jvp(_stream_after(model, base, layer, mlp), z, own)[1])
        found.append(other - mlp)
    return found


def _stream_after(model: torch.nn.Module, tokens: Tensor, layer: int, mlp: Tensor) -> Callable[[Tensor], Tensor]:
    """The stream that leaves a block as a function of its z, its MLP kept as it is."""

    def function(z: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            raise _Stop

        try:
            with (
                tapped(model, "z", layer, lambda _: z),
                tapped(model, "mlp", layer, lambda _: mlp),
                tapped(model, "resid", layer + 1, take),
            ):
                model(tokens, use_cache=False)
        except _Stop:
            pass
        return kept[0]

    return function


def _in_order(leaves: Mapping[tuple[str, int, int | None], Tensor]) -> list[tuple[str, int, int | None]]:
    return sorted(leaves, key=lambda key: (key[1], ("q", "k", "v", "mlp", "logits").index(key[0]), key[2] or 0))


def target_gradients(
    model: torch.nn.Module, tokens: Tensor, metric: Metric, changes: Mapping[Part, Callable] | None = None
) -> list[Tensor]:
    """Gradients of the summed metric at what each target reads; of each layer q, k, v and the MLP, then the logits."""
    separate = SeparateInputs(model)
    with torch.enable_grad():
        total = metric(separate.run(tokens, changes)).sum()
        leaves = [separate.leaves[key] for key in _in_order(separate.leaves)]
        found = torch.autograd.grad(total, leaves, allow_unused=True)  # what is changed to a constant reads nothing
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def edge_scores(
    model: torch.nn.Module,
    base: Tensor,
    source: Tensor,
    metric: Metric,
    points: list[Mapping] | None = None,
    patterns: bool = False,
) -> Tensor:
    """Scores ``[batch, sources, targets]`` in the metric's unit; pairs that are no edge have one as well.

    Args:
        model: the Hub's own.
        base, source: ids ``[batch, pos]``; the gradient is that of the base run.
        metric: from logits ``[batch, pos, vocab]`` to one number a prompt.
        points: changes of the base run; the gradient is averaged over these runs. None: one, with nothing changed.
        patterns: edges into queries and keys by what they do to patterns, one run an edge (AtP*).
    """
    change = torch.stack(written(model, base, source), 1)
    runs = [target_gradients(model, base, metric, changes) for changes in points or [{}]]
    gradient = torch.stack([torch.stack(run, 1) for run in runs]).mean(0)
    scores = torch.einsum("bspd,btpd->bst", change, gradient)
    return _by_patterns(model, base, metric, change, scores) if patterns else scores


def _by_patterns(model: torch.nn.Module, base: Tensor, metric: Metric, change: Tensor, scores: Tensor) -> Tensor:
    separate, scores = SeparateInputs(model), scores.detach().clone()
    keep = tuple(("pattern", layer) for layer in range(separate.n_layers))
    with torch.enable_grad():
        total = metric(separate.run(base, keep=keep)).sum()
        own = dict(separate.seen)
        gradients = dict(zip(keep, torch.autograd.grad(total, [own[part] for part in keep]), strict=True))
        keys = _in_order(separate.leaves)
    with torch.no_grad():
        for j, (kind, layer, head) in enumerate(keys):
            for i in range(change.shape[1]) if kind in ("q", "k") else ():
                part = ("pattern", layer)
                separate.run(base, added={(kind, layer, head): change[:, i]}, keep=(part,), until=part)
                scores[:, i, j] = ((separate.seen[part] - own[part]) * gradients[part]).sum((1, 2, 3))
    return scores


def between_inputs(model: torch.nn.Module, base: Tensor, source: Tensor, steps: int) -> list[Mapping]:
    """The points of EAP-IG (inputs): on the line from the source's stream entering block 0 (in) to the base's (out)."""
    here, there = (value_of(model, tokens, "resid", 0) for tokens in (base, source))
    return [{("resid", 0): lambda _, k=k: there + k / steps * (here - there)} for k in range(steps)]


def between_activations(model: torch.nn.Module, base: Tensor, source: Tensor, steps: int) -> list[Mapping]:
    """The points of EAP-IG (activations): one group of parts at a time on its line, the source's end out."""
    parts = [("resid", 0)]
    parts += [(kind, layer) for layer in range(model.config.num_hidden_layers) for kind in ("z", "mlp")]
    points: list[Mapping] = []
    for part in parts:
        here, there = (value_of(model, tokens, *part) for tokens in (base, source))
        points += [{part: lambda _, a=k / steps, x=here, y=there: a * x + (1 - a) * y} for k in range(1, steps + 1)]
    return points
