"""The local backend: TransformerLens' bridge over the Hub's own modules.

1. ``forward`` hangs one function on each hook point that an edit or a recording needs, runs the model, and takes
   the functions off again, whatever happens.
2. With ``read``, the body runs without the unembedding, and only the wanted columns are multiplied.
3. ``generate`` is the Hub's own, with the functions hung up; before each of its steps they are told which positions
   it computes. Edits that a longer prompt would carry out otherwise than a shorter one run without a cache, and so
   does a family whose cache does not give exactly what the whole text gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..edits import Edit
from ..errors import CapacityError, EditError, MechkitError, UnsupportedError, first_line
from ..sites import Site
from .branches import Branches
from .cached import cache_is_exact
from .change import functions_of
from .hooks import Function, Hooks
from .keep_edges import LensEdgeRuns, written_keys
from .keep_only import keep_only
from .memory import fitting, ran_out, rows_at_once
from .placed import Placement
from .protocol import Ablated, Forward, Keep, ModelInfo, Read
from .readout import Readout
from .replay import LensReplay
from .window import Key, Window

if TYPE_CHECKING:
    from ..model import Model

_BASE_TOKENS = {"cpu": 2048, "mps": 1 << 13, "cuda": 1 << 14}  # more would not be faster


def local_backend(model: Model, what: str) -> LensBackend:
    """The backend of a model that runs here.

    Args:
        model: any.
        what: is asked of it, for the message: "Weights of".

    Raises:
        UnsupportedError: it runs elsewhere.
    """
    if isinstance(model.backend, LensBackend):
        return model.backend
    if refused := getattr(model.backend, "refused", None):
        raise refused(what)
    raise UnsupportedError(f"{what} {model.name}, which runs elsewhere", expected="a local model")


class LensBackend:
    """Runs a ``TransformerBridge``.

    Args:
        bridge: the bridge, its model in evaluation mode; or a ``PlainBridge``.
        name: what to call the model in tables and messages.
        hooks: how functions are hung on its sites.
        parameters: of the Hub's model by their names there; a bridge adds others, cut out of these.
    """

    def __init__(
        self,
        bridge: Any,
        name: str,
        hooks: type[Hooks] = Hooks,
        parameters: Mapping[str, Tensor] | None = None,
    ):
        self.bridge = bridge
        self.hf = bridge.original_model
        self.parameters = dict(self.hf.named_parameters()) if parameters is None else dict(parameters)
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
        self.sites = hooks(bridge, self.info)
        self.placed = Placement(bridge, cfg.n_layers - 1)
        self.readout = Readout(self.hf, self.info)
        self._exact_cache: bool | None = None  # not tried out yet
        self._row_bytes: dict[tuple[int, ...], int] = {}  # by shape of a base run that passed its check

    @cached_property
    def branches(self) -> Branches:
        """The parts of every block, compared with the model when first asked for.

        Raises:
            UnsupportedError: they do not give what the model gives.
        """
        return Branches(self)

    @property
    def parallel(self) -> bool:
        """See ``Backend.parallel``."""
        return self.branches.parallel

    def hooks(self, functions: Mapping[Key, Function]) -> AbstractContextManager[set[Key]]:
        """Hang functions on sites for the length of a ``with``; gives the set of the keys whose functions ran."""
        return self.sites.hung(functions)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        edits: Sequence[Edit] = (),
        record: Sequence[Site] = (),
        read: Read | None = None,
        lengths: Tensor | None = None,
    ) -> Forward:
        """One run; see ``Backend.forward``.

        Raises:
            SiteError: an address this model does not have.
            EditError: an edit whose site did not run, or whose values do not fit.
        """
        tokens = tokens.to(self.info.device)
        window = Window(torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths)
        functions: dict[Key, Function] = dict(functions_of(edits, self.info, window))
        edited = set(functions)
        store: dict[Key, Tensor] = {}
        keys = [_key(self.info.check(site)) for site in record if site.kind != "logits"]
        for key, keep in self.sites.recording(store, list(dict.fromkeys(keys))).items():
            functions[key] = _then(functions.get(key), keep)
        with self.hooks(functions) as fired:
            logits = self._logits(tokens, read)
        self._check_fired(edited, fired)
        self._add_results(store, record)
        return Forward(logits, store)

    @torch.inference_mode()
    def generate(self, tokens: Tensor, edits: Sequence[Edit], options: Mapping[str, Any]) -> Tensor:
        """Prompts continued; see ``Backend.generate``.

        Raises:
            SiteError, EditError: as in ``forward``; an edit of a position that was never reached, as well.
        """
        from transformers import DynamicCache

        tokens = tokens.to(self.info.device)
        window = Window(torch.full((len(tokens),), tokens.shape[1]), growing=True)
        functions = functions_of(edits, self.info, window)
        cached = all(edit.grows for edit in edits) and self._cache_is_exact()
        # The Hub's default cache drops what a sliding window hides; patterns then have fewer keys than positions.
        cache = {"past_key_values": DynamicCache()} if cached else {"use_cache": False}

        def look(_: Any, __: tuple, kwargs: dict[str, Any]) -> None:
            past = kwargs.get("past_key_values")
            window.first = past.get_seq_length() if cached and past is not None else 0
            window.lengths = torch.full((len(kwargs["input_ids"]),), window.first + kwargs["input_ids"].shape[1])

        watching = self.hf.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with self.hooks(functions) as fired:
                out = self.hf.generate(tokens, attention_mask=torch.ones_like(tokens), **cache, **options)
        finally:
            watching.remove()
        self._check_fired(set(functions), fired)
        for edit in edits:
            beyond = [p for p in edit.positions or () if p >= out.shape[1]] if isinstance(edit.positions, tuple) else []
            if beyond:
                raise EditError(
                    f'Position {beyond[0]} of "{edit.sites[0]}" was never reached: the text ended after '
                    f"{out.shape[1]} tokens"
                )
        return out

    def start(self, tokens: Tensor, first: int, record: Sequence[tuple[str, int]] = ()) -> LensReplay:
        """A base run to begin variants from; see ``Backend.start``.

        Raises:
            UnsupportedError: the family's blocks cannot be run one by one.
            CapacityError: it does not fit in memory.
        """
        self.check_readout()
        shape = (*tokens.shape, first)
        try:
            replay = LensReplay(self, tokens.to(self.info.device), first, record)
            if shape not in self._row_bytes:
                self._row_bytes[shape] = replay.check()
        except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            if isinstance(error, MechkitError):
                raise
            raise UnsupportedError(
                f"{self.info.name} ({self.info.family}) cannot begin a run late: {first_line(error)}",
                fix="Patch one site at a time with model.run(..., edits=[mk.patch_in(...)])",
            ) from error
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            raise CapacityError(
                f"Memory ran out on the base run of {len(tokens)} prompts of {tokens.shape[1]} tokens: "
                f"{first_line(error)}",
                fix="Patch fewer sites at a time (patterns of long prompts are large), or shorter prompts",
            ) from error
        replay.row_bytes = self._row_bytes[shape]
        return replay

    def base_tokens(self) -> int:
        """How many tokens one base run may be; see ``Backend.base_tokens``."""
        parameter = next(self.hf.parameters())
        kept = 2 * (self.info.n_layers + 1) * self.info.d_model * parameter.element_size()  # residuals, recordings
        return fitting(kept, parameter.device, _BASE_TOKENS.get(parameter.device.type, _BASE_TOKENS["cuda"]))

    def keep_only(self, tokens: Tensor, keep: Keep, read: Read) -> Tensor:
        """Runs in which only some heads, and MLPs, are left in; see ``Backend.keep_only``."""
        self.check_readout()
        shape = (*tokens.shape, keep.first)
        if shape not in self._row_bytes:
            self.start(tokens, keep.first)
        tokens = tokens.to(self.info.device)
        rows = rows_at_once(self._row_bytes[shape], tokens.shape[1] - keep.first, tokens.device)
        return keep_only(self, tokens, keep, read, rows)

    def keep_edges(self, tokens: Tensor, first: int, ablated: Ablated) -> LensEdgeRuns:
        """Runs in which only some edges are left in; see ``Backend.keep_edges``."""
        return LensEdgeRuns(self, self.start(tokens, first, written_keys(self.info.n_layers)), ablated)

    def body(self, tokens: Tensor, **options: Any) -> Any:
        """Run everything but the unembedding."""
        return self.hf.base_model(input_ids=tokens, **options)

    def check_readout(self) -> None:
        """See ``Readout.check``."""
        self.readout.check(lambda tokens: self.body(tokens, use_cache=False).last_hidden_state)

    def _cache_is_exact(self) -> bool:
        """Whether generating with a cache gives the logits of generating without; tried out once, on a few tokens."""
        if self._exact_cache is None:
            self._exact_cache = cache_is_exact(self.hf, self.info)
        return self._exact_cache

    def _check_fired(self, edited: set[Key], fired: set[Key]) -> None:
        if silent := edited - fired:
            kind, layer = sorted(silent)[0]
            raise EditError(
                f"An edit of {kind} in layer {layer} never ran on {self.info.name}",
                fix="This family computes that site elsewhere; edit another one",
            )

    def _logits(self, tokens: Tensor, read: Read | None) -> Tensor:
        if read is None:
            return self.hf(input_ids=tokens, use_cache=False).logits
        self.check_readout()
        hidden = self.body(tokens, use_cache=False).last_hidden_state.to(self.info.device)
        rows = torch.arange(len(tokens), device=hidden.device)
        return self.readout(hidden[rows, read.positions.to(hidden.device)], read.columns)

    def _add_results(self, store: dict[Key, Tensor], record: Sequence[Site]) -> None:
        """``result`` is made of z, which is what was recorded in its place."""
        for layer in {site.layer for site in record if site.kind == "result"}:
            weight = self.bridge.blocks[layer].attn.W_O.to(self.info.device)  # [heads, d_head, d_model]
            written = torch.einsum("bphd,hdm->bphm", store["z", layer], weight)
            store["result", layer] = written * getattr(self.hf.config, "residual_multiplier", 1.0)  # Granite's


def _then(edit: Function | None, keep: Callable[[Tensor], None]) -> Function:
    """What is recorded is the edited value."""

    def function(tensor: Tensor) -> Tensor | None:
        edited = None if edit is None else edit(tensor)
        keep(tensor if edited is None else edited)
        return edited

    return function


def _key(site: Site) -> Key:
    return ("z" if site.kind == "result" else site.kind, site.layer)
