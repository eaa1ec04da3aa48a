"""Does an edit do what it is said to do? On prompts it was not made on, beside edits that should do nothing.

1. The metric of every prompt without an edit, and with it. The effect is the mean of the difference, prompt by prompt;
   its interval the 95% bootstrap percentile interval over prompts (10,000 draws).
2. Random: the same edit at as many other heads of the same layers, one draw after another; see ``controls``.
3. Reversed, where there is a ranking of heads: the same edit at the heads that it ranks last.
4. Shuffled labels: the answers change places among the prompts. An edit as it is, is measured against those. One that
   was found by training or trying is found again on its training prompts with their labels shuffled, and measured on
   these prompts as they are: what remains is what anything found in that way would do.
5. The same on fresh prompts, made after another template, where there are any: what holds on held-out prompts alone is
   of their surface.
6. The side effect: what a neutral text loses, its mean next-token loss with the edit less that without.

Controls and fresh prompts as in arXiv 2604.11867, where a probe's AUC of .68 was .52 on fresh prompts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import torch

from ..circuits.statistics import DRAWS, interval
from ..edits import Edit
from ..errors import EditError, OptionError
from ..prompts import as_batch
from ..results import Scores, provenance
from .controls import least_heads, random_edits, shuffled_labels
from .edit_evaluation import EditEvaluation
from .measure import as_edits, measured, text_losses

if TYPE_CHECKING:
    from torch import Tensor

    from ..fitting.fit import Fit
    from ..fitting.select import Selection
    from ..metrics import Metric, MetricFunction
    from ..model import Model
    from ..tasks.task import Task

Found: TypeAlias = "Edit | Sequence[Edit] | Fit | Selection"

NEUTRAL = (
    "The river runs through the middle of the town, and most of the older houses stand along its banks. In the morning "
    "people cross the bridge on their way to work, while the shops on the square open one after another. There is a "
    "market twice a week, where farmers sell bread, apples and cheese. When it rains, the water rises a little, but "
    "the walls have held for more than a hundred years."
)


def evaluate(
    model: Model,
    task: Task,
    edit: Found,
    *,
    fresh: Task | None = None,
    neutral: str | Sequence[str] | Tensor | None = None,
    ranking: Scores | None = None,
    controls: int = 20,
    metric: str | Metric | MetricFunction | None = None,
    seed: int = 0,
    progress: bool = True,
) -> EditEvaluation:
    """Evaluate an edit on prompts that it was not made on.

    Costs a run of the task for each control and the edit, three more, and for a fit or selection finding it again.

    Args:
        model: any.
        task: held-out prompts.
        edit: one, several that go together, or what ``mk.fit`` or ``mk.select`` gave.
        fresh: prompts made after another template.
        neutral: text, texts or ids ``[batch, pos]`` that the edit should leave alone; left out: a paragraph of plain
            English, where the model has a tokenizer.
        ranking: scores of heads, for the reversed control.
        controls: number of random draws.
        metric: what is measured; left out: the tasks' own.
        seed: of the draws, the shuffled labels and the bootstrap.
        progress: show bars.

    Raises:
        OptionError: fewer than no controls, a fit or selection and prompts that it was found on, a selection of
            nothing, or a ranking of too few heads.
        EditError: something that is no edit; one that the prompts, or the given neutral text, cannot have.
    """
    started = time.perf_counter()
    if not isinstance(controls, int) or controls < 0:
        raise OptionError(f"controls = {controls!r}", expected="a whole number from 0")
    found = edit if hasattr(edit, "again") else None
    edits = as_edits(edit if found is None else edit.edits)  # type: ignore[union-attr]
    if not edits:
        raise OptionError("An evaluation of no edit", expected="one edit or more")
    splits = {"held-out": task} if fresh is None else {"held-out": task, "fresh": fresh}
    splits = {name: one if metric is None else one.with_metric(metric) for name, one in splits.items()}
    notes: list[str] = []
    variants: list[tuple[str, int | None, Sequence[Edit]]] = [("edit", None, edits)]
    for draw in range(controls):
        try:
            drawn = random_edits(edits, model.info, seed * 1_000_003 + draw)
        except EditError as error:  # of a kind that has no other place
            notes.append(f"No random control: {error}")
            break
        if drawn is None:
            notes.append("No random control: there is no other place, and no other vector, for this edit.")
            break
        variants.append(("random", draw, drawn))
    if ranking is not None:
        variants.append(("reversed", None, least_heads(edits, model.info, ranking)))
    shuffled: dict[str, Task] = {}
    if found is None:
        shuffled = _shuffled(splits, seed, notes)
    else:
        _apart(found, splits)
        if (trained := shuffled_labels(found.train, seed)) is None:  # type: ignore[union-attr]
            notes.append("No shuffled labels: all training prompts have the same answers.")
        else:
            again = found.again(trained, progress=progress)  # type: ignore[union-attr]
            variants.append(("shuffled labels", None, again.edits))
    rows: list[dict[str, Any]] = []
    for split, prompts in splits.items():
        values = measured(model, prompts, [one for _, _, one in variants], progress).double().numpy()
        conditions = [("none", None), *((name, draw) for name, draw, _ in variants)]
        rows += _rows(split, conditions, values[0], values, seed)
        if split in shuffled:
            values = measured(model, shuffled[split], [edits], False).double().numpy()
            rows += _rows(split, [("shuffled labels", None)], values[0], values[1:], seed)
    frame = pd.DataFrame(rows).assign(draw=lambda table: table.draw.astype("Int64"))
    options = {"edit": " ".join(map(repr, edits)), "controls": controls, "seed": seed}
    loss = _loss(model, edits, neutral, notes)
    return EditEvaluation(
        frame=frame,
        unit=splits["held-out"].metric.unit,
        loss=loss,
        notes=tuple(notes),
        meta=provenance(model, splits["held-out"], "evaluate edit", time.perf_counter() - started, **options),
    )


def _rows(
    split: str, conditions: Sequence[tuple[str, int | None]], none: np.ndarray, values: np.ndarray, seed: int
) -> list[dict[str, Any]]:
    """Rows of the table, from the metric of each prompt: without edits ``[n]``, and under each condition."""
    low, high = bootstrap(values - none, seed)
    return [
        {
            "split": split,
            "condition": condition,
            "draw": draw,
            "metric": values[i].mean(),
            "effect": (values[i] - none).mean(),
            "low": low[i],
            "high": high[i],
            "n": len(none),
        }
        for i, (condition, draw) in enumerate(conditions)
    ]


def bootstrap(values: np.ndarray, seed: int) -> np.ndarray:
    """95% bootstrap percentile intervals of means over prompts: ``[k, n]`` to ``[2, k]``; NaN of one prompt."""
    n = values.shape[1]
    if n < 2:
        return np.full((2, len(values)), np.nan)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS) / n
    return interval(counts @ values.T)


def _shuffled(splits: Mapping[str, Task], seed: int, notes: list[str]) -> dict[str, Task]:
    shuffled = {split: shuffled_labels(prompts, seed) for split, prompts in splits.items()}
    if same := [split for split, prompts in shuffled.items() if prompts is None]:
        notes.append(f"No shuffled labels: all prompts have the same answers ({', '.join(same)}).")
    return {split: prompts for split, prompts in shuffled.items() if prompts is not None}


def _apart(found: Any, splits: Mapping[str, Task]) -> None:
    """Whether no prompt is one that the edit was found on."""
    known = set(_prompts(found.train))
    for split, prompts in splits.items():
        if seen := [i for i, prompt in enumerate(_prompts(prompts)) if prompt in known]:
            raise OptionError(
                f"{len(seen)} of {len(prompts)} {split} prompts are among those that the edit was found on",
                expected="other prompts",
                fix="Evaluate on .held_out, or without duplicates",
            )


def _prompts(task: Task) -> list[tuple[int, ...]]:
    return [tuple(ids[:n]) for ids, n in zip(task.clean.tolist(), task.lengths.tolist(), strict=True)]


def _loss(
    model: Model, edits: Sequence[Edit], neutral: str | Sequence[str] | Tensor | None, notes: list[str]
) -> tuple[float, float] | None:
    if all(edit.positions == (-1,) for edit in edits):
        notes.append("No side effect: the edit is at the last position alone, which no next token is known of.")
        return None
    if neutral is None and model.tokenizer is None:
        notes.append("No side effect: the model has no tokenizer, and no neutral text was given.")
        return None
    if neutral is None:
        tokens = torch.tensor([model.encode(NEUTRAL)[: model.info.n_ctx]])
        lengths = torch.tensor([tokens.shape[1]])
    else:
        tokens, lengths = as_batch(model, neutral)
    try:
        without, edited = text_losses(model, tokens, lengths, [edits]).tolist()
    except EditError as error:
        if neutral is not None:
            raise
        notes.append(f"No side effect: {error}")
        return None
    return without, edited
