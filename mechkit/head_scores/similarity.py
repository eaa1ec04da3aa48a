"""Similarity of heads: which of them do the same?

1. ``of="output"``: what two heads put out (z) at the same tokens, rows of X and Y. ``cka``: with columns centred,
   ``|X^T Y|^2 / (|X^T X| |Y^T Y|)``; 1 for heads that differ by a rotation. ``cosine``: the mean over tokens.
2. ``of="pattern"``: their attention. ``js``: 1 less the mean over queries of the Jensen-Shannon distance (to base 2, so
   from 0 to 1); ``cosine``: of all weights as one vector.
3. ``of="k"``, ``"v"``, ``"ov"``: their matrices, norms folded in; ``cka`` with the dimensions of the stream that they
   read as rows, ``cosine`` of all entries. Heads that share a key have the similarity 1.
4. Of outputs, all pairs are one product: of ``cka`` each head is the vector ``X X^T``, and ``|X^T Y|^2`` is the inner
   product of two. Of many tokens, ``tokens`` are drawn. ``W_V W_O`` is never made: ``cka`` of it is that of ``W_V L``
   with ``L L^T = W_O W_O^T``.

Chen et al. 2024 (arXiv 2406.06567) on keys and values; Kornblith et al. 2019 (arXiv 1905.00414) for CKA.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.hooks import Function
from ..backends.lens import local_backend
from ..backends.window import Key
from ..errors import OptionError, PromptError
from ..prompts import as_batch
from ..results import Table
from ..sites import Site
from ..weights.head_weights import HeadWeights
from .passes import head_vectors, pattern_numbers, run_past
from .tables import about

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts

Of = Literal["output", "pattern", "ov", "k", "v"]
Measure = Literal["cka", "cosine", "js"]
MEASURES: dict[str, tuple[str, ...]] = {
    "output": ("cka", "cosine"),
    "pattern": ("js", "cosine"),
    "ov": ("cosine", "cka"),
    "k": ("cosine", "cka"),
    "v": ("cosine", "cka"),
}


@dataclass(frozen=True, eq=False, repr=False)
class HeadPairs(Table):
    """How alike two heads are.

    Attributes:
        frame: a row a pair, each once: ``site``, ``other``, ``layer`` (of ``site``), ``other_layer``, ``score``.
        unit: of ``score``.
        meta: of every result.
    """

    _things: ClassVar[str] = "pairs"

    def matrix(self) -> pd.DataFrame:
        """Every head with every other, 1 with itself; missing where they were not compared."""
        names = sorted({*self.frame["site"], *self.frame["other"]}, key=lambda name: tuple(map(int, name.split("."))))
        square = pd.DataFrame(np.eye(len(names)), names, names).replace(0.0, np.nan)
        for site, other, score in zip(self.frame["site"], self.frame["other"], self.frame["score"], strict=True):
            square.loc[site, other] = square.loc[other, site] = score
        return square


def similarity(
    model: Model,
    data: Prompts | None = None,
    *,
    of: Of = "output",
    within: Literal["layer", "all"] = "layer",
    measure: Measure | None = None,
    tokens: int = 256,
    seed: int = 0,
) -> HeadPairs:
    """How alike the heads of a model are, two by two.

    Args:
        model: any; whose attention patterns can be seen, of ``"pattern"``; whose weights, of matrices.
        data: text, texts, ids ``[batch, pos]``, or a task (its clean prompts); of ``"output"`` and ``"pattern"``.
        of: what is compared.
        within: pairs of a layer, or all.
        measure: see the module; left out: the first of ``cka`` (output), ``js`` (pattern), ``cosine`` (matrices).
        tokens: of outputs, how many positions are drawn at most; of patterns, how many queries.
        seed: of the draw.

    Raises:
        OptionError: a word that is none of those; a measure that does not go with what is compared.
        PromptError: no data where there must be.
        UnsupportedError: patterns or weights that cannot be seen.
    """
    started = time.perf_counter()
    if of not in MEASURES:
        raise OptionError(f"of = {of!r}", expected="one of " + ", ".join(MEASURES))
    chosen = measure or MEASURES[of][0]
    if chosen not in MEASURES[of]:
        raise OptionError(f"measure = {measure!r} of {of!r}", expected="one of " + ", ".join(MEASURES[of]))
    if within not in ("layer", "all"):
        raise OptionError(f"within = {within!r}", expected='"layer" or "all"')
    if not isinstance(tokens, int) or tokens < 2:
        raise OptionError(f"tokens = {tokens!r}", expected="a whole number from 2")
    every = list(range(model.n_layers))
    groups = [every] if within == "all" else [[layer] for layer in every]
    if of in ("output", "pattern"):
        if data is None:
            raise PromptError(f"No data, of which {of}s are compared", expected="text, texts, ids, or a task")
        ids, lengths = as_batch(model, data)
        found = _of_runs(model, ids, lengths, _drawn(lengths, tokens, seed), of, chosen, groups)
    else:
        found = _of_weights(model, of, chosen, groups)
    parts = []
    for layers, square in zip(groups, found, strict=True):
        sites = [Site(layer, head) for layer in layers for head in range(model.n_heads)]
        one, two = np.triu_indices(len(sites), 1)
        names, of_layer = np.array([str(site) for site in sites]), np.array([site.layer for site in sites])
        columns = {"site": names[one], "other": names[two], "layer": of_layer[one], "other_layer": of_layer[two]}
        parts.append(pd.DataFrame({**columns, "score": square[one, two].double().numpy()}))
    frame = pd.concat(parts, ignore_index=True)
    meta = about(model, data, "similarity", started, of=of, within=within, measure=chosen, tokens=tokens, seed=seed)
    return HeadPairs(frame, f"{chosen} of {of}", meta)


def _drawn(lengths: Tensor, most: int, seed: int) -> Tensor:
    """Positions of each prompt ``[n, m]``, at most so many in all, -1 where a prompt has fewer."""
    every = (torch.arange(int(lengths.max())) < lengths[:, None]).nonzero()
    if len(every) < 2:
        raise PromptError(f"{len(every)} token", expected="at least two, to compare heads at")
    chosen = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:most]]
    counts = chosen[:, 0].bincount(minlength=len(lengths))
    out = torch.full((len(lengths), int(counts.max())), -1)
    for prompt in range(len(lengths)):
        own = chosen[chosen[:, 0] == prompt, 1].sort().values
        out[prompt, : len(own)] = own
    return out


@where_the_model_is
def _of_runs(
    model: Model, tokens: Tensor, lengths: Tensor, positions: Tensor, of: str, measure: str, groups: list[list[int]]
) -> list[Tensor]:
    """Similarities of all heads of each group of layers ``[heads, heads]``."""
    there = positions >= 0
    if of == "output":
        z = head_vectors(model, tokens, lengths, positions)[there]  # [m, layers, heads, d_head]
        compared = alike_by_kernels if measure == "cka" else alike_by_token
        return [compared(z[:, layers].flatten(1, 2).transpose(0, 1)) for layers in groups]
    rows = _rows_of_patterns(model, tokens, lengths, positions)
    compared = alike_by_distribution if measure == "js" else alike_as_vectors
    return [compared(torch.cat([rows[layer] for layer in layers])) for layers in groups]


def _rows_of_patterns(model: Model, tokens: Tensor, lengths: Tensor, positions: Tensor) -> list[Tensor]:
    """Attention of some queries, of each layer ``[heads, queries, key]``."""
    backend = local_backend(model, "Patterns of")
    info, kept = backend.info, [[] for _ in range(model.n_layers)]

    def listen(prompts: Tensor) -> dict[Key, Function]:
        which, slot = (positions[prompts] >= 0).nonzero(as_tuple=True)
        where = positions[prompts][which, slot]

        def pattern(layer: int) -> Any:
            def function(weights: Tensor) -> None:
                found = weights[which, :, where].float().transpose(0, 1).cpu()
                kept[layer].append(torch.nn.functional.pad(found, (0, tokens.shape[1] - found.shape[-1])))

            return function

        return {("pattern", layer): pattern(layer) for layer in range(info.n_layers)}

    run_past(backend, tokens, lengths, pattern_numbers(info, lengths), listen)
    return [torch.cat(some, 1) for some in kept]


@where_the_model_is
def _of_weights(model: Model, of: str, measure: str, groups: list[list[int]]) -> list[Tensor]:
    """As ``_of_runs``, of the heads' matrices."""
    out = []
    for layers in groups:
        weights = HeadWeights.of_layers(model, layers, True, None)
        read = weights.expanded("v" if of == "ov" else of).flatten(0, 1)  # type: ignore[arg-type]
        write = weights.expanded("o").flatten(0, 1) if of == "ov" else None
        out.append(alike_matrices(read, write, measure).cpu())
    return out


