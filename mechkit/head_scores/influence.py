"""What a text's tokens cost without some heads: AttentionInfluence, a score a text, and the same token by token.

1. Every text runs as it is, and once with all of the heads attending evenly to what they can see.
2. Its score is (L' - L) / L, with L and L' the mean next-token loss without and with the heads out.
3. Beside it stands the same of random heads, as many in each layer; without that nothing can be said of these heads.
4. Of tokens it is L' - L, in nats, at the token that was to be predicted.

AttentionInfluence, 2025 (arXiv 2505.07293), equation 5. There the heads are the 5% with the largest retrieval scores,
and texts are compared within a domain only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
import torch
from torch import Tensor

from ..backends.change import functions_of
from ..backends.elsewhere import where_the_model_is
from ..backends.lens import local_backend
from ..backends.window import Window
from ..decomposition.tokens import TokenScores
from ..edits import ablate
from ..errors import OptionError, PromptError
from ..progress import Bar
from ..progress import bar as progress_bar
from ..prompts import Prompts
from ..results import Table
from ..sites import Site, SitesLike
from .ablation_runs import alike, known_ablation
from .causal import batch_of, chosen_heads
from .readings import need_next_tokens, token_losses
from .tables import about, token_scores

if TYPE_CHECKING:
    from ..model import Model

_KNOWN = ("uniform", "zero")


@dataclass(frozen=True, eq=False, repr=False)
class Influence(Table):
    """One score a text.

    Attributes:
        frame: a row a text: ``text`` (its number), ``score``, ``base_loss`` and ``masked_loss`` (nats a token),
            ``random_mean``, ``random_min`` and ``random_max`` (scores of the random heads; NaN where there are none),
            ``n`` (tokens that were predicted).
        unit: of ``score``, ``random_mean``, ``random_min``, ``random_max``.
        meta: model, heads, random heads, method, options, versions, seconds.
        by_token: the scores of each text's tokens; empty of what was loaded from a file.
    """

    by_token: tuple[TokenScores, ...] = ()

    _things: ClassVar[str] = "texts"

    def tokens(self, text: int = 0) -> TokenScores:
        """The rise of the loss at every token of one text, to be shown as coloured text.

        Raises:
            OptionError: no such text, or scores that were loaded from a file, which has no tokens.
        """
        if not 0 <= text < len(self.by_token):
            raise OptionError(
                f"text = {text}",
                expected=f"0 to {len(self.by_token) - 1}" if self.by_token else "scores that were just measured",
                fix="" if self.by_token else 'Measure one text: mk.score(model, text, how="token_loss", heads=...)',
            )
        return self.by_token[text]


def attention_influence(
    model: Model,
    data: Prompts,
    *,
    heads: SitesLike,
    controls: int = 5,
    seed: int = 0,
    ablation: Literal["uniform", "zero"] = "uniform",
    progress: bool = True,
) -> Influence:
    """How much more each text costs without some heads, beside random heads of the same layers.

    Args:
        model: local or remote.
        data: text, texts, ids ``[batch, pos]``, or a task (its clean prompts).
        heads: all of them are taken out together.
        controls: how many sets of random heads, each with as many heads in each layer; they may share some.
        seed: of the random heads.
        ablation: ``"uniform"`` (even attention over all that a query can see, as published) or ``"zero"``.
        progress: show a bar.

    Returns:
        A row a text; ``.tokens(i)`` is the text's tokens, coloured by the rise of their loss.

    Raises:
        OptionError: another ablation, or a number of controls below 0.
        PromptError: a text that the model cannot run, or of a single token.
        SiteError: a head that the model does not have, or none.
        UnsupportedError: a family whose logits mechkit does not know.
    """
    started = time.perf_counter()
    known_ablation(ablation, _KNOWN)
    if not isinstance(controls, int) or isinstance(controls, bool) or controls < 0:
        raise OptionError(f"controls = {controls!r}", expected="a whole number from 0")
    chosen, (ids, lengths) = chosen_heads(model, heads), batch_of(model, data)
    need_next_tokens(lengths)
    drawn = [model.heads(chosen).random_like(seed + i) for i in range(controls)]
    found, random = _compared(model, ids, lengths, chosen, [tuple(one) for one in drawn], ablation, progress)
    base, masked = (losses.sum(1) / (lengths - 1) for losses in found)
    random = (random - base) / base
    frame = pd.DataFrame(
        {
            "text": range(len(ids)),
            "score": ((masked - base) / base).double(),
            "base_loss": base.double(),
            "masked_loss": masked.double(),
            "random_mean": random.mean(0).double() if controls else torch.nan,
            "random_min": random.amin(0).double() if controls else torch.nan,
            "random_max": random.amax(0).double() if controls else torch.nan,
            "n": lengths - 1,
        }
    )
    meta = about(model, data, "attention_influence", started, ablation=ablation, controls=controls, seed=seed)
    meta |= {"heads": list(map(str, chosen)), "random_heads": [str(one) for one in drawn]}
    tokens = [
        _of_tokens(model, data, i, ids[i, : int(lengths[i])], found[:, i], meta | {"method": "token_loss"})
        for i in range(len(ids))
    ]
    return Influence(frame, "fraction of the loss", meta, tuple(tokens))


def token_loss(
    model: Model, data: str | Tensor, *, heads: SitesLike, ablation: Literal["uniform", "zero"] = "uniform"
) -> TokenScores:
    """How much more each token of a text costs without some heads.

    Args:
        model: local or remote.
        data: one text, or ids ``[pos]``.
        heads: all of them are taken out together.
        ablation: as of ``attention_influence``.

    Returns:
        A row a token: ``score`` is the rise of its loss, in nats, ``rest`` its loss with all heads in. The first token
        is predicted from nothing; it has 0, and 0 as its ``n``.

    Raises:
        PromptError: several texts, or as of ``attention_influence``, whose other errors it raises.
    """
    started = time.perf_counter()
    known_ablation(ablation, _KNOWN)
    chosen, (ids, lengths) = chosen_heads(model, heads), batch_of(model, data)
    if len(ids) != 1:
        raise PromptError(f"{len(ids)} prompts", expected="one text")
    need_next_tokens(lengths)
    found, _ = _compared(model, ids, lengths, chosen, [], ablation, False)
    meta = about(model, data, "token_loss", started, ablation=ablation)
    return _of_tokens(model, data, 0, ids[0], found[:, 0], meta | {"heads": list(map(str, chosen))})


def _of_tokens(model: Model, data: Any, i: int, ids: Tensor, losses: Tensor, meta: dict[str, Any]) -> TokenScores:
    """Scores of the tokens of one prompt ``[pos]`` from its losses without and with heads out ``[2, pos - 1]``."""
    text = data if isinstance(data, str) else data[i] if isinstance(data, Sequence) else None
    base, masked = torch.nn.functional.pad(losses[:, : len(ids) - 1].double(), (1, 0)).numpy()
    n = [int(one > 0) for one in range(len(ids))]
    return token_scores(model, text, ids.tolist(), masked - base, "nats", meta, rest=base, n=n)


@where_the_model_is
@torch.inference_mode()
def _compared(
    model: Model,
    ids: Tensor,
    lengths: Tensor,
    heads: Sequence[Site],
    random: Sequence[Sequence[Site]],
    ablation: str,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Losses of tokens without and with heads out ``[2, n, pos - 1]``, and prompts' with random ones ``[sets, n]``."""
    sets = [(), tuple(heads), *random]
    found = torch.zeros(2, len(ids), ids.shape[1] - 1)
    means = torch.zeros(len(random), len(ids))
    with progress_bar(len(sets) * len(ids), "influence", "run", show=progress) as bar:
        for number, prompts, losses in _runs(model, ids, lengths, sets, ablation, bar):
            if number < 2:
                found[number, prompts, : losses.shape[1]] = losses
            else:
                means[number - 2, prompts] = losses.sum(1) / (lengths[prompts] - 1)
    return found.clone(), means.clone()


def _runs(
    model: Model, ids: Tensor, lengths: Tensor, sets: Sequence[Sequence[Site]], ablation: str, bar: Bar
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of the set, prompts, and losses of their tokens ``[prompts, pos - 1]`` with the set out."""
    backend = local_backend(model, "Scores of")
    backend.check_readout()
    for prompts in alike(lengths, backend.base_tokens()):
        tokens = ids[prompts, : int(lengths[prompts].max())].to(backend.info.device)
        for number, heads in enumerate(sets):
            edits = [ablate(heads, "uniform" if ablation == "uniform" else "zero")] if heads else []
            with backend.hooks(functions_of(edits, backend.info, Window(lengths[prompts]))):
                hidden = backend.body(tokens, use_cache=False).last_hidden_state.to(tokens.device)
            yield number, prompts, token_losses(backend, hidden, tokens, lengths[prompts]).cpu()
            bar.update(len(prompts))
