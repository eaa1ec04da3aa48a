"""Is it the circuit that does it? Take everything else out, and see.

1. Ablate every head outside the circuit: to its mean over the corrupt prompts at that position of the template, to
   zero, or to its value on the prompt's own corrupt twin (resample).
2. faithfulness = (circuit - empty) / (model - empty): mean metric with the circuit left in, with no head left in,
   with every head left in. It is reported as it is: above 1 when the circuit does better than the model, which
   happens when heads that work against the behaviour are left out.
3. Its interval is the bootstrap percentile interval over prompts (10,000 draws of prompts, 95%).
4. The control: the same for sets drawn at random with as many heads in each layer.
5. The curve: the same for the first 1, 2, 3 ... nodes of the circuit.

Wang et al. 2022 (arXiv 2211.00593), section 4; Mueller et al. 2025 (arXiv 2504.13151) for the normalisation.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import MetricError, OptionError, UnsupportedError
from ..results import as_html, provenance
from ..sites import HeadSet
from .keep import Keeper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task
    from .circuit import Circuit

_DRAWS = 10_000


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How much of the behaviour a circuit carries out, beside random sets of heads.

    Attributes:
        faithfulness: fraction of the model's metric, above the empty circuit's, that the circuit gives.
        interval: its 95% bootstrap interval over prompts.
        model_metric, circuit_metric, empty_metric: mean metric with every head, with the circuit's, with none.
        control: a row a random set: ``seed``, ``heads``, ``faithfulness``.
        curve: a row a size: ``size``, ``node`` (the last one added), ``faithfulness``.
        meta: how it was measured.
    """

    faithfulness: float
    interval: tuple[float, float]
    model_metric: float
    circuit_metric: float
    empty_metric: float
    control: pd.DataFrame
    curve: pd.DataFrame
    meta: Mapping[str, Any]

    @property
    def frame(self) -> pd.DataFrame:
        """One row: every number of the evaluation."""
        low, high = self.interval
        row = {
            "faithfulness": self.faithfulness,
            "low": low,
            "high": high,
            "model": self.model_metric,
            "circuit": self.circuit_metric,
            "empty": self.empty_metric,
        }
        if len(self.control):
            random = self.control.faithfulness
            row |= {
                "random_mean": random.mean(),
                "random_min": random.min(),
                "random_max": random.max(),
                "random_better": int((random >= self.faithfulness).sum()),
                "random_sets": len(random),
            }
        return pd.DataFrame([row])

    def plot(self) -> Figure:
        """Faithfulness by circuit size, with the random sets, as a matplotlib figure."""
        from ..view.figures import faithfulness_curve

        return faithfulness_curve(self)

    def __repr__(self) -> str:
        low, high = self.interval
        text = f"Evaluation: faithfulness {self.faithfulness:.2f} (95% interval {low:.2f} to {high:.2f})"
        if len(self.control):
            text += f"; {len(self.control)} random sets: mean {self.control.faithfulness.mean():.2f}"
        return text

    def _repr_html_(self) -> str:
        return as_html(self.frame, "Evaluation", precision=2)


def evaluate(
    circuit: Circuit,
    model: Model,
    task: Task,
    *,
    ablation: Ablation = "mean",
    reference: Task | None = None,
    controls: int = 20,
    curve: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a circuit of heads on prompts that it was not found on.

    Args:
        circuit: its nodes must be heads.
        model: the model it was found in.
        task: held-out prompts.
        ablation: what happens to every other head: ``"mean"``, ``"zero"`` or ``"resample"``.
        reference: whose corrupt prompts give means and resampled values; left out: ``task``.
        controls: number of random sets.
        curve: measure the first 1, 2, 3 ... nodes as well.
        seed: of the random sets and the bootstrap.
        progress: show a bar.

    Raises:
        UnsupportedError: nodes that are not heads.
        MetricError: the model does no better than the empty circuit, so that no fraction is defined.
    """
    started = time.perf_counter()
    if controls < 0:
        raise OptionError(f"controls = {controls}", expected="a number from 0")
    if other := [str(node) for node in circuit.nodes if not node.is_head]:
        raise UnsupportedError(f"Evaluating a circuit with nodes {', '.join(other)}", expected="heads only")
    heads = model.heads(circuit.nodes)
    random = [heads.random_like(seed=seed * 1_000_003 + i) for i in range(controls)]
    sizes = list(range(1, len(heads))) if curve else []
    prefixes = [HeadSet(list(heads)[:size], model.n_heads) for size in sizes]
    keeper = Keeper(model, task, ablation, reference or task)
    values = keeper.metric([HeadSet((), model.n_heads), heads, *random, *prefixes], progress=progress)
    full = keeper.model_metric
    empty, whole = values[0], values[1]
    share = [faithfulness(full, one, empty) for one in values]
    random_share, sized_share = share[2 : 2 + controls], [*share[2 + controls :], share[1]]
    control = pd.DataFrame(
        {"seed": range(controls), "heads": [str(one) for one in random], "faithfulness": random_share}
    )
    nodes = [str(head) for head in heads]
    by_size = pd.DataFrame(
        {"size": [*sizes, len(heads)], "node": [nodes[size - 1] for size in [*sizes, len(heads)]]}
    ).assign(faithfulness=sized_share)
    return Evaluation(
        faithfulness=share[1],
        interval=_interval(full, whole, empty, seed),
        model_metric=float(full.mean()),
        circuit_metric=float(whole.mean()),
        empty_metric=float(empty.mean()),
        control=control,
        curve=by_size,
        meta=provenance(
            model,
            task,
            "evaluate",
            time.perf_counter() - started,
            ablation=ablation,
            controls=controls,
            seed=seed,
        ),
    )


def faithfulness(model: np.ndarray, circuit: np.ndarray, empty: np.ndarray) -> float:
    """(circuit - empty) / (model - empty), means over prompts ``[n]``.

    Raises:
        MetricError: the model is no better than the empty circuit.
    """
    gap = float(model.mean() - empty.mean())
    if abs(gap) < 1e-6:
        raise MetricError(
            f"The metric is {float(model.mean()):.4g} with every head and with none",
            expected="a task that the heads do",
        )
    return float(circuit.mean() - empty.mean()) / gap


def _interval(model: np.ndarray, circuit: np.ndarray, empty: np.ndarray, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    if len(model) < 2:
        return (float("nan"), float("nan"))

    def statistic(model: np.ndarray, circuit: np.ndarray, empty: np.ndarray, axis: int = -1) -> np.ndarray:
        low = empty.mean(axis)
        return (circuit.mean(axis) - low) / (model.mean(axis) - low)

    found = bootstrap(
        (model, circuit, empty),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=_DRAWS,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return (float(found.low), float(found.high))
