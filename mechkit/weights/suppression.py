"""How much of what a head does is copy suppression: keep that alone, and see how much of the head's effect is left.

1. At a destination d the head adds ``sum over sources s of A[d, s] v_s W_O`` to the stream, A its pattern.
2. Of the sources only those are kept that the model predicts at d: the ``ceil(fraction * d)`` source positions before d
   whose tokens have the largest logits when the stream that enters the head's layer is read by the unembedding.
3. What is kept of a source is only what takes from its own token's logit: its projection on the token's unembedding
   (the last norm folded in), where that is negative; with ``similar`` above 1, on the span of the unembeddings of the
   tokens nearest to it, and a source counts as predicted when one of these is.
4. All other sources are replaced by their mean over prompts, position by position; the first position, where heads
   look that do nothing, is left as it is.
5. The same run with the whole head replaced by its mean is the other end. Explained is
   ``1 - KL(model || 2 to 4) / KL(model || mean)``, KL summed over all positions but the first.

McDougall et al. 2023 (arXiv 2310.04625), section 3.3: .77 for head 10.7 of GPT-2 small.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backends.lens import LensBackend, local_backend
from ..errors import MetricError, OptionError, PromptError
from ..prompts import as_batch
from ..results import Table, model_provenance
from ..sites import Site
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task


_NOTHING = 1e-6  # nats a position: no more than rounding


@dataclass(frozen=True, eq=False, repr=False)
class CopySuppression(Table):
    """What is left of a head's effect when it does copy suppression alone.

    Attributes:
        frame: a row a position: ``prompt``, ``position``, ``token``, ``score`` (KL of the model to the run with copy
            suppression alone), ``ablated`` (KL to the run with the head's mean), ``kept`` (how many sources).
        unit: of both.
        meta: model, head, options, seconds.
    """

    _things: ClassVar[str] = "positions"

    @property
    def explained(self) -> float:
        """The share of the head's effect that copy suppression keeps: 1 is all; below 0, further off than the mean."""
        return 1 - float(self.frame["score"].sum()) / max(float(self.frame["ablated"].sum()), 1e-12)

    @property
    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of ``explained`` over prompts."""
        by: Any = self.frame.groupby("prompt")[["score", "ablated"]].sum()
        values = by.to_numpy(float)
        sums = values[np.random.default_rng(0).integers(0, len(values), (2000, len(values)))].sum(1)
        low, high = np.quantile(1 - sums[:, 0] / np.maximum(sums[:, 1], 1e-12), (0.025, 0.975))
        return float(low), float(high)


def copy_suppression(
    model: Model,
    head: str | Site | tuple[int, int],
    prompts: str | Sequence[str] | Tensor | Task,
    *,
    fraction: float = 0.05,
    similar: int = 1,
    progress: bool = True,
) -> CopySuppression:
    """How much of a head's effect on what the model predicts is copy suppression.

    Args:
        model: a local model.
        head: such as ``"10.7"``.
        prompts: text, texts, ids ``[batch, pos]``, or a task (its clean prompts); at least two, over which the mean is.
        fraction: of the source positions before a destination that are kept.
        similar: how many tokens, itself included, stand for a source's token.
        progress: show a bar.

    Raises:
        SiteError: a head that is not there.
        PromptError: fewer than two prompts.
        MetricError: the head's mean over them changes no prediction, so that there is nothing to explain.
        OptionError: a fraction outside 0 to 1, or fewer than one token.
        UnsupportedError: a model that runs elsewhere, or whose blocks cannot be run one by one.
    """
    started = time.perf_counter()
    backend = local_backend(model, "Copy suppression in")
    (site,) = model.heads([head])
    if not 0 < fraction <= 1:
        raise OptionError(f"fraction = {fraction!r}", expected="above 0, at most 1")
    if not isinstance(similar, int) or similar < 1:
        raise OptionError(f"similar = {similar!r}", expected="a whole number from 1")
    tokens, lengths = as_batch(model, prompts)
    if len(tokens) < 2:
        raise PromptError(f"{len(tokens)} prompt", expected="at least two: the mean is over prompts")
    work = _Work(model, backend, site, Vocabulary.of(model), fraction, similar)
    with torch.inference_mode():
        means = _means(work, tokens, lengths, progress)
        rows = []
        for i in tqdm(range(len(tokens)), desc="suppressing", unit="prompt", disable=not progress):
            rows.append(work.compared(tokens[i, : min(int(lengths[i]), len(means))], means).assign(prompt=i))
    frame = pd.concat(rows, ignore_index=True)
    if not float(frame["ablated"].sum()) > _NOTHING * max(1, len(frame)):
        raise MetricError(
            f"The mean over these prompts takes nothing from {site}: no prediction changes",
            expected="several different prompts of at least two tokens",
        )
    meta = {
        **model_provenance(model),
        "method": f"copy_suppression of {site}",
        "head": str(site),
        "n": len(tokens),
        "fraction": fraction,
        "similar": similar,
        "seconds": round(time.perf_counter() - started, 2),
    }
    return CopySuppression(frame, "KL divergence, nats", meta)


def _means(work: _Work, tokens: Tensor, lengths: Tensor, progress: bool) -> Tensor:
    """What each source gives each destination, the mean over prompts ``[pos, pos, d_head]``.

    As far as at least two prompts go: of one alone, the mean is itself.
    """
    length = tokens.shape[1]
    total = torch.zeros(length, length, work.model.d_head)
    count = torch.zeros(length)
    for i in tqdm(range(len(tokens)), desc="means", unit="prompt", disable=not progress):
        n = int(lengths[i])
        pattern, value, _ = work.recorded(tokens[i, :n])
        total[:n, :n] += (pattern[..., None] * value[None]).cpu()
        count[:n] += 1
    shared = int((count >= 2).sum())
    return total[:shared, :shared] / count[:shared, None, None]


@dataclass(frozen=True, eq=False)
class _Work:
    model: Model
    backend: LensBackend
    site: Site
    vocabulary: Vocabulary
    fraction: float
    similar: int

    def recorded(self, tokens: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Pattern ``[pos, pos]`` and values ``[pos, d_head]`` of the head on one prompt, and the run."""
        layer, slot = self.site.layer, self.backend.info.slot(Site(self.site.layer, self.site.head, "v"))
        replay = self.backend.start(tokens[None], 0, [("pattern", layer), ("v", layer), ("z", layer)])
        pattern = replay.recorded("pattern", layer)[0, self.site.head].float()
        return pattern, replay.recorded("v", layer)[0, :, slot].float(), replay

    def compared(self, tokens: Tensor, means: Tensor) -> pd.DataFrame:
        """KL of the model's predictions to those of both runs, at every position of one prompt but the first."""
        pattern, value, replay = self.recorded(tokens)
        n, head = len(tokens), self.site.head
        out = self.backend.branches.weight("o", self.site.layer)[head].float()  # [d_head, d_model]
        given = pattern[..., None] * value[None]  # [d, s, d_head]
        mean = means[:n, :n].to(given)
        kept = self._predicted(tokens, replay.stream(self.site.layer)[0]).to(given.device)
        suppressed = self._suppressed(tokens, given, out, kept)
        rest = torch.where(kept[..., None], 0.0, mean)
        rest[:, 0] = given[:, 0]
        whole = given.sum(1) @ out
        deltas = torch.stack(
            [torch.zeros_like(whole), suppressed + rest.sum(1) @ out - whole, mean.sum(1) @ out - whole]
        )
        logits = self._logits(replay, deltas)
        own, *others = logits.float().log_softmax(-1)
        divergence = [(own.exp() * (own - other)).sum(-1).clamp_min(0)[1:].cpu().numpy() for other in others]
        return pd.DataFrame(
            {
                "position": range(1, n),
                "token": [self.vocabulary.name(int(one)) for one in tokens[1:]],
                "score": divergence[0],
                "ablated": divergence[1],
                "kept": kept.sum(1)[1:].cpu().numpy(),
            }
        )

    def _predicted(self, tokens: Tensor, stream: Tensor) -> Tensor:
        """Which sources are kept for each destination ``[d, s]``; never the first position."""
        n = len(tokens)
        stands = self._standing_for(tokens)  # [n, similar]
        logits = self.backend.readout(self.backend.bridge.ln_final(stream), None).float()  # [d, vocab]
        of_source = logits[:, stands].amax(-1)  # [d, s]
        before = torch.ones(n, n, dtype=torch.bool, device=of_source.device).tril(-1)
        before[:, 0] = False
        of_source = of_source.masked_fill(~before, -torch.inf)
        kept = torch.zeros_like(before)
        for d in range(1, n):
            best = of_source[d].topk(math.ceil(self.fraction * d)).indices
            kept[d, best] = True
        return kept & before

    def _suppressed(self, tokens: Tensor, given: Tensor, out: Tensor, kept: Tensor) -> Tensor:
        """What kept sources take from their own tokens, summed over sources ``[d, d_model]``.

        Args:
            tokens: ``[n]``.
            given: what each source gives each destination ``[d, s, d_head]``.
            out: W_O of the head ``[d_head, d_model]``.
            kept: ``[d, s]``.
        """
        stands = self._standing_for(tokens)
        directions = self.vocabulary.directions("unembed", stands.flatten()).view(*stands.shape, -1).to(out)
        basis = torch.linalg.qr(directions.mT).Q  # [s, d_model, similar]
        along = torch.einsum("dsh,shk->dsk", given, torch.einsum("hm,smk->shk", out, basis))
        of_own = torch.einsum("dsk,sk->ds", along, torch.einsum("smk,sm->sk", basis, directions[:, 0]))
        along = along * (kept & (of_own < 0))[..., None]
        return torch.einsum("dsk,smk->dm", along, basis)

    def _standing_for(self, tokens: Tensor) -> Tensor:
        """Tokens that stand for each token, itself first ``[n, similar]``."""
        if self.similar == 1:
            return tokens[:, None]
        unembed = self.vocabulary.unembed
        own = torch.nn.functional.normalize(unembed[tokens.to(unembed.device)], dim=-1)
        cosines = (own @ unembed.mT).float() / torch.linalg.vector_norm(unembed, dim=-1).float()
        cosines.scatter_(1, tokens.to(cosines.device)[:, None], torch.inf)
        return cosines.topk(self.similar).indices

    def _logits(self, replay: Any, deltas: Tensor) -> Tensor:
        """Logits at every position when this is added to what attention puts out: ``[variants, pos, vocab]``."""
        layer, backend = self.site.layer, self.backend
        stream = replay.stream(layer).expand(len(deltas), -1, -1)
        attention = backend.branches.attention_out(layer, replay.recorded("z", layer))
        stream = backend.branches.block(layer, stream, attention + deltas.to(attention))
        rows = torch.zeros(len(deltas), dtype=torch.long, device=stream.device)
        for later in range(layer + 1, backend.info.n_layers):
            stream = replay.block(later, stream, rows)
        return backend.readout(backend.bridge.ln_final(stream), None)
