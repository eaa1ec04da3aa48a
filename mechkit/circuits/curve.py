"""Faithfulness by size of the circuit, and the two areas that the circuit track of MIB reports.

1. Edges, or nodes, are ranked by the size of their scores, and by the scores themselves, largest first.
2. The circuit at fraction k has the first floor(k N) of all N edges (of the graph; of nodes: all that were scored).
   Edges that lie on no path from the embedding to the logits are then taken out.
3. f(k) = (m(circuit at k) - m(empty)) / (m(model) - m(empty)), m the mean metric when every edge outside the circuit
   is ablated; or every node outside it, among the kinds of site that were scored. It is never clipped.
4. CPR = area under f of the circuits by signed score: at least as good as the model at any size is best, and working
   against the behaviour counts against. CMD = area of |1 - f| of the circuits by size: 0 is best.
5. The areas are by the trapezoid rule from the first fraction to the last, here .001 to 1, over k itself: as in MIB's
   published evaluation, which counts weighted edges beside it and does not integrate over them. So f = 1 throughout
   has CPR 0.999.

Mueller et al. 2025 (arXiv 2504.13151), section 3 and appendix. MIB counts keys and values of each query head; scores of
an ungrouped graph do so here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from ..backends.edge_masks import Stages
from ..edge_scores import EdgeScores
from ..errors import OptionError
from ..results import Scores, as_html, provenance
from ..sites import site
from .keep import KINDS, EdgeKeeper, Keeper
from .statistics import areas, drawn_faithfulness, faithfulness, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..edits import Ablation
    from ..graph import Graph
    from ..model import Model
    from ..tasks.task import Task

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RANKINGS = ("size", "signed")


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness of circuits of growing size.

    Attributes:
        frame: a row a circuit: ``ranking`` (``"size"`` or ``"signed"``), ``fraction``, ``chosen`` (how many edges, or
            nodes, that is), ``edges`` or ``nodes`` (how many are left without dead ends), ``faithfulness``, ``low``
            and ``high`` (its 95% interval over prompts), ``metric`` (the mean raw metric).
        cpr, cmd: the areas; see the module.
        cpr_interval, cmd_interval: their 95% bootstrap intervals over prompts.
        model_metric, empty_metric: mean metric of the model, and with everything ablated.
        meta: how it was measured.
    """

    frame: pd.DataFrame
    cpr: float
    cmd: float
    cpr_interval: tuple[float, float]
    cmd_interval: tuple[float, float]
    model_metric: float
    empty_metric: float
    meta: Mapping[str, Any]

    def plot(self) -> Figure:
        """Faithfulness by fraction, for both rankings, as a matplotlib figure."""
        from ..view.curves import fraction_curve

        return fraction_curve(self)

    def __repr__(self) -> str:
        both = (("CPR", self.cpr, self.cpr_interval), ("CMD", self.cmd, self.cmd_interval))
        parts = [f"{name} {value:.3f} (95% interval {low:.3f} to {high:.3f})" for name, value, (low, high) in both]
        return f"Curve of {len(self.frame)} circuits: {', '.join(parts)}"

    def _repr_html_(self) -> str:
        return as_html(self.frame, repr(self))


