"""Patching and ablation as in a textbook: one whole forward pass a cell. Knows nothing of mechkit's engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from .taps import tapped

BY_HEAD = ("pattern", "scores")


@torch.no_grad()
def value_of(model: torch.nn.Module, tokens: Tensor, kind: str, layer: int) -> Tensor:
    """The whole tensor of one kind of part in one layer; see ``taps``."""
    kept: list[Tensor] = []
    with tapped(model, kind, layer, lambda tensor: kept.append(tensor.clone()) or tensor):
        model(tokens, use_cache=False)
    return kept[0]


@torch.no_grad()
def run_changed(model: torch.nn.Module, tokens: Tensor, changes: dict[tuple[str, int], Callable]) -> Tensor:
    """Logits ``[batch, pos, vocab]`` of a run in which some parts are changed."""
    with ExitStack() as stack:
        for (kind, layer), change in changes.items():
            stack.enter_context(tapped(model, kind, layer, change))
        return model(tokens, use_cache=False).logits


def patch_cell(
    model: torch.nn.Module,
    base: Tensor,
    source: Tensor,
    kind: str,
    layer: int,
    head: int | None = None,
    where: slice | int | Sequence[int] = slice(None),
    given: Tensor | None = None,
) -> Tensor:
    """Logits of the base prompts with one part, at some positions (queries), taken from the source prompts.

    ``given`` is the part's value on the source prompts, where it is known already.
    """
    given = value_of(model, source, kind, layer) if given is None else given

    def change(own: Tensor) -> Tensor:
        if head is None:
            own[:, where] = given[:, where]
        elif kind in BY_HEAD:
            own[:, head, where] = given[:, head, where]
        else:
            own[:, where, head] = given[:, where, head]
        return own

    return run_changed(model, base, {(kind, layer): change})


def keep_only(model, tokens: Tensor, kept: set[tuple[int, int]], values: list[Tensor]) -> Tensor:
    """Logits with every head outside ``kept`` set to ``values[layer] [batch, pos, heads, d_head]``."""

    def change(layer: int) -> Callable:
        def function(own: Tensor) -> Tensor:
            for head in range(own.shape[2]):
                if (layer, head) not in kept:
                    own[:, :, head] = values[layer][..., head, :]
            return own

        return function

    return run_changed(model, tokens, {("z", layer): change(layer) for layer in range(len(values))})


def continue_by_rerunning(run: Callable[[Tensor], Tensor], tokens: Tensor, steps: int) -> Tensor:
    """Greedy continuation ``[batch, pos + steps]``: the whole text is run again for every new token."""
    for _ in range(steps):
        tokens = torch.cat([tokens, run(tokens)[:, -1:].argmax(-1)], 1)
    return tokens
