"""Attention sinks: tokens other than the first one that become like it, and hold attention for some layers.

1. Run the prompts and take, after every block, the norm of each token's stream and its cosine with the first token's.
2. The sink layers of a prompt go from the stream after the block that raises the first token's norm most, to the
   stream before the block that lowers it most; where no later block lowers it, to the end.
3. A later token is a sink in those of these layers where the size of the cosine is above ``cosine``. Its lifetime is
   how many there are; it is created by the block in front of the first of them.
4. Labels: ``"primary"``, the first token; ``"primary-like"``, a lifetime of at least ``1 - share`` of all layers, or of
   all sink layers where these are fewer; ``"noise"``, one of at most ``noise`` of all layers; else ``"secondary"``.
5. Source: of the two branches of the block that created it, the one that writes more along the first token's stream.
6. Score: attention received from later queries, the mean over queries, heads and the layers in which it is a sink.

Secondary sinks: arXiv 2512.22213, whose thresholds are of 48 layers (15 and 4 of them) and stand here as shares.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.hooks import Function
from ..backends.lens import local_backend
from ..backends.window import Key
from ..errors import OptionError
from ..prompts import as_batch
from ..results import Table
from .passes import pattern_numbers, run_past
from .tables import about

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts


@dataclass(frozen=True, eq=False, repr=False)
class SinkTokens(Table):
    """Tokens that are attention sinks.

    Attributes:
        frame: a row a token and prompt: ``prompt``, ``position``, ``token``, ``label``, ``layer`` (the block that
            created it), ``lifetime`` (layers), ``cosine`` (its size) and ``norm`` (of the stream), means over its
            layers, ``source`` (``"mlp"`` or ``"attention"``), ``score`` (attention received; missing of a prompt's last
            token). Every prompt has a row for its first token; where it has no sink layers, that is all, and its
            ``layer`` is missing.
        unit: of ``score``.
        meta: of every result; ``layers``: of each prompt, the first and the last stream of its sink layers, as of
            ``resid.<n>``, or nothing.
    """

    _things: ClassVar[str] = "tokens"


@dataclass(frozen=True)
class Sink:
    """One sink of a prompt: position, first stream in which it is one, and all of them."""

    position: int
    label: str
    streams: tuple[int, ...]


def sinks(
    model: Model,
    data: Prompts,
    *,
    cosine: float = 0.9,
    share: float = 0.3,
    noise: float = 1 / 12,
) -> SinkTokens:
    """Tokens that become attention sinks, with how long they stay so and which branch made them.

    Args:
        model: any whose attention patterns can be seen.
        data: text, texts, ids ``[batch, pos]``, or a task (its clean prompts).
        cosine: from which size of the cosine with the first token's stream a token is a sink.
        share: of the layers that a primary-like sink may miss.
        noise: share of the layers, up to which a lifetime is noise.

    Raises:
        OptionError: a number outside 0 to 1.
        UnsupportedError: patterns or streams that cannot be seen.
    """
    started = time.perf_counter()
    for name, value in (("cosine", cosine), ("share", share), ("noise", noise)):
        if not 0 <= value <= 1:
            raise OptionError(f"{name} = {value!r}", expected="a number from 0 to 1")
    tokens, lengths = as_batch(model, data)
    seen = _seen(model, tokens, lengths)
    rows, layers = [], []
    for i, length in enumerate(lengths.tolist()):
        norms, cosines = (seen[name][i, :, :length] for name in ("norms", "cosines"))
        around = sink_layers(norms[:, 0])
        layers.append([] if around is None else list(around))
        for one in labelled(cosines, around, cosine, share, noise):
            streams = torch.tensor(one.streams, dtype=torch.long)
            blocks = streams[streams < model.n_layers] if len(streams) else torch.arange(model.n_layers)
            made = one.streams[0] - 1 if one.streams else None
            received = float(seen["received"][i, blocks, one.position].mean()) if len(blocks) else np.nan
            of_branches = (
                [] if made is None else [float(seen[of][i, made, one.position]) for of in ("mlp", "attention")]
            )
            rows.append(
                {
                    "prompt": i,
                    "position": one.position,
                    "token": _name(model, int(tokens[i, one.position])),
                    "label": one.label,
                    "layer": made,
                    "lifetime": len(streams),
                    "cosine": float(cosines[streams, one.position].abs().mean()) if len(streams) else np.nan,
                    "norm": float((norms[streams] if len(streams) else norms)[:, one.position].mean()),
                    "source": "" if made is None else "mlp" if of_branches[0] >= of_branches[1] else "attention",
                    "score": received,
                }
            )
    frame = pd.DataFrame(rows).astype({"layer": "Int64"})
    meta = about(model, data, "sinks", started, cosine=cosine, share=share, noise=noise)
    return SinkTokens(frame, "attention received", {**meta, "layers": layers})


def sink_layers(norms: Tensor) -> tuple[int, int] | None:
    """First and last stream of the sink layers, of the first token's norms ``[layers + 1]``; None: they never rise."""
    steps = norms.double().diff()
    rise = int(steps.argmax())
    if not float(steps[rise]) > 0:
        return None
    fall = steps[rise + 1 :]
    if not len(fall) or not float(fall.min()) < 0:
        return rise + 1, len(norms) - 1
    return rise + 1, rise + 1 + int(fall.argmin())


