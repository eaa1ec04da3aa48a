"""The backend where code runs apart from the model's weights, as for keys that a service does not trust.

There nnsight's envoys are all there is: tensors at the edges of the Hub's modules pass by, once and in order, and may
be replaced. So

1. every run is a whole forward pass of the prompts, from the first layer and position on; variants stand side by side
   on the batch axis as elsewhere. It is slower by the work that the other backend leaves out, and gives the same
   numbers.
2. Path patching is its definition: one pass in which every other head keeps its base values and the receivers' values
   are noted, one in which the receivers alone are set to them.
3. Text is continued one token at a time by runs of the whole text.
4. What needs weights or gradients is refused, and so are patterns, which are at no module's edge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..edits import Edit
from ..errors import UnsupportedError
from ..sites import Site
from .anatomy import Anatomy, Place
from .change import functions_of
from .envoy_replay import EnvoyReplay, noted
from .hooks import Function
from .memory import in_batches
from .plain import changed_at
from .protocol import Forward, Keep, Read
from .readout import finished
from .window import Change, Key, Window

_TOKENS = 4096  # of one pass; the memory of the machine that runs it is not seen from here
_ORDER = {"embed": 0, "resid": 0, "q": 1, "k": 2, "v": 3, "z": 4, "mlp": 5}  # in which a block's sites pass by
_TRUST = "Ask the service's operators for a trusted key, or run an NDIF of your own: docs/own-ndif.md"


class EnvoyBackend:
    """Runs a model through nnsight's envoys.

    Args:
        there: the model, as nnsight hands it out.
        parts: where its parts are.
        name: what to call it.
        config: the Hub's configuration.
    """

    def __init__(self, there: Any, parts: Anatomy, name: str, config: Any):
        self._there, self._parts, self._config = there, parts, config
        family = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        self.info = parts.info(name, family, "cpu")

    @property
    def parallel(self) -> bool:
        """See ``Backend.parallel``."""
        return bool(self._parts.cfg["parallel_attn_mlp"])

    def forward(
        self,
        tokens: Tensor,
        edits: Sequence[Edit] = (),
        record: Sequence[Site] = (),
        read: Read | None = None,
        lengths: Tensor | None = None,
    ) -> Forward:
        """One run; see ``Backend.forward``."""
        window = Window(torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths)
        functions: dict[Key, Function] = dict(functions_of(edits, self.info, window))
        store: dict[Key, Tensor] = {}
        for site in record:
            if site.kind == "result":
                raise self.refused(f'Recording "{site}"')
            if site.kind != "logits":
                key = (self.info.check(site).kind, site.layer)
                functions[key] = noted(functions.get(key), key, store)
        return Forward(self.run(tokens, functions, read), store)

    def generate(self, tokens: Tensor, edits: Sequence[Edit], options: Mapping[str, Any]) -> Tensor:
        """Prompts continued, the likeliest token each time; see ``Backend.generate``."""
        known = {"do_sample", "max_new_tokens", "pad_token_id"}
        if odd := [name for name, value in options.items() if name not in known or (name == "do_sample" and value)]:
            raise self.refused(f"generate with {', '.join(odd)}")
        if getattr(self._config, "repetition_penalty", None) not in (None, 1.0):
            raise self.refused("generate with a penalty on repetition, as its makers have it,")
        ends = getattr(self._config, "eos_token_id", None)
        ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends])
        out, done = tokens, torch.zeros(len(tokens), dtype=torch.bool)
        for _ in range(options["max_new_tokens"]):
            last = torch.full((len(out),), out.shape[1])
            functions = functions_of(edits, self.info, Window(last, growing=True))
            new = self.run(out, functions, Read(last - 1)).argmax(-1)
            new = torch.where(done, torch.tensor(options["pad_token_id"]), new)
            out, done = torch.cat([out, new[:, None]], 1), done | torch.isin(new, ends)
            if bool(done.all()):
                break
        return out

    def start(self, tokens: Tensor, first: int, record: Sequence[Key] = ()) -> EnvoyReplay:
        """A base run; see ``Backend.start``."""
        return EnvoyReplay(self, tokens, first, record)

    def base_tokens(self) -> int:
        """How many tokens one base run may be."""
        return _TOKENS

    def keep_only(self, tokens: Tensor, keep: Keep, read: Read) -> Tensor:
        """Runs in which only some heads, and MLPs, are left in; see ``Backend.keep_only``."""
        batch, every = len(tokens), torch.arange(len(tokens))

        def some(sets: Tensor) -> Tensor:
            rows = every.repeat(len(sets))
            functions: dict[Key, Function] = {}
            for layer in range(self.info.n_layers):
                mask = keep.kept[sets, layer].repeat_interleave(batch, 0)[:, None, :, None]
                functions["z", layer] = _kept(mask, keep.values[layer], rows, batch, keep.first)
                if keep.mlps is not None:
                    mask = keep.mlps[sets, layer].repeat_interleave(batch, 0)[:, None, None]
                    functions["mlp", layer] = _kept(mask, keep.mlp_values[layer], rows, batch, keep.first)
            columns = None if read.columns is None else read.columns[rows]
            logits = self.run(tokens[rows], functions, Read(read.positions[rows], columns))
            return logits.unflatten(0, (len(sets), batch))

        at_once = max(1, _TOKENS // tokens.numel())
        return torch.cat([found for _, found, _ in in_batches(torch.arange(len(keep.kept)), at_once, some)])

    def keep_edges(self, *_: Any, **__: Any) -> NoReturn:
        """Edges into a head are inside its projections, where no module's edge is."""
        raise self.refused("Circuits of edges of")

    @torch.no_grad()
    def run(self, tokens: Tensor, functions: Mapping[Key, Function], read: Read | None) -> Tensor:
        """One pass with functions at sites; logits as of ``Forward``."""
        there, name = self._there, self._parts.modules
        found_at = self._steps(functions, tokens.shape)
        steps = [(_envoy(there, module), side, changes) for module, side, changes in found_at]
        norm, unembed, found = _envoy(there, name["ln_final"]), _envoy(there, name["unembed"]), []
        rows = torch.arange(len(tokens))
        with there.trace(tokens, use_cache=False):
            for envoy, side, changes in steps:
                _pass_by(envoy, side, changes)
            if read is None:
                found.append(unembed.output)
            else:
                found.append(unembed(norm.output[rows, read.positions]))
        # What passes by is where the model is; what it is compared with is here.
        logits = finished(found[0].float().cpu(), self._config)
        return logits if read is None or read.columns is None else logits.gather(1, read.columns)

    def _steps(self, functions: Mapping[Key, Function], shape: torch.Size) -> list[tuple[str, str, list[Change]]]:
        """Modules and their sides in the order in which they pass by, and what is done there."""
        info, layers = self.info, self.info.n_layers
        stream = [torch.Size((*shape, info.d_model))]
        found: dict[tuple[str, str], list[Change]] = defaultdict(list)
        for key in sorted(functions, key=lambda key: (key[1], _ORDER.get(key[0], -1))):
            kind, layer = key
            if kind not in self._parts.points:
                raise self.refused(f"A {kind} of")
            place = self._parts.points[kind]
            if kind == "resid" and layer == layers:
                place, layer = Place(self._parts.modules["block"], "out"), layers - 1
            listener = _listening(functions[key], info.d_head if kind in "zqkv" else None)
            found[place.module.format(layer), place.side].append(changed_at(listener, place, stream))
        return [(*where, changes) for where, changes in found.items()]

    def refused(self, what: str) -> UnsupportedError:
        """The error for what cannot be had here."""
        return UnsupportedError(
            f"{what} {self.info.name}, on a service that runs code apart from the model's weights", fix=_TRUST
        )


