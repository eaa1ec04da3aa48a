"""What a head does to tokens, from the weights: the OV and QK circuits over the whole vocabulary, a strip at a time.

1. OV: for every source token s, what the head adds to the logits where it attends to s:
   ``(norm(e_s) W_V + b_V) W_O U``, e the (effective) embedding, U the unembedding with the last norm folded in. Of each
   row ``[vocab]`` are kept: the token's own entry less the row's mean, and how many tokens come before it from the top
   and from the bottom.
2. Copying score: the share of tokens that are among the k most promoted of their own row (5: Wang et al. 2022).
   Suppression score: the share that are among the k most suppressed (10: McDougall et al. 2023).
3. Positive eigenvalues: ``sum(l) / sum(|l|)`` over the eigenvalues l of the OV circuit (Elhage et al. 2021). They are
   those of a ``d_head`` by ``d_head`` matrix, ``W_O U E W_V``: the vocabulary is summed over, never squared. The mean
   over logits, which no softmax sees, is taken off U first.
4. QK: for every query token t, the scores of all key tokens, and the rank of t's own key among them. The query is t's
   unembedding by default, the direction that the stream has where t is predicted, and the key its (effective)
   embedding.
   Of a rotary model at one distance, 0 where none is given.
5. The largest entries of both circuits are kept as pairs. Strips are ``[rows, vocab]``: ``vocab`` by ``vocab`` is never
   in memory.

The scale of norms is each embedding's own. Scores of QK are divided by ``sqrt(d_head)``, which is not every family's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import OptionError
from ..results import Table
from ..sites import Site
from .factored import turns_of
from .head_weights import HeadWeights
from .vocabulary import Directions, Embedding, Vocabulary

if TYPE_CHECKING:
    from ..model import Model

_NUMBERS = 1 << 22  # of a strip: 16 MB
_TOKENS = 4096  # whose directions are made at once


@dataclass(frozen=True, eq=False, repr=False)
class TokenCircuits(Table):
    """The OV and QK circuits of one head, token by token.

    Attributes:
        frame: a row a token: ``id``, ``token``, ``score`` (its own logit when it is attended to, less the mean over
            logits), ``promoted`` (how many other tokens are promoted as much or more), ``suppressed`` (how many are
            suppressed as much or more), ``attended`` (how many other keys the query of this token scores as high or
            higher than its own).
        unit: of ``score``.
        meta: model, head, options, seconds.
        pairs: the largest entries, from ``meta``: ``circuit`` (``"ov"``, ``"qk"``), ``end`` (``"+"``, ``"-"``),
            ``rank``, ``source`` (token attended to), ``destination`` (OV: whose logit; QK: the query), ``score``.
        eigenvalues: from ``meta``, the positive share of the OV circuit's, from -1 to 1.
    """

    _things: ClassVar[str] = "tokens"

    @property
    def pairs(self) -> pd.DataFrame:
        """See the class."""
        return pd.DataFrame(self.meta["pairs"], columns=["circuit", "end", "rank", "source", "destination", "score"])

    @property
    def eigenvalues(self) -> float:
        """See the class."""
        return self.meta["eigenvalues"]

    def copying(self, k: int = 5) -> float:
        """The share of tokens that are among the k that they promote most."""
        return float((self.frame["promoted"] < _count(k)).mean())

    def suppression(self, k: int = 10) -> float:
        """The share of tokens that are among the k that they suppress most."""
        return float((self.frame["suppressed"] < _count(k)).mean())

    def attends_itself(self, k: int = 1) -> float:
        """The share of tokens whose query has their own key among its k largest scores."""
        return float((self.frame["attended"] < _count(k)).mean())

    @property
    def summary(self) -> dict[str, float]:
        """The scores of the module's points 2 to 4."""
        return {
            "copying (top 5)": self.copying(),
            "suppression (bottom 10)": self.suppression(),
            "own key first": self.attends_itself(),
            "own key in the first 10": self.attends_itself(10),
            "positive eigenvalues": self.eigenvalues,
            "mean own logit": float(self.frame["score"].mean()),
        }


