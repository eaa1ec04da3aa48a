"""Retrieval heads: which heads look at the token that is copied, while the model copies it out of a long text?

1. The model continues ``context + question``, the likeliest token each time; the needle is a piece of the context.
2. By causality, the row of attention that made a new token is that of the token before it in a run of the whole text.
   So one run of the text with its continuation has all rows.
3. A head has copied a position of the needle where, at some step, it attends to that position most and the token there
   is the one that was made. Its score in a run is the share of the needle's positions that it has copied.
4. Runs count where the model did copy: the recall of the needle's words (ROUGE-1) in what it wrote is above ``recall``.
   Scores are means over these runs. Where they are few, heads must not be ranked: nearly all of them tie at 0.
5. One step, of a task with a span: the share of prompts in which the answer position attends most to a position in the
   span whose token is the correct answer. Nothing is generated.

Wu et al. 2024 (arXiv 2404.15574), section 2.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.hooks import Function
from ..backends.lens import local_backend
from ..backends.window import Key
from ..errors import OptionError, PromptError, TaskError
from ..prompts import as_batch
from ..results import Scores
from ..sites import SitesLike
from ..tasks.task import Task
from ..tasks.text import pad_right
from .needles import Needle, Placed, placed
from .passes import pattern_numbers, run_past
from .tables import ENOUGH, head_scores

if TYPE_CHECKING:
    import pandas as pd

    from ..model import Model

_WORD = re.compile(r"\w+")
_TOKENS = 8192  # of prompts that are continued together


def retrieval(
    model: Model,
    data: Task | pd.DataFrame | Sequence[Needle | Placed | tuple[str, str, str]],
    *,
    span: str | None = None,
    max_new_tokens: int = 50,
    recall: float = 0.5,
    heads: SitesLike | None = None,
    each: bool = False,
) -> Scores:
    """How far each head finds the tokens that the model copies out of a context.

    Args:
        model: any whose attention patterns can be seen.
        data: needles, each a ``Needle``, ``(context, needle, question)``, or a ``Placed`` of token ids; a table with
            columns ``context``, ``needle``, ``question``; or a task, of which one step is looked at (point 5).
        span: of a task, the span that holds the answer.
        max_new_tokens: how many tokens are made at most.
        recall: above which recall of the needle a run counts.
        heads: only these; left out: all.
        each: a row a head and run that counts, in place of means.

    Returns:
        A row a head, from 0 to 1; ``meta["recalls"]`` has each run's recall.

    Raises:
        OptionError: a recall outside 0 to 1, a span without a task or the other way round.
        TaskError: a span that the task does not have, or that never has the correct answer in it.
        PromptError: no needles; a needle that is not in its context, or not once.
        UnsupportedError: patterns that cannot be seen.
    """
    started = time.perf_counter()
    chosen = None if heads is None else list(model.heads(heads))
    if not 0 <= recall <= 1:
        raise OptionError(f"recall = {recall!r}", expected="a number from 0 to 1")
    if isinstance(data, Task):
        if span is None:
            raise OptionError(
                "A task without a span", expected="span=, one of " + ", ".join(data.spans), fix="Or give needles"
            )
        found = _one_step(model, data, span)
        return head_scores(
            model, found, "share of prompts", "retrieval", started, data, each=each, heads=chosen, span=span
        )
    if span is not None:
        raise OptionError(f"span = {span!r} of data that is no task", expected="a task, or no span")
    needles = [placed(model, one) for one in _listed(data)]
    if not needles:
        raise PromptError("No needles", expected="at least one (context, needle, question)")
    texts = _continued(model, needles, max_new_tokens)
    shares = _copied(model, texts, [len(one.ids) for one in needles], [(one.start, one.stop) for one in needles])
    recalls = [_recall(model, one, text[len(one.ids) :]) for one, text in zip(needles, texts, strict=True)]
    kept = torch.tensor([one > recall for one in recalls])
    n = int(kept.sum())
    why = f"only {n} of {len(needles)} runs were kept, in which the model copies the needle" if n < ENOUGH else ""
    scores = head_scores(
        model,
        shares[..., kept],
        "share of the needle",
        "retrieval",
        started,
        None,
        each=each,
        heads=chosen,
        unranked=why,
        max_new_tokens=max_new_tokens,
        recall=recall,
    )
    told = {"data": {"needles": len(needles), "begins": _begins(model, needles[0])}, "recalls": recalls}
    return Scores(scores.frame, scores.unit, {**scores.meta, **told})


def _listed(data: Any) -> list[Any]:
    if hasattr(data, "itertuples"):
        missing = [name for name in ("context", "needle", "question") if name not in data]
        if missing:
            raise PromptError(
                f"The table has columns {list(map(str, data.columns))}", expected="context, needle, question"
            )
        return [Needle(row.context, row.needle, row.question) for row in data.itertuples()]
    if isinstance(data, str | Tensor) or not isinstance(data, Sequence):
        raise PromptError(f"{type(data).__name__} as needles", expected="a list of (context, needle, question)")
    return list(data)


def _begins(model: Model, one: Placed) -> str:
    return str(list(one.ids[:20])) if model.tokenizer is None else model.to_text(list(one.ids))[:80]


def _continued(model: Model, needles: list[Placed], max_new_tokens: int) -> list[list[int]]:
    """Ids of every prompt with what the model writes after it."""
    made: list[list[int]] = [[] for _ in needles]
    lengths = torch.tensor([len(one.ids) for one in needles])
    # Without a tokenizer nobody knows what fills a row after its end; a row by itself is not filled.
    most = 1 if model.tokenizer is None else _TOKENS
    for length in lengths.unique().tolist():
        for some in (lengths == length).nonzero()[:, 0].split(max(1, most // length)):
            out: Tensor = model.generate(torch.tensor([needles[i].ids for i in some]), max_new_tokens=max_new_tokens)
            for i, row in zip(some.tolist(), out.tolist(), strict=True):
                while len(some) > 1 and len(row) > length and row[-1] == model.pad_token:
                    row.pop()
                made[i] = row
    return made


def _recall(model: Model, one: Placed, new: list[int]) -> float:
    """The share of the needle's words, each as often as it stands there, that were written."""
    wanted, written = (
        (Counter(map(str, ids)) if model.tokenizer is None else Counter(_WORD.findall(model.to_text(ids).lower())))
        for ids in (list(one.ids[one.start : one.stop]), new)
    )
    return sum((wanted & written).values()) / max(1, sum(wanted.values()))


