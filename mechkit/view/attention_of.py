"""The attention view of a model: what is recorded for it, and what its edits run.

1. One run records the pattern of every head, and values for the map weighted by them: ``A[q, k] |v_k W_O|``, how far
   what a head moves from a key can reach. Several prompts of one length are averaged.
2. With another prompt of the same length, a third map is the first prompt's pattern less the other's, and heads can be
   patched from it.
3. Edits run on the same prompts; the next token's probabilities at the last position (of the first prompt) are read,
   with the metric of a task where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..edits import Edit, ablate, patch_in, scale
from ..errors import MetricError, OptionError, PromptError
from ..prompts import as_batch
from ..sites import Site
from ..tasks.task import Task
from .attention_view import AttentionMap, AttentionView

if TYPE_CHECKING:
    from ..model import Model
    from ..results import Scores

_ROWS = 8  # of next tokens


def attention(
    model: Model,
    prompt: str | Sequence[str] | Tensor | Task,
    compare: str | Sequence[str] | Tensor | None = None,
    *,
    scores: Scores | None = None,
    focus: str | None = None,
    live: bool = True,
) -> AttentionView:
    """Attention of every head, in a notebook: point, choose, and edit heads while the model runs.

    Args:
        model: any loaded model.
        prompt: text; texts or ids of one length (patterns are averaged); or a task (its clean prompts, which must be of
            one length; its corrupt ones are compared).
        compare: another prompt of the same length, to compare with and to patch from.
        scores: of heads, as rings around them; the head with the largest is in focus first.
        focus: the head that is shown large first.
        live: edits can be made.

    Returns:
        The widget. ``view.selection`` and ``view.edits`` are what was chosen and edited; ``view.to_html("page.html")``
        is a page that needs no kernel.

    Raises:
        PromptError: no prompt, one longer than the model's context, or lengths that differ.
        SiteError: a focus that is no head of the model.
        OptionError: scores of something else than heads of this model.
    """
    task = prompt if isinstance(prompt, Task) else None
    tokens, _ = _of_one_length(model, prompt, "prompt")
    other = None
    if task is not None or compare is not None:
        other, _ = _of_one_length(model, task.corrupt if task is not None and compare is None else compare, "compare")
        if other.shape[1] != tokens.shape[1]:
            raise PromptError(
                f"A prompt of {tokens.shape[1]} tokens beside one of {other.shape[1]}", expected="as many tokens"
            )
    patterns, weighted = _maps(model, tokens)
    maps = [AttentionMap("pattern", patterns), AttentionMap("value-weighted", weighted)]
    if other is not None:
        maps.append(AttentionMap("difference", patterns - _maps(model, other)[0], signed=True))
    rings = None if scores is None else _rings(model, scores)
    first = focus or (str(scores.heads(1)) if scores is not None else "0.0")
    model.heads(first)
    name = f"Attention of {model.name}" + (f", mean of {len(tokens)} prompts" if len(tokens) > 1 else "")
    words = [_word(model, int(one)) for one in tokens[0]]
    runs = _Runs(model, tokens, other, task) if live else None
    return AttentionView(
        name,
        words,
        maps,
        run=None if runs is None else runs.run,
        to_edits=None if runs is None else runs.to_edits,
        scores=rings,
        compare=other is not None,
        focus=first,
    )


class _Runs:
    """What edits of a view run."""

    def __init__(self, model: Model, tokens: Tensor, other: Tensor | None, task: Task | None):
        self._model, self._tokens, self._task = model, tokens, task
        self._last = torch.full((len(tokens),), tokens.shape[1] - 1) if task is None else task.answer_positions
        self._other: dict[str, Tensor] = {}
        if other is not None:
            every = [str(one) for one in model.heads()]
            run = model.run(other, record=every)
            self._other = {head: run[head].expand(len(tokens), -1, -1) for head in every}
        self._before, self._metric = self._read([])

    def to_edits(self, changes: Sequence[Mapping[str, Any]]) -> list[Edit]:
        """What the page wrote, as edits."""
        made: list[Edit] = []
        for change in changes:
            head, how = change["head"], change["how"]
            if how == "ablate":
                made.append(ablate(head))
            elif how == "scale":
                made.append(scale(head, float(change["alpha"])))
            elif how == "patch" and self._other:
                made.append(patch_in(head, self._other[head]))
            else:
                raise OptionError(
                    f"{how!r} of {head}", expected="ablate, scale, or patch where there is another prompt"
                )
        return made

    def run(self, changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The likeliest next tokens before and now, and the metric."""
        now, metric = self._read(self.to_edits(changes)) if changes else (self._before, self._metric)
        if not bool(now.isfinite().all()):
            raise MetricError("Probabilities that are not finite numbers", fix="Undo the last edit; scale by less")
        top = torch.cat([self._before.topk(_ROWS).indices, now.topk(_ROWS).indices])
        ids = list(dict.fromkeys(top.tolist()))
        ids = sorted(ids, key=lambda i: -max(float(now[i]), float(self._before[i])))[:_ROWS]
        rows = [{"token": _word(self._model, i), "before": float(self._before[i]), "now": float(now[i])} for i in ids]
        if metric is None or self._metric is None or self._task is None:
            return {"rows": rows}
        return {"rows": rows, "metric": {"name": self._task.metric.name, "before": self._metric, "now": metric}}

    @torch.inference_mode()
    def _read(self, edits: Sequence[Edit]) -> tuple[Tensor, float | None]:
        """Probabilities ``[vocab]`` at the end of the first prompt, and the mean metric."""
        logits = self._model.read(self._tokens, self._last, None, edits).float()
        metric = None
        if self._task is not None and self._task.metric.reads != "clean":
            of = (
                logits.gather(1, self._task.answers.to(logits.device))
                if self._task.metric.reads == "answers"
                else logits
            )
            metric = float(self._task.metric(of, self._task).mean())
        return logits[0].softmax(-1).cpu(), metric