def token_circuits(
    model: Model | HeadWeights,
    head: str | Site | tuple[int, int],
    *,
    embedding: Embedding = "effective",
    query: Literal["unembed", "effective", "embed"] = "unembed",
    offset: int = 0,
    tokens: Sequence[int] | Tensor | None = None,
    pairs: int = 10,
    progress: bool = True,
) -> TokenCircuits:
    """What a head makes of every token that it attends to, and which tokens a query of each attends to.

    Args:
        model: local, or weights that came from one (folded or not, as they are).
        head: such as ``"9.9"``.
        embedding: of source tokens, ``"effective"`` (the stream after the first MLP, attention left out) or
            ``"embed"``.
        query: of queries, ``"unembed"``, or an embedding.
        offset: of a rotary model, how far before the query the key stands.
        tokens: ids of the rows; left out: the whole vocabulary. Ranks are always among the whole vocabulary.
        pairs: how many of the largest and smallest entries of each circuit to keep.
        progress: show a bar.

    Raises:
        SiteError: a head that is not there.
        OptionError: an unknown option, a token that is not there, an offset that cannot be seen.
        UnsupportedError: weights from a file; a model that runs elsewhere.
    """
    started = time.perf_counter()
    weights = HeadWeights.load(model)
    (site,) = heads = weights.heads([head])
    if embedding not in ("effective", "embed"):
        raise OptionError(f"embedding = {embedding!r}", expected='"effective" or "embed"')
    if query not in ("unembed", "effective", "embed"):
        raise OptionError(f"query = {query!r}", expected='"unembed", "effective" or "embed"')
    if not isinstance(pairs, int) or pairs < 0:
        raise OptionError(f"pairs = {pairs!r}", expected="a whole number from 0")
    vocabulary = Vocabulary.of(weights)
    n = len(vocabulary)
    ids = torch.arange(n) if tokens is None else torch.as_tensor(tokens, dtype=torch.long).flatten()
    if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= n:
        raise OptionError("tokens", expected=f"ids from 0 to {n - 1}, at least one")
    turns = turns_of(weights, heads, offset)
    every = torch.arange(n)
    moved, keys = _read(vocabulary, weights, site, embedding, every, "vk")
    (asked,) = _read(vocabulary, weights, site, query, ids, "q")
    asked = (asked if turns is None else asked @ turns[0]) / weights.d_head**0.5
    to_logits = vocabulary.logits(weights.of_heads("o", heads)[0])  # [d_head, vocab]
    bias = weights.of_bias("v", site)
    centred = to_logits - to_logits.mean(1, keepdim=True)
    eigenvalues = torch.linalg.eigvals((centred @ (moved if bias is None else moved - bias)).double())
    with tqdm(total=2 * len(ids), desc=f"tokens of {site}", unit="token", disable=not progress) as bar:
        own, above, below, ov = _strips(moved[ids], to_logits, ids, pairs, bar)
        _, attended, _, qk = _strips(asked, keys.mT.contiguous(), ids, pairs, bar)
    frame = pd.DataFrame(
        {
            "id": ids.numpy(),
            "token": [vocabulary.name(int(i)) for i in ids],
            "score": own.numpy(),
            "promoted": above.numpy(),
            "suppressed": below.numpy(),
            "attended": attended.numpy(),
        }
    )
    tables = [
        pd.DataFrame(
            {
                "circuit": circuit,
                "end": end,
                "rank": range(len(found)),
                "source": [vocabulary.name(int(column if circuit == "qk" else ids[row])) for _, row, column in found],
                "destination": [
                    vocabulary.name(int(ids[row] if circuit == "qk" else column)) for _, row, column in found
                ],
                "score": [score for score, _, _ in found],
            }
        )
        for circuit, ends in (("ov", ov), ("qk", qk))
        for end, found in zip("+-", ends, strict=True)
    ]
    meta = {
        **weights.meta,
        "method": f"token_circuits of {site}",
        "head": str(site),
        "embedding": embedding,
        "query": query,
        "offset": offset,
        "eigenvalues": float(eigenvalues.real.sum() / eigenvalues.abs().sum().clamp_min(1e-30)),
        "pairs": pd.concat(tables).to_dict("records"),
        "seconds": round(time.perf_counter() - started, 2),
    }
    return TokenCircuits(frame, "logit of itself, the mean taken off", meta)


