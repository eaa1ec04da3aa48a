"""Choose among edits by trying them: one value of many, a set of heads built up one by one, or a cut of a ranking.

1. Sweep: make an edit of every candidate, measure the metric under each, take the best.
2. Greedy: begin with no head. In each round, measure the set so far with every other candidate added, and add the best
   ``keep`` of those that help. Where several together do no better than the best alone, only that one is added. Stop
   when none helps, or after the rounds that were asked for.
3. Threshold: candidates are sizes, or least scores, of a ranking of heads; each makes an edit of the heads it leaves.
4. All of it on one part of the prompts; the report is measured on the others, with controls (``evidence.evaluate``).

Greedy as in Sahara (arXiv 2410.13708, section 4), the sweep as in ZeroTuning (arXiv 2505.11739).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ..edits import Edit
from ..errors import OptionError
from ..evidence.evaluate import EditEvaluation, evaluate
from ..evidence.measure import Edits, as_edits, measured
from ..results import Scores, as_html, provenance
from ..sites import HeadSet

if TYPE_CHECKING:
    from ..metrics import Metric, MetricFunction
    from ..model import Model
    from ..tasks.task import Task

METHODS = ("sweep", "greedy", "threshold")
Make = Callable[[Any], Edits]


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """What was chosen, and everything that was tried.

    Attributes:
        chosen: the value (sweep), size or least score (threshold) that did best; of greedy the heads, which are none
            where no head helped.
        edit: the edit made of it: one, several as a tuple, or none as an empty tuple.
        frame: a row a try: ``round`` of greedy, ``candidate`` (as text), ``heads`` of threshold, ``metric`` (mean on
            the training prompts), ``effect`` (less that without edits), ``chosen``.
        train, held_out: prompts that it was chosen on, and the others.
        meta: model, task, method and options.
    """

    chosen: Any
    edit: Edit | tuple[Edit, ...]
    frame: pd.DataFrame
    train: Task
    held_out: Task
    meta: Mapping[str, Any]
    _again: Callable[[Task, bool], Selection] = field(repr=False)
    _report: Callable[[Selection], EditEvaluation] = field(repr=False)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The chosen edits, as ``model.run`` takes them."""
        return as_edits(self.edit)

    @cached_property
    def report(self) -> EditEvaluation:
        """The evaluation on held-out prompts; measured when first asked for, which chooses again on shuffled labels.

        Raises:
            OptionError: nothing was chosen.
        """
        return self._report(self)

    def again(self, task: Task, *, progress: bool = True) -> Selection:
        """Chosen anew, in the same way, on other training prompts."""
        return self._again(task, progress)

    def _told(self) -> str:
        best = self.frame[self.frame.chosen]
        effect = f"effect {best.effect.iloc[-1]:+.3g} on the training prompts" if len(best) else "nothing helped"
        return f"Selection of {self.chosen} among {len(self.frame)} tries: {effect}"

    def __repr__(self) -> str:
        return self._told() + "\n" + self._best().to_string(index=False)

    def _repr_html_(self) -> str:
        return as_html(self._best(), self._told())

    def _best(self) -> pd.DataFrame:
        return self.frame.sort_values("chosen", ascending=False, kind="stable").head(10)


