"""Copying heads: which heads promote the very token that they attend to, from the weights.

1. Draw tokens s. Where a head attends to s, it adds ``(norm(e_s) W_V + b_V) W_O U`` to the logits: e is the (effective)
   embedding, U the unembedding with the last norm folded in. See ``weights.token_circuits``, which has all of it of one
   head.
2. Copying score: the share of tokens that are among the ``k`` that they promote most. Suppression: the share that are
   among the ``suppressed`` that they suppress most. Ties count as before a token.
3. Values are of a key group and layer, and ``W_O U`` of a head; logits are made a strip at a time, and only counted.

Wang et al. 2022 (arXiv 2211.00593), section 3, for copying; McDougall et al. 2023 (arXiv 2310.04625) for suppression.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.lens import local_backend
from ..errors import OptionError
from ..progress import bar
from ..prompts import as_batch
from ..results import Scores
from ..sites import SitesLike
from ..weights.head_weights import HeadWeights
from ..weights.token_circuits import at_unit_scale
from ..weights.vocabulary import Vocabulary
from .tables import head_scores

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts

_Counts = tuple[Tensor, Tensor, Tensor]
_NUMBERS = 1 << 22  # of a strip of logits: 16 MB


def copying(
    model: Model,
    data: Prompts | None = None,
    *,
    tokens: int = 512,
    k: int = 5,
    suppressed: int = 10,
    effective: bool = True,
    heads: SitesLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """How often each head promotes the token that it attends to.

    Args:
        model: any whose weights can be seen.
        data: prompts whose tokens are drawn from; left out: the whole vocabulary.
        tokens: how many different tokens are drawn at most.
        k: a token is copied where it is among the k most promoted of all.
        suppressed: a token is suppressed where it is among that many most suppressed.
        effective: take embeddings behind the first MLP, attention left out.
        heads: only these; left out: all.
        seed: of the draw.
        progress: show a bar.

    Returns:
        A row a head, ``score`` from 0 to 1; columns ``suppression``, and ``own`` (the mean of a token's own logit, the
        mean over logits taken off).

    Raises:
        OptionError: a number that is not a whole one from 1.
        SiteError: a head that is not there.
        UnsupportedError: weights that cannot be seen.
    """
    started = time.perf_counter()
    for name, value in (("tokens", tokens), ("k", k), ("suppressed", suppressed)):
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} = {value!r}", expected="a whole number from 1")
    chosen = list(model.heads(heads))
    some = drawn(model, data, tokens, seed)
    places = [(one.layer, one.head or 0) for one in chosen]
    copied, hidden, own = _counted(model, some, places, k, suppressed, effective, progress)
    options = {"tokens": len(some), "k": k, "suppressed": suppressed, "effective": effective, "seed": seed}
    values = torch.full((model.n_layers, model.n_heads, len(some)), torch.nan)
    layer, head = torch.tensor(places).T
    values[layer, head] = copied.float()
    scores = head_scores(model, values, "share of tokens", "copying", started, data, heads=chosen, **options)
    frame = scores.frame.assign(suppression=hidden.double().mean(1).numpy(), own=own.double().mean(1).numpy())
    return replace(scores, frame=frame)


def drawn(model: Model, data: Prompts | None, most: int, seed: int) -> Tensor:
    """Different tokens, at most so many, of the vocabulary or of prompts, in their order ``[n]``."""
    if data is None:
        every = torch.arange(model.info.d_vocab)
    else:
        ids, lengths = as_batch(model, data)
        every = ids[torch.arange(ids.shape[1]) < lengths[:, None]].unique()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:most]
    return every[order.sort().values]


@where_the_model_is
@torch.no_grad()
def _counted(
    model: Model,
    tokens: Tensor,
    places: list[tuple[int, int]],
    k: int,
    suppressed: int,
    effective: bool,
    progress: bool,
) -> _Counts:
    """Of some heads and tokens ``[heads, n]``: copied, suppressed, the own logit less the mean of all.

    Args:
        model: any.
        tokens: ids ``[n]``.
        places: (layer, head) of each.
        k, suppressed, effective, progress: see ``copying``.
    """
    backend = local_backend(model, "Copying by heads of")
    vocabulary = Vocabulary.of(model)
    streams = vocabulary.directions("effective" if effective else "embed", tokens)
    out: list[_Counts] = []
    weights, read, layer_of = None, streams, -1
    with bar(len(places), "copying", "head", show=progress) as shown:
        for layer, head in places:
            if weights is None or layer != layer_of:
                weights, layer_of = HeadWeights.of_layers(model, [layer], True, None), layer
                read = at_unit_scale(streams, weights)
            group = backend.info.group_of(head)
            moved = read @ weights.W_V[0, group]
            if "v" in weights.biases:
                moved = moved + weights.biases["v"][0, group].to(moved)
            to_logits = vocabulary.logits(weights.W_O[0, head])  # [d_head, vocab]
            out.append(_of_strips(moved, to_logits, tokens, k, suppressed))
            shown.update()
    copied, hidden, own = (torch.stack(parts).cpu() for parts in zip(*out, strict=True))
    return copied, hidden, own


def _of_strips(moved: Tensor, to_logits: Tensor, tokens: Tensor, k: int, suppressed: int) -> _Counts:
    """As ``_counted``, of one head ``[n]``."""
    parts: list[_Counts] = []
    vocab = to_logits.shape[1]
    room = torch.empty(max(1, _NUMBERS // vocab), vocab, device=to_logits.device)
    for rows in torch.arange(len(tokens)).split(len(room)):
        strip = torch.mm(moved[rows], to_logits, out=room[: len(rows)])
        mine = strip.gather(1, tokens[rows, None].to(strip.device))
        # Among the k largest: at most k, itself one of them, are as large; the k + 1 largest tell.
        above = strip.topk(min(k + 1, vocab), dim=1).values >= mine
        below = strip.topk(min(suppressed + 1, vocab), dim=1, largest=False).values <= mine
        parts.append((above.sum(1) <= k, below.sum(1) <= suppressed, mine[:, 0] - strip.mean(1)))
    copied, hidden, own = (torch.cat(some) for some in zip(*parts, strict=True))
    return copied, hidden, own
