"""The local backend: TransformerLens' bridge over the Hub's own modules.

1. A site is one of TransformerLens' hook points; the table below is all there is to know of names.
2. ``forward`` hangs one function on each hook point that an edit or a recording needs, runs the model, and takes
   the functions off again, whatever happens.
3. With ``read``, the body runs without the unembedding, and only the wanted columns are multiplied. That this
   equals the model's own logits is checked once a model, since families scale or cap logits after that product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..edits import Edit
from ..errors import EditError, UnsupportedError
from ..sites import Site
from .change import changed
from .keep_only import keep_only
from .protocol import Forward, Keep, ModelInfo, Read
from .replay import TOLERANCE, LensReplay

_HOOKS = {
    "z": "blocks.{}.attn.hook_z",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "pattern": "blocks.{}.attn.hook_pattern",
    "scores": "blocks.{}.attn.hook_attn_scores",
    "mlp": "blocks.{}.hook_mlp_out",
    "resid": "blocks.{}.hook_resid_pre",
    "embed": "hook_embed",
}
_HEADED = ("z", "q", "k", "v")


class LensBackend:
    """Runs a ``TransformerBridge``.

    Args:
        bridge: the bridge, its model in evaluation mode.
        name: what to call the model in tables and messages.
    """

    def __init__(self, bridge: Any, name: str):
        self.bridge = bridge
        self.hf = bridge.original_model
        cfg = bridge.cfg
        parameter = next(self.hf.parameters())
        self.info = ModelInfo(
            name=name,
            family=type(self.hf).__name__,
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_vocab=cfg.d_vocab,
            n_ctx=cfg.n_ctx,
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
        )
        self._points = bridge.hook_dict
        self._readout_checked = False
        self._replayed: set[tuple[int, ...]] = set()  # shapes of base runs that passed their check

    def point(self, kind: str, layer: int) -> Any:
        """The TransformerLens hook point of a kind of site in a layer."""
        if kind == "resid" and layer == self.info.n_layers:
            name = f"blocks.{layer - 1}.hook_resid_post"
        else:
            name = _HOOKS[kind].format(layer)
        if name not in self._points:
            raise UnsupportedError(
                f"{self.info.name} ({self.info.family}) has no site of kind {kind!r} in layer {layer}",
                expected=f"a model that TransformerLens serves at {name}",
            )
        return self._points[name]

    def heads_apart(self, kind: str, tensor: Tensor) -> Tensor:
        """``[batch, pos, heads * d_head]`` to ``[batch, pos, heads, d_head]``, where it is not so already."""
        return tensor.unflatten(-1, (-1, self.info.d_head)) if kind in _HEADED and tensor.ndim == 3 else tensor

    @contextmanager
    def hooks(self, functions: Mapping[tuple[str, int], Callable[[Tensor], Tensor | None]]) -> Iterator[set]:
        """Hang functions on hook points for the length of a ``with``; gives the set of those that ran."""
        fired: set[tuple[str, int]] = set()
        handles = []

        def listen(key: tuple[str, int], function: Callable[[Tensor], Tensor | None]) -> Callable:
            def run(tensor: Tensor, hook: Any) -> Tensor | None:
                fired.add(key)
                result = function(self.heads_apart(key[0], tensor))
                return None if result is None else result.reshape(tensor.shape)

            return run

        try:
            for key, function in functions.items():
                point = self.point(*key)
                handles.append((point, point.add_hook(listen(key, function))))
            yield fired
        finally:
            for point, handle in handles:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)

    def record_into(
        self, store: dict, keys: Sequence[tuple[str, int]]
    ) -> dict[tuple[str, int], Callable[[Tensor], None]]:
        """Functions for ``hooks`` that copy what passes into ``store``."""

        def keep(key: tuple[str, int]) -> Callable[[Tensor], None]:
            def function(tensor: Tensor) -> None:
                store[key] = tensor.clone()  # families add to their outputs in place

            return function

        return {key: keep(key) for key in keys}

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        edits: Sequence[Edit] = (),
        record: Sequence[Site] = (),
        read: Read | None = None,
    ) -> Forward:
        """One run; see ``Backend.forward``.

        Raises:
            SiteError: an address this model does not have.
            EditError: an edit whose site did not run, or whose values do not fit.
        """
        tokens = tokens.to(self.info.device)
        steps: dict[tuple[str, int], list[Callable[[Tensor], Tensor]]] = defaultdict(list)
        for edit in edits:
            for key, function in changed(edit, self.info).items():
                steps[key].append(function)
        store: dict[tuple[str, int], Tensor] = {}
        keys = [_key(self.info.check(site)) for site in record if site.kind != "logits"]
        keeps = self.record_into(store, list(dict.fromkeys(keys)))

        def combined(key: tuple[str, int]) -> Callable[[Tensor], Tensor | None]:
            def function(tensor: Tensor) -> Tensor | None:
                edited = tensor.clone() if steps.get(key) else tensor
                for step in steps.get(key, ()):
                    edited = step(edited)
                if key in keeps:
                    keeps[key](edited)
                return edited if key in steps else None

            return function

        with self.hooks({key: combined(key) for key in {**steps, **keeps}}) as fired:
            logits = self._logits(tokens, read)
        if silent := set(steps) - fired:
            kind, layer = sorted(silent)[0]
            raise EditError(
                f"An edit of {kind} in layer {layer} never ran on {self.info.name}",
                fix="This family computes that site elsewhere; edit another one",
            )
        self._add_results(store, record)
        return Forward(logits, store)

    def start(self, tokens: Tensor, first: int, record: Sequence[tuple[str, int]] = ()) -> LensReplay:
        """A base run to begin variants from; see ``Backend.start``."""
        self._check_readout()
        replay = LensReplay(self, tokens.to(self.info.device), first, record)
        replay.check()
        self._replayed.add((*tokens.shape, first))
        return replay

    def keep_only(self, tokens: Tensor, keep: Keep, read: Read) -> Tensor:
        """Runs in which only some heads are left in; see ``Backend.keep_only``."""
        self._check_readout()
        if (*tokens.shape, 0) not in self._replayed:
            self.start(tokens, 0)
        return keep_only(self, tokens.to(self.info.device), keep, read)

    def body(self, tokens: Tensor, **options: Any) -> Any:
        """Run everything but the unembedding."""
        return self.hf.base_model(input_ids=tokens, **options)

    def readout(self, hidden: Tensor, columns: Tensor | None) -> Tensor:
        """Logits ``[batch, k]`` (or ``[batch, vocab]``) of normalised residuals ``[batch, d_model]``."""
        unembed = self.hf.get_output_embeddings()
        weight, bias = unembed.weight, getattr(unembed, "bias", None)
        if columns is None:
            logits = torch.nn.functional.linear(hidden, weight, bias)
        else:
            columns = columns.to(hidden.device)
            logits = torch.einsum("bd,bkd->bk", hidden, weight[columns])
            logits = logits if bias is None else logits + bias[columns]
        config = self.hf.config
        logits = logits * (getattr(config, "logit_scale", None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def _logits(self, tokens: Tensor, read: Read | None) -> Tensor:
        if read is None:
            return self.hf(input_ids=tokens, use_cache=False).logits
        self._check_readout()
        hidden = self.body(tokens, use_cache=False).last_hidden_state
        rows = torch.arange(len(tokens), device=hidden.device)
        return self.readout(hidden[rows, read.positions.to(hidden.device)], read.columns)

    def _check_readout(self) -> None:
        if self._readout_checked:
            return
        with torch.inference_mode():
            tokens = torch.arange(1, min(6, self.info.d_vocab), device=self.info.device)[None]
            own = self.hf(input_ids=tokens, use_cache=False).logits[:, -1]
            ours = self.readout(self.body(tokens, use_cache=False).last_hidden_state[:, -1], None)
        tolerance = TOLERANCE.get(own.dtype, 1e-4) * max(1.0, float(own.abs().max()))
        if float((own - ours).abs().max()) > tolerance:
            raise UnsupportedError(
                f"{self.info.family} does something to its logits that mechkit does not know",
                fix="Use model.run(...).logits, which runs the model's own code to the end",
            )
        self._readout_checked = True

    def _add_results(self, store: dict[tuple[str, int], Tensor], record: Sequence[Site]) -> None:
        """``result`` is made of z, which is what was recorded in its place."""
        for layer in {site.layer for site in record if site.kind == "result"}:
            weight = self.bridge.blocks[layer].attn.W_O  # [heads, d_head, d_model]
            store["result", layer] = torch.einsum("bphd,hdm->bphm", store["z", layer], weight)


def _key(site: Site) -> tuple[str, int]:
    return ("z" if site.kind == "result" else site.kind, site.layer)