def select(
    model: Model,
    task: Task,
    make: Make,
    candidates: Any,
    *,
    method: Literal["sweep", "greedy", "threshold"] = "sweep",
    objective: str | Metric | MetricFunction = "metric",
    maximise: bool = True,
    held_out: Task | None = None,
    fraction: float = 0.5,
    rounds: int = 3,
    keep: int = 1,
    ranking: Scores | None = None,
    controls: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Choose among edits by trying each.

    Costs a run of the training prompts a candidate; greedy, one a candidate and round.

    Args:
        model: any.
        task: prompts; without ``held_out`` they are split.
        make: makes the edit, or edits: of a candidate (sweep), else of a ``HeadSet``.
        candidates: values (sweep), heads (greedy), or numbers (threshold): whole ones are sizes, others least scores
            in size.
        method: see the module.
        objective: ``"metric"`` for the task's own, else a metric.
        maximise: what is best; else the smallest.
        held_out: prompts for the report, which nothing is chosen on.
        fraction: of the prompts that is chosen on, where the task is split.
        rounds: of greedy, at most.
        keep: heads added in a round, at most.
        ranking: scores of heads, for threshold.
        controls: random draws in the report.
        seed: of the split and the report.
        progress: show a bar.

    Raises:
        OptionError: an option outside its range, no candidates, or a candidate that leaves no head.
        SiteError: candidates of greedy that are no heads of the model.
        EditError: something that is no edit, or one that the prompts cannot have.
        MetricError: a metric that is not finite.
    """
    started = time.perf_counter()
    if method not in METHODS:
        raise OptionError(f"method = {method!r}", expected="one of " + ", ".join(METHODS))
    for name, number in (("rounds", rounds), ("keep", keep)):
        if not isinstance(number, int) or number < 1:
            raise OptionError(f"{name} = {number!r}", expected="a whole number from 1")
    if (ranking is None) == (method == "threshold"):
        raise OptionError(
            f"ranking = {ranking!r} with method={method!r}", expected='one with "threshold", and only then'
        )
    train, rest = task.split(fraction, seed) if held_out is None else (task, held_out)
    if objective != "metric":
        train, rest = train.with_metric(objective), rest.with_metric(objective)
    trials = _Trials(model, train, make, maximise, progress)
    if method == "greedy":
        chosen = _greedy(trials, model.heads(candidates), rounds, keep)
    elif method == "sweep":
        chosen = _best(trials, _listed(candidates))
    else:
        assert ranking is not None
        chosen = _best(trials, _listed(candidates), lambda one: _cut(ranking, one))
    options = {"objective": train.metric.name, "maximise": maximise, "rounds": rounds, "keep": keep, "seed": seed}
    used = {name: value for name, value in options.items() if method == "greedy" or name not in ("rounds", "keep")}

    def again(other: Task, show: bool) -> Selection:
        return select(
            model,
            other,
            make,
            candidates,
            method=method,
            objective=objective,
            maximise=maximise,
            held_out=rest,
            rounds=rounds,
            keep=keep,
            ranking=ranking,
            controls=controls,
            seed=seed,
            progress=show,
        )

    def report(selection: Selection) -> EditEvaluation:
        return evaluate(model, rest, selection, controls=controls, seed=seed, progress=progress)

    edit = () if chosen is None else trials.edit
    return Selection(
        chosen=model.heads(()) if chosen is None else chosen,
        edit=edit if isinstance(edit, Edit) else as_edits(edit),
        frame=pd.DataFrame(trials.rows),
        train=train,
        held_out=rest,
        meta=provenance(model, train, f"select: {method}", time.perf_counter() - started, **used),
        _again=again,
        _report=report,
    )


class _Trials:
    """Edits that were tried, a row each."""

    def __init__(self, model: Model, task: Task, make: Make, maximise: bool, progress: bool):
        self._model, self._task, self._make, self._progress = model, task, make, progress
        self._sign = 1 if maximise else -1
        self.rows: list[dict[str, Any]] = []
        self.edit: Edits = ()

    def gains(self, made_of: Sequence[Any], about: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """How much better than without edits each is, in mean ``[tries]``."""
        variants = [as_edits(self._make(one)) for one in made_of]
        values = measured(self._model, self._task, variants, self._progress).double().mean(1).numpy()
        self.rows += [
            {**told, "metric": value, "effect": value - values[0], "chosen": False}
            for told, value in zip(about, values[1:].tolist(), strict=True)
        ]
        return self._sign * (values[1:] - values[0])

    def take(self, row: int, made_of: Any) -> None:
        """The edit of a row is the one to have."""
        self.rows[row]["chosen"], self.edit = True, self._make(made_of)


def _best(trials: _Trials, candidates: Sequence[Any], made_of: Callable[[Any], Any] | None = None) -> Any:
    given = list(candidates) if made_of is None else [made_of(one) for one in candidates]
    about = [{"candidate": str(one)} for one in candidates]
    if made_of is not None:
        about = [{**told, "heads": str(heads)} for told, heads in zip(about, given, strict=True)]
    best = int(trials.gains(given, about).argmax())
    trials.take(best, given[best])
    return candidates[best]


def _greedy(trials: _Trials, candidates: HeadSet, rounds: int, keep: int) -> HeadSet | None:
    if not candidates:
        raise OptionError("Greedy selection among no heads", expected="one head or more")
    chosen, reached = candidates - candidates, 0.0
    for number in range(1, rounds + 1):
        rest = [*(candidates - chosen)]
        if not rest:
            break
        tried = [chosen | [one] for one in rest]
        first = len(trials.rows)
        gains = trials.gains(tried, [{"round": number, "candidate": str(one)} for one in rest])
        order = [i for i in np.argsort(-gains, kind="stable").tolist() if gains[i] > reached][:keep]
        if not order:
            break
        best, reached = tried[order[0]], float(gains[order[0]])
        row = first + order[0]
        if len(order) > 1:
            several = chosen | [rest[i] for i in order]
            added = HeadSet([rest[i] for i in order])
            together = float(trials.gains([several], [{"round": number, "candidate": str(added)}])[0])
            if together > reached:
                best, reached, row = several, together, len(trials.rows) - 1
        chosen = best
        trials.take(row, chosen)
    return chosen or None


def _listed(candidates: Any) -> list[Any]:
    if isinstance(candidates, str) or not hasattr(candidates, "__iter__") or not (found := list(candidates)):
        raise OptionError(f"candidates = {candidates!r}", expected="a list of one or more")
    return found


def _cut(ranking: Scores, least: float) -> HeadSet:
    """The heads with the largest scores in size: so many, or those of at least that score."""
    if isinstance(least, bool) or not isinstance(least, int | float):
        raise OptionError(f"{least!r} as a threshold", expected="a whole number of heads, or a score")
    rows = ranking.frame[ranking.frame.kind == "z"]
    size = least if isinstance(least, int) else int((rows.score.abs() >= least).sum())
    if not 1 <= size <= rows.site.nunique():
        raise OptionError(
            f"{least!r} leaves {size} heads of a ranking of {rows.site.nunique()}", expected="one of them at least"
        )
    return ranking.heads(size)