def _kept(mask: Tensor, values: Tensor, rows: Tensor, batch: int, first: int) -> Change:
    def function(tensor: Tensor) -> Tensor:
        late = tensor[:, first:]
        others = values.to(late).expand(batch, *late.shape[1:])[rows.to(late.device)]
        return torch.cat([tensor[:, :first], torch.where(mask.to(late.device), late, others)], 1)

    return function


def _listening(function: Function, d_head: int | None) -> Change:
    """A function that is given heads apart, where there are heads, and gives a tensor of the shape it was given."""

    def listener(tensor: Tensor) -> Tensor:
        by_head = tensor if d_head is None or tensor.ndim != 3 else tensor.unflatten(-1, (-1, d_head))
        result = function(by_head)
        return tensor if result is None else result.reshape(tensor.shape).to(tensor)

    return listener


def _envoy(there: Any, name: str) -> Any:
    """The envoy of a module by the module's name."""
    for part in name.split("."):
        there = there[int(part)] if part.isdigit() else getattr(there, part)
    return there


def _pass_by(envoy: Any, side: str, changes: Sequence[Change]) -> None:
    """Inside a trace: let what goes into a module, or comes out of it, become what the changes make of it."""
    whole: Any = envoy.input if side == "in" else envoy.output
    old = new = whole[0] if isinstance(whole, tuple) else whole
    for change in changes:
        new = change(new)
    if new is old:
        return
    if side == "in":
        envoy.input = new
    else:
        envoy.output = (new, *whole[1:]) if isinstance(whole, tuple) else new