@where_the_model_is
def _copied(model: Model, texts: list[list[int]], prompts: list[int], spans: list[tuple[int, int]]) -> Tensor:
    """The share of the needle's positions that each head has copied ``[layers, heads, n]``.

    Args:
        model: any.
        texts: ids of prompts with what was made after them.
        prompts: how many tokens of each are the prompt.
        spans: of each needle, first position and one past the last.
    """
    info = model.info
    out = torch.zeros(info.n_layers, info.n_heads, len(texts))
    tokens, lengths = pad_right(texts, 0)

    def look(i: int, layer: int, best: Tensor) -> None:
        rows = torch.arange(prompts[i] - 1, len(texts[i]) - 1)  # each makes the token after it
        copied = copied_positions(best[:, rows], tokens[i], tokens[i, rows + 1], spans[i])
        out[layer, :, i] = copied.float().mean(-1)

    _most_attended(model, tokens, lengths, look)
    return out


def copied_positions(best: Tensor, tokens: Tensor, made: Tensor, span: tuple[int, int]) -> Tensor:
    """Which positions of a needle heads have copied ``[heads, needle]``, boolean; point 3 of the module.

    Args:
        best: the position that each step attends to most ``[heads, steps]``.
        tokens: ids of the text ``[pos]``.
        made: the token that each step made ``[steps]``.
        span: the needle's first position, and one past its last.
    """
    hit = tokens[best] == made  # [heads, steps]
    at = torch.arange(*span)
    return ((best[..., None] == at) & hit[..., None]).any(1)


def _one_step(model: Model, task: Task, span: str) -> Tensor:
    """Whether the answer position attends most to the answer in the span ``[layers, heads, n]``."""
    tokens, lengths = as_batch(model, task)
    where = task.span(span)
    at = torch.arange(tokens.shape[1])
    is_answer = (at >= where[:, :1]) & (at < where[:, 1:]) & (tokens == task.correct[:, None])
    if not bool(is_answer.any()):
        raise TaskError(
            f'The span "{span}" of "{task.name}" has the correct answer in no prompt',
            expected="the span that is to be copied from",
        )
    return _at_ends(model, tokens, lengths, is_answer)


@where_the_model_is
def _at_ends(model: Model, tokens: Tensor, lengths: Tensor, wanted: Tensor) -> Tensor:
    """Whether the last token of each prompt attends most to a wanted position ``[layers, heads, n]``."""
    out = torch.zeros(model.info.n_layers, model.info.n_heads, len(tokens))

    def look(i: int, layer: int, best: Tensor) -> None:
        out[layer, :, i] = wanted[i, best[:, lengths[i] - 1]].float()

    _most_attended(model, tokens, lengths, look)
    return out


def _most_attended(model: Model, tokens: Tensor, lengths: Tensor, look: Callable[[int, int, Tensor], None]) -> None:
    """Call ``look(prompt, layer, positions)`` with the key that each query attends to most ``[heads, query]``."""
    backend = local_backend(model, "Retrieval in")

    def listen(rows: Tensor) -> dict[Key, Function]:
        def pattern(layer: int) -> Callable[[Tensor], None]:
            def function(weights: Tensor) -> None:
                best = weights.argmax(-1).cpu()
                for slot, i in enumerate(rows.tolist()):
                    look(i, layer, best[slot])

            return function

        return {("pattern", layer): pattern(layer) for layer in range(backend.info.n_layers)}

    run_past(backend, tokens, lengths, pattern_numbers(backend.info, lengths), listen)