def alike_by_kernels(x: Tensor) -> Tensor:
    """Linear CKA of each two of ``[heads, n, width]``: ``[heads, heads]``."""
    centred = x - x.mean(1, keepdim=True)
    return alike_as_vectors(centred @ centred.mT)


def alike_by_token(x: Tensor) -> Tensor:
    """The mean over n of the cosine of each two of ``[heads, n, width]``."""
    unit = torch.nn.functional.normalize(x, dim=-1).flatten(1)
    return unit @ unit.mT / x.shape[1]


def alike_as_vectors(x: Tensor) -> Tensor:
    """The cosine of each two of ``[heads, ...]``, all axes but the first as one."""
    unit = torch.nn.functional.normalize(x.flatten(1), dim=-1)
    return unit @ unit.mT


def alike_by_distribution(x: Tensor) -> Tensor:
    """1 less the mean Jensen-Shannon distance of each two of ``[heads, n, outcomes]``."""
    shares = x / x.sum(-1, keepdim=True).clamp_min(1e-12)
    own = _entropy(shares)  # [heads, n]
    out = torch.zeros(len(x), len(x))
    for head in range(len(x)):
        divergence = _entropy((shares + shares[head]) / 2) - (own + own[head]) / 2
        out[head] = 1 - divergence.clamp(0, 1).sqrt().mean(-1)
    return out


def _entropy(shares: Tensor) -> Tensor:
    """In bits."""
    return torch.special.entr(shares).sum(-1) / np.log(2)


def alike_matrices(read: Tensor, write: Tensor | None, measure: str) -> Tensor:
    """CKA or cosine of each two of ``read[i] write[i]``; without ``write``, of ``read[i]``.

    Args:
        read: ``[heads, d_model, d_head]``.
        write: ``[heads, d_head, d_model]``.
        measure: ``"cka"`` or ``"cosine"``.
    """
    if measure == "cka":
        read = read - read.mean(1, keepdim=True)
        if write is not None:
            values, vectors = torch.linalg.eigh((write @ write.mT).double())
            read = read @ (vectors * values.clamp_min(0).sqrt()[:, None]).to(read)
    out = torch.zeros(len(read), len(read), device=read.device)
    for head in range(len(read)):
        products = torch.einsum("de,hdf->hef", read[head], read)
        if measure == "cka":
            out[head] = products.square().sum((1, 2))
        elif write is None:
            out[head] = products.diagonal(dim1=1, dim2=2).sum(-1)
        else:
            out[head] = (products * torch.einsum("em,hfm->hef", write[head], write)).sum((1, 2))
    sizes = out.diagonal().clamp_min(1e-30).sqrt()
    return out / (sizes[:, None] * sizes)