def labelled(cosines: Tensor, around: tuple[int, int] | None, cosine: float, share: float, noise: float) -> list[Sink]:
    """The sinks of one prompt, the first token among them; points 3 and 4 of the module.

    Args:
        cosines: of each stream with the first token's ``[layers + 1, pos]``.
        around: as of ``sink_layers``.
        cosine, share, noise: see ``sinks``.
    """
    if around is None:
        return [Sink(0, "primary", ())]
    n_layers = len(cosines) - 1
    first, last = around
    found = [Sink(0, "primary", tuple(range(first, last + 1)))]
    like = cosines[first : last + 1].abs() > cosine
    for position in range(1, cosines.shape[1]):
        streams = tuple((first + like[:, position].nonzero()[:, 0]).tolist())
        if not streams:
            continue
        long = min((1 - share) * n_layers, last + 1 - first)
        label = "noise" if len(streams) <= noise * n_layers else "secondary"
        found.append(Sink(position, "primary-like" if len(streams) >= long else label, streams))
    return found


@where_the_model_is
def _seen(model: Model, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """What the table is made of.

    Returns:
        ``norms`` of streams and their ``cosines`` with the first token's ``[n, layers + 1, pos]``; by block
        ``[n, layers, pos]``: attention ``received``, and sizes of the cosines of what ``mlp`` and ``attention`` write
        with the first token's stream after the block.
    """
    backend = local_backend(model, "Sinks of")
    info, (n, width) = backend.info, tokens.shape
    out = {name: torch.zeros(n, info.n_layers + 1, width) for name in ("norms", "cosines")}
    out |= {name: torch.full((n, info.n_layers, width), torch.nan) for name in ("received", "mlp", "attention")}

    def listen(rows: Tensor) -> dict[Key, Function]:
        before: dict[str, Tensor] = {}
        long = int(lengths[rows].max())

        def stream(layer: int) -> Callable[[Tensor], None]:
            def function(resid: Tensor) -> None:
                resid = resid.float()
                first = resid[:, :1]
                out["norms"][rows, layer, :long] = torch.linalg.vector_norm(resid, dim=-1).cpu()
                out["cosines"][rows, layer, :long] = _cosine(resid, first)
                if layer:
                    written = resid - before["resid"]
                    for name, part in (("mlp", before["mlp"]), ("attention", written - before["mlp"])):
                        out[name][rows, layer - 1, :long] = _cosine(part, first).abs()
                before["resid"] = resid.clone()

            return function

        def mlp(value: Tensor) -> None:
            before["mlp"] = value.float().clone()

        def pattern(layer: int) -> Callable[[Tensor], None]:
            def function(weights: Tensor) -> None:
                out["received"][rows, layer, :long] = received(weights.float(), lengths[rows]).mean(1).cpu()

            return function

        functions: dict[Key, Function] = {("resid", layer): stream(layer) for layer in range(info.n_layers + 1)}
        functions |= {("mlp", layer): mlp for layer in range(info.n_layers)}
        functions |= {("pattern", layer): pattern(layer) for layer in range(info.n_layers)}
        return functions

    run_past(backend, tokens, lengths, pattern_numbers(info, lengths), listen)
    return out


def received(pattern: Tensor, lengths: Tensor) -> Tensor:
    """Attention that each key gets from each later query, the mean over these ``[batch, heads, key]``.

    Args:
        pattern: ``[batch, heads, query, key]``.
        lengths: tokens of each prompt ``[batch]``; NaN for keys that no later token of the prompt follows.
    """
    size = pattern.shape[-1]
    at = torch.arange(size, device=pattern.device)
    ends = lengths.to(pattern.device)[:, None, None]
    later = (at[:, None] > at[None]) & (at[:, None] < ends)  # [batch, query, key]
    total = (pattern * later[:, None]).sum(2)
    count = later.sum(1)[:, None]
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(one, other.expand_as(one), dim=-1).cpu()


def _name(model: Model, token: int) -> str:
    return str(token) if model.tokenizer is None else model.to_text(token)
