"""Is it the circuit that does it? Take everything else out, and see.

1. Ablate everything outside the circuit: at node level every other head, or MLP, among the kinds of site that the
   circuit was chosen from; at edge level what every other edge carries. What takes its place is its mean over the
   corrupt prompts at that position of the template, zero, or its value on the prompt's own corrupt twin (resample).
2. faithfulness = (circuit - empty) / (model - empty): mean metric with the circuit left in, with nothing left in,
   with everything left in. It is reported as it is: above 1 when the circuit does better than the model, which
   happens when parts that work against the behaviour are left out.
3. Its interval is the bootstrap percentile interval over prompts (10,000 draws of prompts, 95%).
4. The control, nodes: the same for sets drawn at random with as many heads in each layer. A layer has one MLP, so MLPs
   are drawn from all layers. Edges: as many edges into each kind of target (q, k, v, MLP, logits) of each layer, drawn
   evenly from all edges there are.
5. The curve: the same for the first 1, 2, 3 ... nodes of the circuit; of edges, for ten sizes.

Wang et al. 2022 (arXiv 2211.00593), section 4; Mueller et al. 2025 (arXiv 2504.13151) for the normalisation.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..errors import OptionError
from ..graph import Graph
from ..results import as_html, provenance
from ..sites import Site
from .curve import FRACTIONS, Curve, keeper_of, measured, pruned
from .keep import EdgeKeeper
from .statistics import drawn_faithfulness, faithfulness, interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task
    from .circuit import Circuit

_SIZES = 10  # of the curve of a circuit of edges


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How much of the behaviour a circuit carries out, beside random ones.

    Attributes:
        faithfulness: fraction of the model's metric, above the empty circuit's, that the circuit gives.
        interval: its 95% bootstrap interval over prompts.
        model_metric, circuit_metric, empty_metric: mean metric with everything left in, the circuit, nothing.
        control: a row a random set: ``seed``, ``heads`` (or ``nodes``; of edges, how many are left without dead ends:
            ``edges``), ``faithfulness``.
        curve: a row a size: ``size``, ``node`` or ``edge`` (the last one added), ``faithfulness``.
        meta: how it was measured.
        areas: faithfulness of the whole ranking that the circuit was chosen from, where it was asked for.
    """

    faithfulness: float
    interval: tuple[float, float]
    model_metric: float
    circuit_metric: float
    empty_metric: float
    control: pd.DataFrame
    curve: pd.DataFrame
    meta: Mapping[str, Any]
    areas: Curve | None = None

    @property
    def cpr(self) -> float:
        """Area under faithfulness of the circuits by signed score; see ``circuits.curve``.

        Raises:
            OptionError: it was not measured.
        """
        return self._measured().cpr

    @property
    def cmd(self) -> float:
        """Area of |1 - faithfulness| of the circuits by size of score; see ``circuits.curve``.

        Raises:
            OptionError: it was not measured.
        """
        return self._measured().cmd

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
        if self.areas is not None:
            row |= {"cpr": self.areas.cpr, "cmd": self.areas.cmd}
        if len(self.control):
            drawn = self.control.faithfulness
            row |= {
                "random_mean": drawn.mean(),
                "random_min": drawn.min(),
                "random_max": drawn.max(),
                "random_better": int((drawn >= self.faithfulness).sum()),
                "random_sets": len(drawn),
            }
        return pd.DataFrame([row])

    def plot(self) -> Figure:
        """Faithfulness by circuit size, with the random sets, as a matplotlib figure."""
        if "edge" in self.curve:
            from ..view.curves import size_curve

            return size_curve(self)
        from ..view.figures import faithfulness_curve

        return faithfulness_curve(self)

    def _measured(self) -> Curve:
        if self.areas is None:
            raise OptionError("The areas were not measured", fix="Evaluate with areas=True, or call mk.curve")
        return self.areas

    def __repr__(self) -> str:
        low, high = self.interval
        text = f"Evaluation: faithfulness {self.faithfulness:.2f} (95% interval {low:.2f} to {high:.2f})"
        if self.areas is not None:
            text += f"; CPR {self.areas.cpr:.2f}, CMD {self.areas.cmd:.2f}"
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
    areas: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a circuit on prompts that it was not found on.

    Costs a run of the task for the circuit, the empty circuit, each random set and each size of the curve, less the
    parts that do nothing in it; and with ``areas`` twice nine more.

    Args:
        circuit: of heads, of heads and MLPs, or of edges. Edges on no path from the embedding to the logits are left
            out, and so are those of the random sets.
        model: the model it was found in.
        task: held-out prompts.
        ablation: what happens to everything else: ``"mean"``, ``"zero"`` or ``"resample"``.
        reference: whose corrupt prompts give means and resampled values; left out: ``task``.
        controls: number of random sets.
        curve: measure the first 1, 2, 3 ... nodes as well, or the first edges in ten sizes.
        areas: measure ``cpr`` and ``cmd``, of the ranking of all that was scored, as well.
        seed: of the random sets and the bootstrap.
        progress: show a bar.

    Raises:
        UnsupportedError: nodes that are neither heads nor MLPs.
        OptionError: fewer than no controls, an unknown ablation, or a circuit of another graph.
        MetricError: the model does no better than the empty circuit, so that no fraction is defined.
    """
    started = time.perf_counter()
    if controls < 0:
        raise OptionError(f"controls = {controls}", expected="a number from 0")
    keeper = keeper_of(circuit.scores, model, task, ablation, reference)
    sizes = _sizes(len(circuit), of_edges=circuit.level == "edge") if curve else []
    seeds = [seed * 1_000_003 + i for i in range(controls)]
    if isinstance(keeper, EdgeKeeper):
        edges = circuit.edges
        sets = keeper.masks([[], edges, *(edges[:size] for size in sizes)])
        drawn = [random_edges(sets[1], keeper.graph, one) for one in seeds]
        sets = pruned(np.stack([*sets[:2], *drawn, *sets[2:]]), keeper.graph)
        about = {"edges": sets[2 : 2 + controls].sum((1, 2))}
        values = keeper.metric(sets, progress)
    else:
        nodes = circuit.nodes
        others = [_random_nodes(nodes, model, one) for one in seeds]
        about = {"heads" if all(node.is_head for node in nodes) else "nodes": [" ".join(map(str, o)) for o in others]}
        values = keeper.metric([[], nodes, *others, *(nodes[:size] for size in sizes)], progress)
    full, empty = keeper.model_metric, values[0]
    share = [faithfulness(full, one, empty) for one in values]
    control = pd.DataFrame({"seed": range(controls), **about, "faithfulness": share[2 : 2 + controls]})
    ends = [*sizes, len(circuit)]
    names = [str(circuit.members[size - 1]) if size else "" for size in ends]
    by_size = pd.DataFrame({"size": ends, "edge" if circuit.level == "edge" else "node": names})
    low, high = interval(drawn_faithfulness(full, values[1:2], empty, seed))[:, 0].tolist()
    options = {"ablation": ablation, "controls": controls, "seed": seed}
    whole = None
    if areas:
        whole = measured(keeper, circuit.scores, model, task, FRACTIONS, True, seed, progress, ablation)
    return Evaluation(
        faithfulness=share[1],
        interval=(low, high),
        model_metric=float(full.mean()),
        circuit_metric=float(values[1].mean()),
        empty_metric=float(empty.mean()),
        control=control,
        curve=by_size.assign(faithfulness=[*share[2 + controls :], share[1]]),
        meta=provenance(model, task, "evaluate", time.perf_counter() - started, **options),
        areas=whole,
    )


def random_edges(mask: np.ndarray, graph: Graph, seed: int) -> np.ndarray:
    """As many edges ``[sources, targets]`` into each kind of target of each layer, drawn evenly from all there are."""
    classes, of_target = np.unique([f"{one.layer} {one.kind}" for one in graph.targets], return_inverse=True)
    at, draws = np.nonzero(graph.exists), np.random.default_rng(seed).random(len(graph))
    group = of_target[at[1]]
    order = np.lexsort((draws, group))  # class by class, in each in the order drawn
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])  # of each within its class
    wanted = np.bincount(of_target[np.nonzero(mask)[1]], minlength=len(classes))
    taken = order[place < wanted[group[order]]]
    drawn = np.zeros_like(mask)
    drawn[at[0][taken], at[1][taken]] = True
    return drawn


def _random_nodes(nodes: Sequence[Site], model: Model, seed: int) -> list[Site]:
    """As many heads of each layer, and as many MLPs of any."""
    heads = model.heads([node for node in nodes if node.is_head])
    layers = random.Random(seed).sample(range(model.n_layers), sum(node.kind == "mlp" for node in nodes))
    return [*heads.random_like(seed=seed), *(Site(layer, None, "mlp") for layer in sorted(layers))]


def _sizes(total: int, of_edges: bool) -> list[int]:
    """How many of a circuit's first members are measured by themselves; all of them are anyway."""
    if not of_edges:
        return list(range(1, total))
    return sorted({round(size) for size in np.geomspace(1, max(1, total), _SIZES)} - {total})