def _of_one_length(model: Model, prompts: Any, what: str) -> tuple[Tensor, Tensor]:
    tokens, lengths = as_batch(model, prompts)
    if bool((lengths != lengths[0]).any()):
        raise PromptError(
            f"{what} of {int(lengths.min())} to {int(lengths.max())} tokens", expected="prompts of one length"
        )
    return tokens[:, : int(lengths[0])], lengths


@torch.inference_mode()
def _maps(model: Model, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Patterns and value-weighted patterns, the mean over prompts ``[layers, heads, query, key]``."""
    info = model.info
    kv = [Site(layer, group, "v", info.grouped) for layer in range(info.n_layers) for group in range(info.n_kv_heads)]
    every = [Site(layer, head, "pattern") for layer in range(info.n_layers) for head in range(info.n_heads)]
    patterns, weighted = [], []
    run = model.run(tokens, record=[*every, *kv])
    branches = getattr(model.backend, "branches", None)  # a remote model's weights are elsewhere
    for layer in range(info.n_layers):
        pattern = torch.stack([run[f"{layer}.{head}.pattern"] for head in range(info.n_heads)], 1).float()
        moved = []
        for head in range(info.n_heads):
            value = run[f"{layer}.{head}.v"].float()  # [batch, key, d_head]
            moved.append(((value @ branches.weight("o", layer)[head].float()) if branches else value).norm(dim=-1))
        patterns.append(pattern.mean(0).cpu())
        weighted.append((pattern * torch.stack(moved, 1)[:, :, None]).mean(0).cpu())
    return torch.stack(patterns).numpy(), torch.stack(weighted).numpy()


def _rings(model: Model, scores: Scores) -> tuple[np.ndarray, str]:
    grid = scores.grid("z")
    if grid.shape != (model.n_layers, model.n_heads):
        raise OptionError(
            f"Scores of {grid.shape[0]} layers of {grid.shape[1]} heads",
            expected=f"of {model.n_layers} layers of {model.n_heads}, as {model.name} has",
        )
    return grid, scores.unit


def _word(model: Model, token: int) -> str:
    return str(token) if model.tokenizer is None else model.to_text(token)