def curve(
    scores: Scores | EdgeScores,
    model: Model,
    task: Task,
    *,
    ablation: Ablation = "resample",
    reference: Task | None = None,
    fractions: Sequence[float] = FRACTIONS,
    prune: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Curve:
    """Evaluate the circuits of a ranking, from the smallest to the whole model.

    Costs a run of the task for each circuit, less the parts that do nothing in it: with the ten fractions of MIB, two
    times nine circuits.

    Args:
        scores: of every edge of the graph; or of nodes: whole heads, MLPs, or both.
        model: the model they are of.
        task: held-out prompts.
        ablation: what is read in place of what is not in the circuit: what the prompt's corrupt twin gives
            (``"resample"``), its mean over the corrupt prompts of the template (``"mean"``), or ``"zero"``.
        reference: whose corrupt prompts give the values; left out: ``task``.
        fractions: of the edges, or nodes; rising.
        prune: take dead ends out of circuits of edges.
        seed: of the bootstrap.
        progress: show a bar.

    Raises:
        OptionError: fractions that do not rise from above 0 to at most 1, or edges or nodes without a score.
        UnsupportedError: scores of other sites than heads and MLPs.
        MetricError: the model does no better than with everything ablated.
    """
    keeper = keeper_of(scores, model, task, ablation, reference)
    return measured(keeper, scores, model, task, fractions, prune, seed, progress, ablation)


def keeper_of(
    scores: Scores | EdgeScores, model: Model, task: Task, ablation: Ablation, reference: Task | None
) -> Keeper | EdgeKeeper:
    """What measures circuits of those edges, or those nodes.

    Raises:
        UnsupportedError: scores of other sites than heads and MLPs.
        OptionError: scores of the edges of another graph.
    """
    if isinstance(scores, EdgeScores):
        keeper = EdgeKeeper(model, task, ablation, reference, scores.graph.ungrouped)
        if keeper.graph != scores.graph:
            raise OptionError(f"Scores of the edges of {scores.graph}", expected=f"those of {keeper.graph}")
        return keeper
    found = dict.fromkeys(site(text).kind for text in scores.frame["site"])
    kinds = [kind for kind in found if kind != "embed"]  # which is always left in
    return Keeper(model, task, ablation, reference, kinds)


def measured(
    keeper: Keeper | EdgeKeeper,
    scores: Scores | EdgeScores,
    model: Model,
    task: Task,
    fractions: Sequence[float],
    prune: bool,
    seed: int,
    progress: bool,
    ablation: str,
) -> Curve:
    """As ``curve``, with a keeper that is there already."""
    started = time.perf_counter()
    x = np.asarray(fractions, float)
    if x.ndim != 1 or len(x) < 2 or not (np.diff(x) > 0).all() or x[0] <= 0 or x[-1] > 1:
        raise OptionError(f"fractions = {list(fractions)}", expected="at least two, rising, above 0 and at most 1")
    if isinstance(keeper, EdgeKeeper):
        assert isinstance(scores, EdgeScores)
        chosen, kept, values, empty = _of_edges(keeper, scores, x, prune, progress)
    else:
        assert isinstance(scores, Scores)
        chosen, kept, values, empty = _of_nodes(keeper, scores, x, progress)
    full = keeper.model_metric
    share = np.array([faithfulness(full, one, empty) for one in values]).reshape(len(RANKINGS), -1)
    draws = drawn_faithfulness(full, values, empty, seed)
    low, high = interval(draws)
    frame = pd.DataFrame(
        {
            "ranking": np.repeat(RANKINGS, len(x)),
            "fraction": np.tile(x, len(RANKINGS)),
            "chosen": np.tile(chosen, len(RANKINGS)),
            "edges" if isinstance(keeper, EdgeKeeper) else "nodes": kept,
            "faithfulness": share.ravel(),
            "low": low,
            "high": high,
            "metric": values.mean(1),
        }
    )
    by_size, signed = np.moveaxis(draws.reshape(len(draws), len(RANKINGS), -1), 1, 0)
    cpr_low, cpr_high = interval(areas(x, signed)[0]).tolist()
    cmd_low, cmd_high = interval(areas(x, by_size)[1]).tolist()
    options = {"ablation": ablation, "fractions": x.tolist(), "prune": prune, "seed": seed}
    return Curve(
        frame=frame,
        cpr=float(areas(x, share[1])[0]),
        cmd=float(areas(x, share[0])[1]),
        cpr_interval=(cpr_low, cpr_high),
        cmd_interval=(cmd_low, cmd_high),
        model_metric=float(full.mean()),
        empty_metric=float(empty.mean()),
        meta=provenance(model, task, "curve", time.perf_counter() - started, **options),
    )


def pruned(masks: np.ndarray, graph: Graph) -> np.ndarray:
    """Sets of edges ``[sets, sources, targets]`` without dead ends."""
    return Stages(graph).alive(torch.from_numpy(masks)).numpy()


def _counts(fractions: np.ndarray, total: int) -> np.ndarray:
    return np.floor(fractions * total + 1e-9).astype(int)


def _of_edges(
    keeper: EdgeKeeper, scores: EdgeScores, fractions: np.ndarray, prune: bool, progress: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """How many edges were chosen, how many are left, their metric ``[circuits, n]``, and with none."""
    exists, matrix = keeper.graph.exists, scores.matrix()
    if missing := int(np.isnan(matrix[exists]).sum()):
        raise OptionError(f"{missing} of {len(keeper.graph)} edges have no score", expected="scores of every edge")
    chosen = _counts(fractions, len(keeper.graph))
    masks = np.zeros((1 + len(RANKINGS) * len(fractions), *exists.shape), bool)  # the first stays empty
    places = np.flatnonzero(exists)
    for number, ranking in enumerate(RANKINGS):
        key = matrix[exists] if ranking == "signed" else np.abs(matrix[exists])
        order = places[np.argsort(-key, kind="stable")]
        for i, count in enumerate(chosen):
            masks[1 + number * len(fractions) + i].flat[order[:count]] = True
    if prune:
        masks = pruned(masks, keeper.graph)
    # Circuits of both rankings may be the same, and all that have no path are empty.
    _, one_each, which = np.unique(
        np.packbits(masks.reshape(len(masks), -1), 1), axis=0, return_index=True, return_inverse=True
    )
    values = keeper.metric(masks[one_each], progress)[which.ravel()]
    return chosen, masks[1:].sum((1, 2)), values[1:], values[0]


def _of_nodes(
    keeper: Keeper, scores: Scores, fractions: np.ndarray, progress: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """As ``_of_edges``, of nodes."""
    rows = scores.frame["kind"].isin(KINDS).to_numpy()
    nodes, values = [site(text) for text in scores.frame["site"][rows]], scores.frame["score"].to_numpy(float)[rows]
    if len({*nodes}) < len(nodes):
        raise OptionError("Scores with several rows of the same node", expected="one row a node")
    if missing := len(keeper.parts) - int(np.isfinite(values).sum()):
        raise OptionError(
            f"{missing} of {len(keeper.parts)} nodes of these kinds have no score", expected="one of each"
        )
    chosen = _counts(fractions, len(nodes))
    orders = [np.argsort(-key, kind="stable") for key in (np.abs(values), values)]
    sets = [[nodes[i] for i in order[:count]] for order in orders for count in chosen]
    metric = keeper.metric([[], *sets], progress)
    return chosen, np.tile(chosen, len(RANKINGS)), metric[1:], metric[0]
