"""Faithfulness by size, its areas, controls and intervals; completeness and minimality; AUROC."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from families import tiny, tiny_task

import mechkit as mk
from mechkit.circuits import statistics
from mechkit.circuits.criteria import completeness, minimality
from mechkit.circuits.curve import FRACTIONS, curve
from mechkit.circuits.evaluate import evaluate, random_edges
from mechkit.circuits.keep import EdgeKeeper, Keeper
from mechkit.edge_scores import EdgeScores
from mechkit.errors import MetricError, OptionError, SiteError, UnsupportedError
from mechkit.results import Scores


def edge_scores(model: mk.Model, seed: int = 0, ungrouped: bool = False) -> EdgeScores:
    graph = model.graph(ungrouped)
    drawn = np.random.default_rng(seed).normal(size=graph.exists.shape)
    return EdgeScores.of_matrix(graph, drawn, "effect", {"n_heads": model.n_heads}, n=4)


def node_scores(model: mk.Model, task: mk.Task, sites: str = "heads mlps") -> Scores:
    return mk.patch(model, task, sites, progress=False)


def edge_circuit(model: mk.Model, size: int = 60, seed: int = 0) -> mk.Circuit:
    scores = edge_scores(model, seed)
    return mk.Circuit.of_edges(scores.ranked()[:size], scores)


# -- the curve ------------------------------------------------------------------------------------------------


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


# -- circuits of edges, and of MLPs ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_circuit_of_edges_beside_random_ones(family):
    model, task = tiny(family), tiny_task(n=6)
    circuit = edge_circuit(model)
    found = evaluate(circuit, model, task, ablation="resample", controls=4, areas=True, progress=False)
    keeper = EdgeKeeper(model, task, "resample")
    empty, own = keeper.metric([[], circuit.edges]).mean(1)
    assert found.faithfulness == pytest.approx((own - empty) / (keeper.model_metric.mean() - empty), abs=1e-4)
    assert found.interval[0] <= found.faithfulness <= found.interval[1]
    sizes = found.curve["size"]
    assert sizes.is_monotonic_increasing
    assert sizes.iloc[-1] == len(circuit)
    assert found.curve["edge"].iloc[0] == str(circuit.edges[0])
    assert found.curve.faithfulness.iloc[-1] == pytest.approx(found.faithfulness)
    assert len(found.control) == 4
    whole = curve(circuit.scores, model, task, progress=False)
    assert (found.cpr, found.cmd) == pytest.approx((whole.cpr, whole.cmd))
    assert found.frame.cmd[0] == pytest.approx(whole.cmd)
    assert len(found.plot().axes) == 1
    again = evaluate(circuit, model, task, ablation="resample", controls=4, progress=False)
    assert again.control.equals(found.control)
    with pytest.raises(OptionError, match="areas=True"):
        _ = again.cpr


def test_every_edge_is_the_model_and_so_is_its_control():
    model, task = tiny("gemma2"), tiny_task()
    circuit = edge_circuit(model, size=10_000)
    found = evaluate(circuit, model, task, controls=2, curve=False, progress=False)
    assert found.faithfulness == pytest.approx(1, abs=1e-5)
    assert found.control.faithfulness.tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_random_edges_match_the_targets_of_each_layer(family):
    model = tiny(family)
    circuit = edge_circuit(model)
    graph = model.graph()
    mask = np.zeros(graph.exists.shape, bool)
    for one in circuit.edges:
        mask[graph.source_index[one.source], graph.target_index[one.target]] = True

    def by_target(of: np.ndarray) -> Counter:
        return Counter((graph.targets[j].layer, graph.targets[j].kind) for j in np.nonzero(of)[1])

    drawn = [random_edges(mask, graph, seed) for seed in range(300)]
    for one in drawn:
        assert not (one & ~graph.exists).any()
        assert by_target(one) == by_target(mask)
    # Within a layer and kind, every edge there is comes about as often as any other.
    logits = np.mean([one[:, -1] for one in drawn], 0)
    assert logits == pytest.approx(mask[:, -1].mean(), abs=0.15)
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_circuit_of_heads_and_mlps():
    model, task = tiny("llama"), tiny_task(n=6)
    scores = node_scores(model, task)
    nodes = [mk.site(text) for text in ("m1", "0.1", "2.3", "m2")]
    found = evaluate(mk.Circuit(tuple(nodes), scores), model, task, controls=5, progress=False)
    keeper = Keeper(model, task, "mean", kinds=("z", "mlp"))
    empty, own = keeper.metric([[], nodes]).mean(1)
    assert found.faithfulness == pytest.approx((own - empty) / (keeper.model_metric.mean() - empty), abs=1e-5)
    assert found.curve["node"].tolist() == ["m1", "0.1", "2.3", "m2"]
    for text in found.control["nodes"]:
        drawn = mk.sites.sites(text)
        assert sorted(one.layer for one in drawn if one.is_head) == [0, 2]
        assert len({one for one in drawn if one.kind == "mlp"}) == 2
    everything = mk.Circuit(keeper.parts, scores)
    assert evaluate(everything, model, task, controls=0, curve=False, progress=False).faithfulness == pytest.approx(1)


def test_heads_are_left_in_where_only_mlps_were_candidates():
    model, task = tiny("gpt2"), tiny_task()
    scores = node_scores(model, task, "mlps")
    found = evaluate(mk.Circuit((mk.site("m0"),), scores), model, task, controls=3, progress=False)
    own = Keeper(model, task, "mean", kinds=("mlp",)).metric([[mk.site("m0")]])[0]
    assert found.circuit_metric == pytest.approx(own.mean(), abs=1e-5)
    with pytest.raises(UnsupportedError, match=r"0\.1"):
        evaluate(mk.Circuit((mk.site("0.1"),), scores), model, task, progress=False)


# -- completeness and minimality ------------------------------------------------------------------------------


def _sizes_of(table: pd.DataFrame) -> list[int]:
    return table["removed"].str.split().map(len).tolist()


@pytest.mark.parametrize("level", ["node", "edge"])
def test_completeness_is_the_distance_of_circuit_and_model_without_the_same(level):
    model, task = tiny("llama"), tiny_task()
    if level == "node":
        circuit = mk.Circuit(tuple(model.heads("0.1 1.2 2.0 2.3")), node_scores(model, task, "heads"))
        keeper = Keeper(model, task, "mean")
    else:
        circuit = edge_circuit(model, size=12)
        keeper = EdgeKeeper(model, task, "mean")
    table = completeness(circuit, model, task, random=3, steps=3, candidates=4, progress=False)
    frame = table.frame
    assert frame.how.tolist() == ["none"] + ["random"] * 3 + ["greedy"] * 3
    assert frame["size"].tolist() == _sizes_of(frame)
    assert frame["size"].tolist()[-3:] == [1, 2, 3]
    gap = abs(keeper.model_metric.mean() - keeper.metric([[]])[0].mean())
    for row in frame.itertuples():
        taken = set(row.removed.split())
        of_circuit, of_model = (
            keeper.metric([[one for one in parts if str(one) not in taken]])[0].mean()
            for parts in (circuit.members, keeper.parts)
        )
        assert (row.circuit, row.model) == pytest.approx((of_circuit, of_model), abs=1e-5)
        assert row.score == pytest.approx(abs(of_circuit - of_model) / gap, abs=1e-4)


def test_nothing_is_missing_from_the_whole_model():
    model, task = tiny("gpt2"), tiny_task()
    everything = mk.Circuit(tuple(model.heads()), node_scores(model, task, "heads"))
    table = completeness(everything, model, task, random=3, steps=2, candidates=3, progress=False)
    np.testing.assert_allclose(table.frame.score, 0, atol=1e-5)


def test_a_greedy_step_takes_the_worst_of_its_candidates():
    model, task = tiny("gpt2"), tiny_task()
    circuit = mk.Circuit(tuple(model.heads("0.1 1.2 2.0")), node_scores(model, task, "heads"))
    table = completeness(circuit, model, task, random=0, steps=1, candidates=3, progress=False)
    keeper = Keeper(model, task, "mean")
    worst = 0.0
    for node in circuit.nodes:
        sets = [[one for one in parts if one != node] for parts in (circuit.nodes, keeper.parts)]
        worst = max(worst, abs(float(np.subtract(*keeper.metric(sets).mean(1)))))
    gap = abs(keeper.model_metric.mean() - keeper.metric([[]])[0].mean())
    assert table.frame.score.iloc[-1] == pytest.approx(worst / gap, abs=1e-5)


@pytest.mark.parametrize("level", ["node", "edge"])
def test_minimality_is_the_largest_change_that_a_member_makes(level):
    model, task = tiny("llama"), tiny_task()
    if level == "node":
        circuit = mk.Circuit(tuple(model.heads("0.1 1.2 2.0 2.3")), node_scores(model, task, "heads"))
        keeper = Keeper(model, task, "mean")
    else:
        circuit = edge_circuit(model, size=12)
        keeper = EdgeKeeper(model, task, "mean")
    frame = minimality(circuit, model, task, sets=3, progress=False).frame
    gap = abs(keeper.model_metric.mean() - keeper.metric([[]])[0].mean())
    assert frame.member.tolist() == [str(one) for one in circuit.members]
    for row in frame.itertuples():
        for taken, size in (({*row.removed.split()}, row.score), (set(), abs(row.alone))):
            assert row.member not in taken
            rest = [one for one in circuit.members if str(one) not in taken]
            without = [one for one in rest if str(one) != row.member]
            change = np.subtract(*keeper.metric([rest, without]).mean(1)) / gap
            assert size == pytest.approx(abs(float(change)), abs=1e-4)
        assert row.score >= abs(row.alone) - 1e-6


@pytest.mark.parametrize("options", [{"random": -1}, {"greedy": 1.5}, {"steps": 0}, {"candidates": 0}])
def test_completeness_names_the_bad_option(options):
    model, task = tiny("gpt2"), tiny_task()
    with pytest.raises(OptionError, match=next(iter(options))):
        completeness(edge_circuit(model, 5), model, task, progress=False, **options)


# -- statistics -----------------------------------------------------------------------------------------------


def test_draws_are_those_of_prompts_drawn_again():
    draw = np.random.default_rng(3)
    model, empty, circuits = draw.normal(3, 1, 8), draw.normal(0, 1, 8), draw.normal(1, 1, (2, 8))
    found = statistics.drawn_faithfulness(model, circuits, empty, seed=5)
    assert found.shape == (statistics.DRAWS, 2)
    counts = np.random.default_rng(5).multinomial(8, np.full(8, 1 / 8), size=statistics.DRAWS)
    for number in (0, 17, 9_999):
        rows = np.repeat(np.arange(8), counts[number])
        for i, one in enumerate(circuits):
            expected = statistics.faithfulness(model[rows], one[rows], empty[rows])
            assert found[number, i] == pytest.approx(expected)
    assert np.isnan(statistics.drawn_faithfulness(model[:1], circuits[:, :1], empty[:1], 0)).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draw, held = np.random.default_rng(0), 0
    for seed in range(60):
        circuit = draw.normal(0.6, 0.5, (1, 40))
        draws = statistics.drawn_faithfulness(np.ones(40), circuit, np.zeros(40), seed)
        low, high = statistics.interval(draws)[:, 0]
        held += low <= 0.6 <= high
    assert 50 <= held <= 60


def test_areas_of_known_curves():
    x = np.array([0.0, 0.5, 1.0])
    assert statistics.areas(x, np.ones(3)) == (1, 0)
    assert statistics.areas(x, x) == (0.5, 0.5)
    assert statistics.areas(x, np.array([0.0, 3.0, 1.0])) == (1.75, 1.25)  # above 1 counts, nothing is clipped


@pytest.mark.parametrize("by", ["size", "signed"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_auroc_is_the_share_of_pairs_that_are_in_order(by, level):
    model, draw = tiny("llama"), np.random.default_rng(0)
    scores = edge_scores(model)
    scores = scores.nodes() if level == "node" else scores
    rounded = scores.frame.assign(score=scores.frame.score.round(0))  # many ties
    scores = type(scores)(rounded, scores.unit, scores.meta)
    parts = scores.edges if isinstance(scores, EdgeScores) else [mk.site(text) for text in scores.frame.site]
    true = draw.random(len(parts)) < 0.3
    values = rounded.score.abs() if by == "size" else rounded.score
    pairs = [(a > b) + (a == b) / 2 for a in values[true] for b in values[~true]]
    found = statistics.auroc(scores, [one for one, yes in zip(parts, true, strict=True) if yes], by=by)
    assert found == pytest.approx(np.mean(pairs))


def test_auroc_reads_addresses_and_names_what_it_cannot_use():
    model = tiny("llama")
    scores = edge_scores(model)
    best = scores.ranked()[:5]
    assert statistics.auroc(scores, map(str, best)) == 1
    assert statistics.auroc(scores, ["embed->0.1.k"]) == statistics.auroc(scores, ["embed->0.kv0.k"])
    with pytest.raises(SiteError):
        statistics.auroc(scores, ["2.1->0.1.q"])
    with pytest.raises(OptionError, match="0 of"):
        statistics.auroc(scores, [])
    with pytest.raises(OptionError, match="not scored"):
        statistics.auroc(scores.only(best), ["embed->0.1.q", best[0]])
    with pytest.raises(OptionError, match="loudness"):
        statistics.auroc(scores, best, by="loudness")  # type: ignore[arg-type]
    each = mk.patch(model, tiny_task(), "0.1", positions="each", progress=False)
    with pytest.raises(OptionError, match="several rows"):
        statistics.auroc(each, ["0.1"])
    broken = EdgeScores(scores.frame.assign(score=np.nan), "effect", scores.meta)
    with pytest.raises(OptionError, match="not numbers"):
        statistics.auroc(broken, best)