def at_unit_scale(streams: Tensor, weights: HeadWeights) -> Tensor:
    """Streams ``[n, d_model]`` as folded weights read them: over the scale that a norm takes of each.

    The root mean square, of what is left when the mean is taken off where the model's norms do so.
    """
    centred = streams - streams.mean(-1, keepdim=True) if weights.mean_unseen else streams
    return streams / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def _read(
    vocabulary: Vocabulary, weights: HeadWeights, head: Site, how: Directions, tokens: Tensor, kinds: str
) -> list[Tensor]:
    """Queries, keys or values of tokens by themselves, biases included: of each kind ``[n, d_head]``."""
    heads = weights.heads([head])
    found: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for some in tokens.split(_TOKENS):
        read = at_unit_scale(vocabulary.directions(how, some), weights)
        for kind in kinds:
            bias = weights.of_bias(kind, head)
            made = read @ weights.of_heads(kind, heads)[0]  # type: ignore[arg-type]
            found[kind].append(made if bias is None else made + bias)
    return [torch.cat(parts) for parts in found.values()]


Pairs = list[tuple[float, int, int]]


def _strips(
    rows: Tensor, columns: Tensor, own: Tensor, pairs: int, bar: tqdm
) -> tuple[Tensor, Tensor, Tensor, tuple[Pairs, Pairs]]:
    """Of ``rows @ columns``, a strip at a time: own entries less their row's mean, ranks from both ends, extremes.

    Args:
        rows: ``[n, d_head]``.
        columns: ``[d_head, vocab]``.
        own: the column that is each row's own ``[n]``.
        pairs: how many extreme entries of each end.
        bar: of progress.
    """
    entries, above, below = torch.zeros(len(rows)), *torch.zeros(2, len(rows), dtype=torch.long)
    top, bottom = _Extremes(pairs), _Extremes(pairs)
    room = torch.empty(max(1, _NUMBERS // columns.shape[1]), columns.shape[1], device=columns.device)
    for where in _parts(len(rows), columns.shape[1]):
        strip = torch.mm(rows[where], columns, out=room[: where.stop - where.start])
        mine = strip.gather(1, own[where, None].to(strip.device))
        entries[where] = (mine[:, 0] - strip.mean(1)).cpu()
        above[where] = _count_true(strip >= mine) - 1
        below[where] = _count_true(strip <= mine) - 1
        top.see(strip, where.start)
        bottom.see(strip.neg_(), where.start)
        bar.update(len(strip))
    return entries, above, below, (top.found, [(-score, row, column) for score, row, column in bottom.found])


def _count_true(mask: Tensor) -> Tensor:
    """Of each row; on a CPU numpy counts several times faster than torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))
    return mask.sum(1).cpu()


def _parts(n: int, width: int) -> Iterator[slice]:
    step = max(1, _NUMBERS // width)
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


class _Extremes:
    """The k largest entries of a matrix that is seen a strip at a time."""

    def __init__(self, k: int):
        self.found: Pairs = []
        self._k = k

    def see(self, strip: Tensor, first: int) -> None:
        """Entries ``[rows, columns]``, the first row of which has this number."""
        if not self._k:
            return
        least = self.found[-1][0] if len(self.found) == self._k else -np.inf
        rows = (strip.amax(1) > least).nonzero()[:, 0]
        if not len(rows):
            return
        some = strip[rows]
        values, at = some.flatten().topk(min(self._k, some.numel()))
        width = strip.shape[1]
        new = [
            (value, first + int(rows[i // width]), i % width)
            for value, i in zip(values.tolist(), at.tolist(), strict=True)
        ]
        self.found = sorted(self.found + new, reverse=True)[: self._k]


def _count(k: int) -> int:
    if not isinstance(k, int) or k < 1:
        raise OptionError(f"k = {k!r}", expected="a whole number from 1")
    return k
