"""Circuits of edges, and of heads and MLPs, by their definitions: one run of the Hub's model for every slot.

Knows nothing of mechkit. An edge is (source, target), as text: sources ``embed``, ``1.2`` (a head), ``m1``; targets
``1.2.q``, ``1.kv0.k`` (or ``1.2.k`` where each query head is to have its own), ``m1``, ``logits``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import taps
from .patching import run_changed, value_of

Values = dict[tuple[str, int], Tensor]


def written_values(model: torch.nn.Module, tokens: Tensor) -> Values:
    """All that is written to the stream: what enters the first block, z and the MLPs' outputs."""
    layers = range(model.config.num_hidden_layers)
    return {
        key: value_of(model, tokens, *key)
        for key in [("resid", 0), *((kind, at) for at in layers for kind in ("z", "mlp"))]
    }


@torch.no_grad()
def keep_nodes(model: torch.nn.Module, tokens: Tensor, kept: set[str], values: Values) -> Tensor:
    """Logits with every head and MLP outside ``kept`` set to its value, among the kinds that ``values`` has."""

    def change(kind: str, layer: int) -> Callable:
        def tap(own: Tensor) -> Tensor:
            other = values[kind, layer].expand_as(own)
            if kind == "mlp":
                return own if f"m{layer}" in kept else other
            for head in range(own.shape[2]):
                if f"{layer}.{head}" not in kept:
                    own[:, :, head] = other[:, :, head]
            return own

        return tap

    return run_changed(model, tokens, {key: change(*key) for key in values if key[0] != "resid"})


@torch.no_grad()
def keep_edges(
    model: torch.nn.Module, tokens: Tensor, kept: set[tuple[str, str]], ablated: Values, parallel: bool
) -> Tensor:
    """Logits ``[batch, pos, vocab]`` with every source outside ``kept`` read as if it wrote its ablated value."""
    heads, groups, _ = taps._sizes(model)
    now: Values = {("resid", 0): value_of(model, tokens, "resid", 0)}
    ablated = {key: value.expand_as(value_of(model, tokens, *key)) for key, value in ablated.items()}
    if {target.split(".")[1] for _, target in kept if target[-1] in "kv"} & {str(head) for head in range(heads)}:
        groups = heads

    def stream(target: str, layer: int, with_heads: bool) -> Tensor:
        """What a target reads: of every source before it what it writes now, or when ablated."""

        def of(source: str, key: tuple[str, int]) -> Tensor:
            return (now if (source, target) in kept else ablated)[key]

        total = of("embed", ("resid", 0)).clone()
        for at in range(layer + with_heads):
            z = torch.stack([of(f"{at}.{head}", ("z", at))[:, :, head] for head in range(heads)], 2)
            total = total + attention_writes(model, tokens, at, z)
            if at < layer:
                total = total + of(f"m{at}", ("mlp", at))
        return total

    for layer in range(model.config.num_hidden_layers):
        slots: dict[str, list[Tensor]] = {}
        for kind, count in (("q", heads), ("k", groups), ("v", groups)):
            slots[kind] = []
            for one in range(count):
                name = f"{layer}.{'kv' if kind != 'q' and groups < heads else ''}{one}.{kind}"
                found = read_by(model, tokens, kind, layer, stream(name, layer, False))
                slots[kind].append(found[:, :, one * found.shape[2] // count])
        now["z", layer] = attended(model, tokens, layer, {kind: torch.stack(s, 2) for kind, s in slots.items()})
        now["mlp", layer] = mlp_of(model, tokens, layer, stream(f"m{layer}", layer, not parallel))
    last = model.config.num_hidden_layers
    final = stream("logits", last, False)
    return run_changed(model, tokens, {("resid", last): lambda _: final})


def read_by(model: torch.nn.Module, tokens: Tensor, kind: str, layer: int, stream: Tensor) -> Tensor:
    """q, k or v of a layer when this stream enters its block."""
    kept: list[Tensor] = []
    changes = {("resid", layer): lambda _: stream, (kind, layer): lambda own: kept.append(own.clone()) or own}
    run_changed(model, tokens, changes)
    return kept[0]


def attention_writes(model: torch.nn.Module, tokens: Tensor, layer: int, z: Tensor) -> Tensor:
    """What the heads of a layer add to the stream: what leaves a block that nothing enters and whose MLP is silent."""
    kept: list[Tensor] = []
    changes = {
        ("resid", layer): torch.zeros_like,
        ("z", layer): lambda _: z,
        ("mlp", layer): torch.zeros_like,
        ("resid", layer + 1): lambda own: kept.append(own.clone()) or own,
    }
    run_changed(model, tokens, changes)
    return kept[0]


def attended(model: torch.nn.Module, tokens: Tensor, layer: int, slots: dict[str, Tensor]) -> Tensor:
    """z of a layer with its queries, keys and values given.

    Where there are more keys than groups, each query head's are given to its group by themselves, one head at a time.
    """
    heads, groups, _ = taps._sizes(model)
    per_group, found = heads // groups, []
    for head in range(heads if slots["k"].shape[2] > groups else 1):
        kept: list[Tensor] = []
        given = dict(slots)
        if slots["k"].shape[2] > groups:
            own = head // per_group * per_group
            order = [head if group * per_group == own else group * per_group for group in range(groups)]
            given |= {kind: slots[kind][:, :, order] for kind in "kv"}
        changes = {(kind, layer): lambda _, value=value: value for kind, value in given.items()}
        run_changed(model, tokens, {**changes, ("z", layer): lambda own, kept=kept: kept.append(own.clone()) or own})
        found.append(kept[0])
    return found[0] if len(found) == 1 else torch.stack([z[:, :, head] for head, z in enumerate(found)], 2)


def mlp_of(model: torch.nn.Module, tokens: Tensor, layer: int, stream: Tensor) -> Tensor:
    """What the MLP of a layer adds when it reads this stream: it enters a block whose attention is silent."""
    kept: list[Tensor] = []
    changes = {("resid", layer): lambda _: stream, ("mlp", layer): lambda own: kept.append(own.clone()) or own}
    with _silent(model, layer, stream):
        run_changed(model, tokens, changes)
    return kept[0]


@contextmanager
def _silent(model: torch.nn.Module, layer: int, stream: Tensor) -> Iterator[None]:
    """The attention of a layer puts out nothing."""
    # Bloom's attention adds the stream itself.
    nothing = stream if type(model).__name__ == "BloomForCausalLM" else torch.zeros_like(stream)

    def after(_, __, out):
        return (nothing, *out[1:]) if isinstance(out, tuple) else nothing

    handle = taps.attention(model, layer).register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
