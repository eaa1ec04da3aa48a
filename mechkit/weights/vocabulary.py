"""The vocabulary as directions of the stream: how the first layers see a token, and how the last one names it.

1. A token's embedding is what the stream holds of it before the first block. Its effective embedding is what the stream
   holds after the first MLP, attention left out: many models only tell tokens apart there (McDougall et al. 2023).
2. What is written along a direction moves the logits by its product with the unembedding, the last norm's gain folded
   in (and its mean taken off, with LayerNorm). The scale that the last norm takes is one positive number a position,
   and stays out, and so do caps.
3. What a head reads of an embedding is what the norm in front of it makes of it, whose scale is taken from the
   embedding itself.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor

from ..backends.branches import Enough
from ..errors import OptionError, UnsupportedError
from .folding import Affine, affine
from .head_weights import HeadWeights

if TYPE_CHECKING:
    from ..model import Model

Embedding = Literal["effective", "embed"]
Directions = Literal["effective", "embed", "unembed"]
_ROWS = 2048  # tokens whose first MLP runs at once


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens of a model as directions.

    Attributes:
        model: local.
        final: what the last norm does besides scaling.
        mean: of the unembedding's rows ``[d_model]``.
    """

    model: Model
    final: Affine
    mean: Tensor

    @classmethod
    def of(cls, weights: HeadWeights | Model) -> Vocabulary:
        """Of a model, or of weights that came from one.

        Raises:
            UnsupportedError: weights from a file.
        """
        model: Any = weights.model if isinstance(weights, HeadWeights) else weights
        if model is None:
            raise UnsupportedError(
                f"The vocabulary of {weights.name}, which is a file of attention weights",
                expected="a model, with its embeddings",
                fix="Load it with mk.load",
            )
        with torch.no_grad():
            matrix = model.hf.get_output_embeddings().weight
            return cls(model, affine(model.backend.bridge.ln_final, model), matrix.mean(0, dtype=torch.float32))

    def __len__(self) -> int:
        return self.model.info.d_vocab

    @property
    def unembed(self) -> Tensor:
        """The unembedding itself ``[vocab, d_model]``, which reads what the last norm puts out."""
        return self.model.hf.get_output_embeddings().weight.detach()

    def directions(self, how: Directions, tokens: Tensor) -> Tensor:
        """Tokens as directions of the stream ``[n, d_model]``.

        Args:
            how: ``"embed"``, as the stream has them before the first block; ``"effective"``, after the first MLP,
                attention left out; ``"unembed"``, along which the stream raises their logits above the mean of all, the
                last norm folded in.
            tokens: ids ``[n]``.

        Raises:
            OptionError: another word.
        """
        if how == "unembed":
            rows = self.unembed[tokens.to(self.unembed.device)].float() - self.mean
            return self.final.before(rows.mT).mT
        if how not in ("effective", "embed"):
            raise OptionError(f"{how!r} of tokens", expected='"effective", "embed" or "unembed"')
        parts = [streams(self.model, some, how == "effective") for some in tokens.split(_ROWS)]
        return torch.cat(parts)

    def logits(self, written: Tensor) -> Tensor:
        """What is added to each logit, without scale, for what is added to the stream ``[..., d_model]``."""
        last = self.final.behind(written)
        return torch.cat([last @ some.to(last).mT for some in self.unembed.split(_ROWS)], -1)

    def written(self, direction: Tensor) -> Tensor:
        """What a unit along a direction ``[d_model]`` does to each logit, the mean taken off ``[vocab]``."""
        logits = self.logits(direction.to(self.unembed.device))
        return logits - logits.mean()

    def read(self, direction: Tensor) -> Tensor:
        """Cosine of each token's embedding with a direction ``[d_model]``: ``[vocab]``."""
        found = []
        for some in torch.arange(len(self)).split(_ROWS):
            rows = self.directions("embed", some)
            found.append(torch.nn.functional.cosine_similarity(rows, direction.to(rows)[None], dim=-1))
        return torch.cat(found)

    def ends(self, seen: Tensor, k: int) -> pd.DataFrame:
        """The k tokens with the largest and the k with the smallest values, of values ``[vocab]``.

        Returns:
            Columns ``end``, ``rank``, ``token``, ``id``, ``score``.
        """
        if not isinstance(k, int) or not 1 <= k <= len(seen):
            raise OptionError(f"k = {k!r}", expected=f"a whole number from 1 to {len(seen)}")
        rows = []
        for end, largest in (("+", True), ("-", False)):
            values, ids = seen.topk(k, largest=largest)
            for rank, (value, i) in enumerate(zip(values.tolist(), ids.tolist(), strict=True)):
                rows.append({"end": end, "rank": rank, "token": self.name(i), "id": i, "score": value})
        return pd.DataFrame(rows)

    def name(self, token: int) -> str:
        """A token as text; its number, where there is no tokenizer."""
        return str(token) if self.model.tokenizer is None else self.model.to_text(token)


@torch.inference_mode()
def streams(model: Model, tokens: Tensor, effective: bool) -> Tensor:
    """What enters block 0 of tokens by themselves, or block 1 when attention puts out nothing ``[n, d_model]``.

    Learned embeddings of positions are left out: what they add is the same for every token.
    """
    backend: Any = model.backend
    kept: dict[str, Tensor] = {}

    def embedded(x: Tensor) -> None:
        kept["embed"] = x.clone()

    def entering(x: Tensor) -> None:
        kept["stream"] = x.clone()
        raise Enough

    ids = tokens.to(model.info.device)[:, None]
    some = torch.cat([ids, (ids[:1] + 1) % model.info.d_vocab])  # two tokens at least, to tell what is the same for all
    branches = backend.branches  # tried out before anything is hung up
    with backend.hooks({("embed", -1): embedded, ("resid", 0): entering}), suppress(Enough):
        backend.body(some, use_cache=False)
    stream = kept["stream"]
    added = stream - kept["embed"]
    same = max(1e-5, 4 * torch.finfo(stream.dtype).eps)
    if float((added - added[:1]).abs().max()) <= same * max(1.0, float(stream.abs().max())):
        stream = kept["embed"]
    stream = stream[:-1]
    if effective:
        stream = branches.block(0, stream, torch.zeros_like(stream))
    return stream[:, 0].float()
