"""Faithfulness by size, and its areas."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import edge_scores, node_scores
from families import tiny, tiny_task

import mechkit as mk
from mechkit.circuits.curve import FRACTIONS, curve
from mechkit.circuits.keep import EdgeKeeper, Keeper
from mechkit.edge_scores import EdgeScores
from mechkit.errors import MetricError, OptionError, UnsupportedError


@pytest.mark.parametrize(
    ("family", "ungrouped"), [("llama", False), ("llama", True), ("gemma2", False), ("gpt-j", False)]
)
@pytest.mark.parametrize("prune", [True, False])
def test_each_circuit_has_the_first_edges_of_its_ranking(family, ungrouped, prune):
    model, task = tiny(family), tiny_task()
    scores = edge_scores(model, ungrouped=ungrouped)
    fractions = (0.1, 0.35, 0.7, 1.0)
    found = curve(scores, model, task, ablation="mean", fractions=fractions, prune=prune, progress=False)
    keeper = EdgeKeeper(model, task, "mean", ungrouped=ungrouped)
    graph, frame = keeper.graph, scores.frame
    rankings = {
        "size": scores.ranked(),
        "signed": [scores.edges[i] for i in frame.score.sort_values(ascending=False, kind="stable").index],
    }
    empty = keeper.metric([[]])[0].mean()
    for row in found.frame.itertuples():
        edges = rankings[row.ranking][: int(row.fraction * len(graph) + 1e-9)]
        assert row.chosen == len(edges)
        edges = graph.alive(edges) if prune else edges
        assert row.edges == len(edges)
        metric = keeper.metric([edges])[0].mean()
        assert row.metric == pytest.approx(metric, abs=1e-5)
        share = (metric - empty) / (keeper.model_metric.mean() - empty)
        assert row.faithfulness == pytest.approx(share, abs=1e-4)
    whole = found.frame[found.frame.fraction == 1.0]
    np.testing.assert_allclose(whole.faithfulness, 1, atol=1e-5)


@pytest.mark.parametrize("sites", ["heads", "mlps", "heads mlps"])
def test_circuits_of_nodes_ablate_the_kinds_that_were_scored(sites):
    model, task = tiny("llama"), tiny_task(n=6)
    scores = node_scores(model, task, sites)
    found = curve(scores, model, task, fractions=(0.3, 0.7, 1.0), progress=False)
    kinds = tuple(dict.fromkeys(scores.frame["kind"]))
    keeper = Keeper(model, task, "resample", kinds=kinds)
    rows = found.frame[found.frame.ranking == "size"]
    for row in rows.itertuples():
        kept = scores.ranked()[: row.nodes]
        assert row.metric == pytest.approx(keeper.metric([kept])[0].mean(), abs=1e-5)
    assert rows.nodes.tolist() == [int(0.3 * len(scores)), int(0.7 * len(scores)), len(scores)]
    assert rows.faithfulness.iloc[-1] == pytest.approx(1, abs=1e-5)


def test_areas_are_those_of_the_trapezoids_of_the_curve():
    model, task = tiny("gpt2"), tiny_task(n=6)
    found = curve(edge_scores(model), model, task, progress=False)
    by = dict(iter(found.frame.groupby("ranking")))
    x = np.array(FRACTIONS)
    width = np.diff(x)

    def area(heights: np.ndarray) -> float:
        return float((width * (heights[1:] + heights[:-1]) / 2).sum())

    assert found.cpr == pytest.approx(area(by["signed"].faithfulness.to_numpy()))
    assert found.cmd == pytest.approx(area(np.abs(1 - by["size"].faithfulness.to_numpy())))
    assert found.cpr_interval[0] <= found.cpr <= found.cpr_interval[1]
    assert found.cmd_interval[0] <= found.cmd_interval[1]
    assert (found.frame.low <= found.frame.faithfulness + 1e-9).all()
    assert "CPR" in repr(found)
    assert "CMD" in found._repr_html_()
    assert found.plot().axes[0].get_xscale() == "log"


def test_the_best_ranking_has_more_area_than_its_reverse():
    model, task = tiny("llama"), tiny_task(n=6)
    one = EdgeKeeper(model, task)
    every = one.graph.exists
    alone = np.repeat(every[None], len(one.graph), 0)
    for mask, (i, j) in zip(alone, np.argwhere(every), strict=True):
        mask[i, j] = False
    exact = np.zeros(every.shape)
    gap = one.model_metric.mean() - one.metric([[]]).mean()
    exact[every] = (one.model_metric.mean() - one.metric(alone).mean(1)) / gap  # what each edge's absence costs
    best = EdgeScores.of_matrix(one.graph, exact, "logits", {})
    worst = EdgeScores.of_matrix(one.graph, -exact, "logits", {})
    forwards, backwards = (curve(scores, model, task, progress=False) for scores in (best, worst))
    assert forwards.cpr > backwards.cpr
    assert forwards.cmd == pytest.approx(backwards.cmd)  # by size they are the same


@pytest.mark.parametrize("fractions", [(), (0.5,), (0.5, 0.1), (0.0, 1.0), (0.5, 1.5), (0.1, 0.1)])
def test_fractions_that_do_not_rise_are_refused(fractions):
    model, task = tiny("gpt2"), tiny_task()
    with pytest.raises(OptionError, match="fractions"):
        curve(edge_scores(model), model, task, fractions=fractions, progress=False)


def test_a_ranking_that_cannot_be_evaluated_is_refused():
    model, task = tiny("llama"), tiny_task()
    scores = edge_scores(model)
    with pytest.raises(OptionError, match="have no score"):
        curve(scores.only(scores.edges[:9]), model, task, progress=False)
    with pytest.raises(OptionError, match="those of Graph"):
        curve(edge_scores(tiny("gpt2")), model, task, progress=False)
    with pytest.raises(OptionError, match="9 of 12 nodes"):
        curve(node_scores(model, task, "0.1 0.2 1.3"), model, task, progress=False)
    each = mk.patch(model, task, "mlps", positions="each", progress=False)
    with pytest.raises(OptionError, match="several rows"):
        curve(each, model, task, progress=False)
    with pytest.raises(UnsupportedError, match="kinds q"):
        curve(node_scores(model, task, "q"), model, task, progress=False)
    flat = task.with_metric(lambda logits, task: logits.new_ones(len(task)))
    with pytest.raises(MetricError, match="with none"):
        curve(scores, model, flat, progress=False)
