"""Path patching by its definition: two whole forward passes a sender, every other head held by a hook."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .patching import BY_HEAD, run_changed, value_of

Part = tuple[str, int, int | None]  # kind, layer, head or group


def _slot(kind: str, head: int | None) -> tuple:
    if head is None:
        return (slice(None),)
    return (slice(None), head) if kind in BY_HEAD else (slice(None), slice(None), head)


@torch.no_grad()
def path_patch(
    model: torch.nn.Module,
    base: Tensor,
    source: Tensor,
    sender: Part,
    receivers: Sequence[Part],
    through_mlps: bool,
    where: slice | int = slice(None),
    known: dict | None = None,
) -> Tensor:
    """Logits ``[batch, pos, vocab]``.

    The receivers are ``("resid", n_layers, None)`` for the logits, or q, k, v, pattern, z of heads, or MLPs. ``known``
    keeps what the two prompts give between calls.
    """
    n_layers = model.config.num_hidden_layers
    known = {} if known is None else known

    def value(tokens: Tensor, name: str, kind: str, layer: int) -> Tensor:
        if (name, kind, layer) not in known:
            known[name, kind, layer] = value_of(model, tokens, kind, layer)
        return known[name, kind, layer]

    kind, layer, head = sender
    arrived: dict[Part, Tensor] = {}

    def held(of: str, at: int) -> Callable:
        """Keeps what is computed where it is a receiver, then puts the base's own value in its place."""

        def tap(own: Tensor) -> Tensor:
            for part in receivers:
                if part[:2] == (of, at):
                    arrived[part] = own[_slot(of, part[2])].clone()
            if of in ("z", "mlp") and not (of == "mlp" and through_mlps):
                own = value(base, "base", of, at).clone()
            if (of, at) == (kind, layer):
                given = value(source, "source", kind, layer)
                if head is None:
                    own[:, where] = given[:, where]
                else:
                    own[:, where, head] = given[:, where, head]
            return own

        return tap

    kinds = {("z", at) for at in range(n_layers)} | {(kind, layer)} | {part[:2] for part in receivers}
    if not through_mlps:
        kinds |= {("mlp", at) for at in range(n_layers)}
    values = [key for key in kinds if key[0] in ("z", "mlp", kind)]
    for key in values:  # before any hook is in place
        value(base, "base", *key), value(source, "source", *key)
    run_changed(model, base, {key: held(*key) for key in kinds})

    def replaced(of: str, at: int) -> Callable:
        def tap(own: Tensor) -> Tensor:
            for part, new in arrived.items():
                if part[:2] == (of, at):
                    own[_slot(of, part[2])] = new
            return own

        return tap

    return run_changed(model, base, {key: replaced(*key) for key in {part[:2] for part in receivers}})
