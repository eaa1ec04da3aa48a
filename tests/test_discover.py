"""Every method finds what was planted, and the ways to speed a search up change nothing in what it finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny, tiny_task
from reference.patching import run_changed

import mechkit as mk
from mechkit import planted
from mechkit.circuits import acdc
from mechkit.circuits.keep import EdgeKeeper, Keeper
from mechkit.circuits.select import chosen_edges, grown
from mechkit.circuits.statistics import auroc
from mechkit.edge_scores import EdgeScores
from mechkit.errors import OptionError
from mechkit.graph import EMBED, LOGITS, Graph
from mechkit.patching.exact_edges import exact_edges

EDGE_METHODS = ("path", "eap-ig", "exact", "acdc")
every_planted = pytest.mark.parametrize("name", planted.ALL)
both_layouts = pytest.mark.parametrize("grouped", [False, True], ids=["heads", "groups"])


def texts(edges) -> set[str]:
    return {f"{source}->{target}" for source, target in edges}


@every_planted
@both_layouts
@pytest.mark.parametrize("method", EDGE_METHODS)
def test_the_planted_edges_are_found_and_nothing_else(name, grouped, method):
    made = planted.ALL[name](grouped=grouped)
    size = None if method == "acdc" else len(made.edges)  # its threshold sets how much it keeps
    circuit = mk.discover(made.model, made.task, method, level="edge", size=size, progress=False)
    assert set(map(str, circuit.edges)) == texts(made.edges)
    if method != "path":  # which looks at no edge that leads nowhere it has been
        assert auroc(circuit.scores, made.edges) >= (0.99 if method == "eap-ig" else 1.0)


@every_planted
@pytest.mark.parametrize("method", ["patch", "path", "eap-ig", "acdc"])
def test_the_planted_heads_are_found_and_nothing_else(name, method):
    made = planted.ALL[name](grouped=True)
    circuit = mk.discover(made.model, made.task, method, min_share=0.01, progress=False)
    assert set(map(str, circuit.nodes)) == {node for node in made.nodes if node not in ("embed", "logits")}
    assert {str(one) for one in circuit.heads} == set(map(str, circuit.nodes))


@every_planted
@both_layouts
def test_an_edge_by_itself_has_the_effect_that_was_planted(name, grouped):
    made = planted.ALL[name](grouped=grouped)
    frame = exact_edges(made.model, made.task, "noise", progress=False).frame
    effect = dict(zip(frame.source + "->" + frame.target, frame.score, strict=True))
    true = texts(made.edges)
    for (source, target), expected in made.effects.items():
        assert effect[f"{source}->{target}"] == pytest.approx(expected, abs=1e-5)
    assert max(abs(value) for one, value in effect.items() if one not in true) < 1e-5


def test_a_path_to_a_query_has_effect_one_and_every_other_sender_none():
    made = planted.q_composition()
    for through in (True, False):
        frame = mk.path_patch(made.model, made.task, "1.0.q", through_mlps=through, progress=False).frame
        effect = dict(zip(frame.sender, frame.score, strict=True))
        assert effect.pop("0.0") == pytest.approx(1, abs=1e-5)
        assert max(map(abs, effect.values())) < 1e-5


@both_layouts
def test_in_a_linear_model_first_order_exact_and_path_are_the_same(grouped):
    made = planted.linear(grouped=grouped)
    exact = exact_edges(made.model, made.task, "noise", progress=False).matrix()
    for method in ("eap", "eap-ig"):
        np.testing.assert_allclose(mk.edges(made.model, made.task, method, progress=False).matrix(), exact, atol=1e-5)
    nodes = mk.patch(made.model, made.task, "heads", direction="noise", progress=False).frame.set_index("site").score
    out = mk.edges(made.model, made.task, "eap", progress=False).nodes().frame.set_index("site").score
    np.testing.assert_allclose(nodes, out[nodes.index], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_exact_edges_equal_one_forward_an_edge(family):
    """To the logits, where what a source adds to the last residual can be written down without mechkit."""
    from families import untouched
    from reference.patching import value_of

    model, task = tiny(family), tiny_task(n=2)
    frame = exact_edges(model, task, "noise", progress=False).frame
    assert len(frame) == len(model.graph())
    assert not frame.duplicated(["source", "target"]).any()
    rows = frame[frame.target == "logits"].set_index("source")
    for layer in range(model.n_layers):
        base, source = (value_of(untouched(family), ids, "mlp", layer) for ids in (task.clean, task.corrupt))

        def added(stream, base=base, source=source):
            return stream + source - base

        logits = run_changed(untouched(family), task.clean, {("resid", model.n_layers): added})
        expected = float(mk.metrics.logit_diff(logits, task).mean())
        assert rows.metric[f"m{layer}"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt-j"])
@pytest.mark.parametrize("threshold", [0.001, 0.01, 0.2])
def test_trying_many_edges_at_once_is_trying_them_one_by_one(family, threshold):
    model, task = tiny(family), tiny_task(n=3)
    keeper = EdgeKeeper(model, task, "resample")
    graph, whole = keeper.graph, float(keeper.model_metric.mean())
    pairs = acdc.backwards(graph)
    assert len(pairs) == len(graph)
    corrupt = float(mk.metrics.logit_diff(model.run(task.corrupt).logits, task).mean())

    def measure(sets):
        masks = np.repeat(graph.exists[None], len(sets), 0)
        for mask, gone in zip(masks, sets, strict=True):
            for i in gone:
                mask[pairs[i]] = False
        return keeper.metric(masks).mean(1)

    alone = acdc.taken_out(len(pairs), measure, whole - corrupt, whole, threshold, at_once=1)
    for at_once in (None, 7):
        stays, falls = acdc.taken_out(len(pairs), measure, whole - corrupt, whole, threshold, at_once=at_once)
        assert (stays == alone[0]).all()
        np.testing.assert_allclose(falls, alone[1], atol=1e-4)
    circuit = mk.discover(model, task, "acdc", level="edge", threshold=threshold, prune=False, progress=False)
    kept = {(graph.source_index[e.source], graph.target_index[e.target]) for e in circuit.edges}
    assert kept == {pairs[i] for i in np.flatnonzero(alone[0])}


def test_acdc_never_loses_more_than_its_threshold_at_a_step_and_keeps_what_it_says():
    model, task = tiny("llama"), tiny_task(n=4)
    circuit = mk.discover(model, task, "acdc", sites="heads mlps", threshold=0.05, progress=False)
    frame = circuit.scores.frame
    assert set(frame.site[frame.score >= 0.05]) == set(map(str, circuit.nodes))
    keeper = Keeper(model, task, "resample", kinds=("z", "mlp"))
    metric = float(keeper.metric([circuit.nodes]).mean())
    ends = [float(mk.metrics.logit_diff(model.run(ids).logits, task).mean()) for ids in (task.clean, task.corrupt)]
    lost = frame.score[frame.score < 0.05].sum() * (ends[0] - ends[1])
    assert metric == pytest.approx(ends[0] - lost, abs=1e-3)


def test_greedy_edges_always_lead_to_the_logits():
    model, task = tiny("llama"), tiny_task(n=3)
    scores = mk.edges(model, task, "eap", progress=False)
    graph = scores.graph
    some = scores.frame[scores.frame.score != 0]  # nothing comes of an edge without any effect
    for size in (1, 5, 20, len(graph)):
        taken = chosen_edges(scores, size, "greedy")
        assert len(taken) == min(size, len(some))
        inside = {LOGITS}
        for one in taken:
            assert inside.intersection(graph.readers(one.target)), one
            inside.add(one.source)
    top = chosen_edges(scores, len(graph), "top")
    assert set(map(str, top)) == set(some.source + "->" + some.target)


def test_greedy_takes_the_largest_edge_that_it_can_reach():
    graph = Graph(2, 1, 1)
    edges = {str(one): one for one in graph.edges}
    strength = dict.fromkeys(graph.edges, 0.1)
    strength[edges["embed->0.0.q"]] = 9.0  # not reachable until 0.0 is in
    strength[edges["0.0->1.0.k"]] = 5.0
    strength[edges["1.0->logits"]] = 0.5
    order = [str(one) for one in grown(strength, graph, 3)]
    assert order == ["1.0->logits", "0.0->1.0.k", "embed->0.0.q"]
    assert [str(one) for one in grown(strength, graph, 1)] == ["1.0->logits"]


def test_dead_ends_are_taken_out():
    model, task = tiny("gpt2"), tiny_task(n=3)
    whole = mk.discover(model, task, "eap", level="edge", size=40, prune=False, progress=False)
    circuit = mk.discover(model, task, "eap", level="edge", size=40, progress=False)
    assert set(circuit.edges) < set(whole.edges)
    graph = model.graph()
    assert set(graph.alive(circuit.edges)) == set(circuit.edges)
    into = {node for one in circuit.edges for node in graph.readers(one.target)} | {EMBED}
    out = {one.source for one in circuit.edges}
    assert all(one.source in into for one in circuit.edges)
    assert all(set(graph.readers(one.target)) & (out | {LOGITS}) for one in circuit.edges)


def test_the_graph_has_the_published_numbers_of_edges():
    assert len(Graph(12, 12, 12)) == 32_491  # GPT-2 small
    assert len(Graph(24, 14, 2)) == 79_813  # Qwen 2.5 0.5B, its groups as they are
    assert len(Graph(24, 14, 2, ungrouped=True)) == 179_749


def test_path_discovery_looks_behind_the_heads_that_it_has_found():
    made = planted.q_composition()
    one_step = mk.path_patch(made.model, made.task, "logits", progress=False).frame.set_index("sender").score
    assert abs(one_step["0.0"]) < 1e-5  # nothing goes from 0.0 to the logits but through 1.0
    circuit = mk.discover(made.model, made.task, "path", progress=False)
    assert [str(one) for one in circuit.nodes] == ["1.0", "0.0"]
    assert isinstance(mk.discover(made.model, made.task, "path", level="edge", progress=False).scores, EdgeScores)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"method": "guess"}, "guess"),
        ({"level": "neuron"}, "neuron"),
        ({"method": "patch", "level": "edge"}, "edge"),
        ({"method": "path", "sites": "q"}, "q"),
        ({"method": "eap", "sites": "0.0 1.1"}, "0.0 1.1"),
        ({"method": "path", "selection": "greedy"}, "greedy"),
        ({"method": "eap", "selection": "best"}, "best"),
        ({"method": "path", "width": 0}, "width = 0"),
        ({"method": "acdc", "threshold": -1}, "-1"),
        ({"method": "acdc", "checkpoint": "x.npz"}, "checkpoint"),
        ({"method": "path", "steps": 3}, "steps"),
        ({"method": "acdc", "ablation": "shuffle"}, "shuffle"),
        ({"method": "eap", "level": "edge", "size": 0}, "0"),
    ],
)
def test_a_bad_option_is_named(options, names):
    with pytest.raises(OptionError, match=names):
        mk.discover(tiny("gpt2"), tiny_task(), progress=False, **options)
