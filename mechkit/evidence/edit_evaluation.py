"""The result of ``evidence.evaluate``: an edit's effect, its interval, and those of its controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..results import as_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUMMARY = {"metric": "mean", "effect": "mean", "low": "min", "high": "max", "n": "first"}


@dataclass(frozen=True, eq=False, repr=False)
class EditEvaluation:
    """What an edit does to a task's metric, beside its controls.

    Attributes:
        frame: a row a condition and draw: ``split`` (``"held-out"``, ``"fresh"``), ``condition`` (``"none"``,
            ``"edit"``, ``"random"``, ``"reversed"``, ``"shuffled labels"``), ``draw`` of the random ones, ``metric``
            (mean), ``effect`` (mean difference to none, prompt by prompt), ``low`` and ``high`` (its 95% bootstrap
            interval; NaN of one prompt), ``n`` prompts.
        unit: of the metric.
        loss: of the neutral text, in nats a token: without and with the edit; None where it was not measured.
        notes: which controls could not be had, and why.
        meta: model, task, edit and options.
    """

    frame: pd.DataFrame
    unit: str
    loss: tuple[float, float] | None
    notes: tuple[str, ...]
    meta: Mapping[str, Any]

    @property
    def effect(self) -> float:
        """Of the edit, on held-out prompts."""
        return float(self._rows("edit").effect.iloc[0])

    @property
    def interval(self) -> tuple[float, float]:
        """The effect's 95% interval."""
        row = self._rows("edit").iloc[0]
        return float(row.low), float(row.high)

    @property
    def percentile(self) -> float:
        """Share of the random draws whose effect is as large in size, or larger; NaN where there are none."""
        drawn = self._rows("random").effect.abs()
        return float((drawn >= abs(self.effect)).mean()) if len(drawn) else float("nan")

    @property
    def beats_every_draw(self) -> bool:
        """Whether there are random draws, and none has an effect as large in size."""
        return self.percentile == 0

    @property
    def side_effect(self) -> float:
        """What the neutral text loses, in nats a token; NaN where it was not measured."""
        return float("nan") if self.loss is None else self.loss[1] - self.loss[0]

    @property
    def beats_controls(self) -> bool:
        """Whether the interval leaves out 0, and the effect is larger in size than that of every control; and there
        are controls."""
        low, high = self.interval
        others = self.frame[(self.frame.split == "held-out") & ~self.frame.condition.isin(["none", "edit"])]
        return bool(len(others)) and (low > 0 or high < 0) and bool((others.effect.abs() < abs(self.effect)).all())

    @property
    def summary(self) -> pd.DataFrame:
        """A row a split and condition, the random draws as one: their mean ``metric`` and ``effect``, and as ``low``
        and ``high`` their smallest and largest effect."""
        drawn, low, high = self.frame.condition == "random", self.frame.low, self.frame.high
        rows = self.frame.assign(low=low.where(~drawn, self.frame.effect), high=high.where(~drawn, self.frame.effect))
        table = rows.groupby(["split", "condition"], sort=False).agg(_SUMMARY)
        return table.reset_index()

    def plot(self) -> Figure:
        """The effect and those of the controls, with intervals, as a matplotlib figure."""
        from .figure import effects_figure

        return effects_figure(self)

    def _rows(self, condition: str) -> pd.DataFrame:
        return self.frame.loc[(self.frame["split"] == "held-out") & (self.frame["condition"] == condition)]

    def _told(self) -> str:
        low, high = self.interval
        text = f"EditEvaluation: effect {self.effect:+.3g} {self.unit} (95% interval {low:.3g} to {high:.3g})"
        if len(drawn := self._rows("random")):
            worse = int((drawn.effect.abs() >= abs(self.effect)).sum())
            text += f"; {worse} of {len(drawn)} random draws have one as large"
        text += "; it beats its controls" if self.beats_controls else "; it does not beat its controls"
        return text if self.loss is None else f"{text}; neutral text {self.side_effect:+.3g} nats a token"

    def __repr__(self) -> str:
        return "\n".join([self._told(), self.summary.to_string(index=False), *self.notes])

    def _repr_html_(self) -> str:
        return as_html(self.summary, ". ".join([self._told(), *self.notes]))
