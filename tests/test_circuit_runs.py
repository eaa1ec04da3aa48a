"""What feeds the circuit view: what is left of a cut circuit, by its definition; and what is shown of it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from drawn import edge_circuit, edge_scores
from families import tiny, tiny_task, untouched
from made_circuits import GRAPHS, node_circuit
from made_circuits import edge_circuit as made_of_edges
from reference import keep as literal
from reference import planted_truth as truth
from reference.patching import patch_cell

import mechkit as mk
from mechkit import planted
from mechkit.errors import MetricError, OptionError, SiteError, UnsupportedError
from mechkit.graph import Graph
from mechkit.view.circuit_of import circuit_view_data
from mechkit.view.circuit_runs import CircuitRuns

ABLATIONS = ("mean", "resample", "zero")
FEW = ("gpt2", "gpt-j", "falcon", "llama", "gemma2", "olmo2", "gpt-oss")  # groups, norms behind, side by side, coupled
every_ablation = pytest.mark.parametrize("ablation", ABLATIONS)


def nodes_of(model: mk.Model, task: mk.Task, sites: str = "heads mlps", size: int = 6) -> mk.Circuit:
    return mk.discover(model, task, "patch", sites=sites, size=size, min_share=0, progress=False)


def edges_left(circuit: mk.Circuit, graph: Graph, size: int, cuts: tuple[str, ...]) -> set[tuple[str, str]]:
    """Of a circuit of nodes: every edge whose source is left in or never ablated, less the cut ones."""
    kinds = set(circuit.scores.frame["kind"])
    stays = {str(one) for one in circuit.nodes[:size]} - {*cuts}
    pairs = [(str(one.source), str(one.target)) for one in graph.edges if one.source.kind not in kinds]
    pairs += [(str(one.source), str(one.target)) for one in graph.edges if str(one.source) in stays]
    return {pair for pair in pairs if f"{pair[0]}->{pair[1]}" not in cuts}


# -- what is measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
@every_ablation
@pytest.mark.parametrize("sites", ["heads", "heads mlps", "mlps"])
def test_a_circuit_of_nodes_is_the_same_circuit_as_edges(family, ablation, sites):
    model, task = tiny(family), tiny_task(n=4)
    circuit = nodes_of(model, task, sites, 3 if sites == "mlps" else 5)
    runs = CircuitRuns(circuit, model, task, ablation)
    for size in (1, 2):
        out = circuit.nodes[size]  # what is cut of it carries nothing anyway, so that nothing is cut
        edge = next(one for one in model.graph().edges if one.source == out)
        by_node, by_edge = runs.run(size), runs.run(size, [str(edge)])
        assert "_edge_keeper" in vars(runs)  # which measured the second
        for name in ("metric", "faithfulness"):
            assert by_edge[name] == pytest.approx(by_node[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("family", FEW)
@every_ablation
def test_cut_edges_of_a_circuit_of_nodes_are_as_defined(family, ablation):
    model, task = tiny(family), tiny_task(n=3)
    hub, graph = untouched(family), model.graph()
    circuit = nodes_of(model, task, "heads")
    head = str(circuit.nodes[2])
    values = literal.written_values(hub, task.corrupt)
    if ablation == "mean":
        values = {key: value.mean(0, keepdim=True) for key, value in values.items()}
    elif ablation == "zero":
        values = {key: torch.zeros(()) for key in values}
    inner = [str(one) for one in graph.between(circuit.nodes) if one.source.kind != "embed"]
    runs, full = CircuitRuns(circuit, model, task, ablation), hub(task.clean, use_cache=False).logits
    empty = literal.keep_nodes(hub, task.clean, set(), {key: v for key, v in values.items() if key[0] == "z"})
    for size, cuts in ((6, (inner[0], "embed->1.0.q")), (4, (inner[-1], "m0->logits", head)), (0, ("m1->m2",))):
        kept = edges_left(circuit, graph, size, cuts)
        logits = literal.keep_edges(hub, task.clean, kept, values, model.backend.parallel)
        metric, low, high = (float(mk.metrics.logit_diff(one, task).mean()) for one in (logits, empty, full.detach()))
        found = runs.run(size, cuts)
        assert found["metric"] == pytest.approx(metric, abs=1e-4)
        assert (found["empty"], found["model"]) == pytest.approx((low, high), abs=1e-4)
        assert found["faithfulness"] == pytest.approx((metric - low) / (high - low), abs=2e-3)


@every_ablation
@pytest.mark.parametrize("level", ["node", "edge"])
def test_nothing_cut_is_what_evaluating_gives(level, ablation):
    model, task, reference = tiny("llama"), tiny_task(n=6), tiny_task(n=6, seed=1)
    circuit = nodes_of(model, task) if level == "node" else edge_circuit(model, size=80)
    told = circuit.evaluate(model, task, ablation=ablation, reference=reference, controls=0, progress=False)
    runs = CircuitRuns(circuit, model, task, ablation, reference)
    found = runs.run(len(circuit), [])
    assert found["faithfulness"] == pytest.approx(told.faithfulness, abs=1e-6)
    assert (found["low"], found["high"]) == pytest.approx(told.interval, abs=1e-6)
    measured = [told.circuit_metric, told.model_metric, told.empty_metric]
    assert [found[name] for name in ("metric", "model", "empty")] == pytest.approx(measured, abs=1e-5)
    assert {type(value) for value in found.values()} == {float}
    curve = {one["size"]: one["faithfulness"] for one in runs.curve()}
    assert curve.pop(0) == 0
    assert curve == pytest.approx(dict(zip(told.curve["size"], told.curve.faithfulness, strict=True)), abs=1e-5)
    default = circuit.evaluate(model, task, controls=0, curve=False, progress=False).faithfulness
    assert CircuitRuns(circuit, model, task).run(len(circuit))["faithfulness"] == pytest.approx(default, abs=1e-6)


def test_the_curve_has_a_handful_of_sizes(monkeypatch):
    model, task = tiny("llama"), tiny_task(n=3)
    nodes = nodes_of(model, task, size=15)
    assert [one["size"] for one in CircuitRuns(nodes, model, task).curve()] == [*range(16)]
    monkeypatch.setattr("mechkit.view.circuit_runs._NODES", 11)
    for circuit in (nodes, edge_circuit(model, size=200)):
        sizes = [one["size"] for one in CircuitRuns(circuit, model, task).curve()]
        assert sizes == sorted({*sizes})
        assert (sizes[0], sizes[1], sizes[-1]) == (0, 1, len(circuit))
        assert 8 <= len(sizes) <= 11


@every_ablation
@pytest.mark.parametrize("ungrouped", [False, True])
def test_cuts_of_a_circuit_of_edges_are_circuits_of_fewer_edges(ablation, ungrouped):
    model, task = tiny("qwen3"), tiny_task()
    scores = edge_scores(model, ungrouped=ungrouped)
    circuit = mk.Circuit.of_edges(scores.ranked()[:120], scores)
    runs, graph = CircuitRuns(circuit, model, task, ablation), scores.graph
    head = next(one for one in circuit.nodes if one.is_head and one.layer == 1)
    mlp, edges = next(one for one in circuit.nodes if one.kind == "mlp"), circuit.edges[::7]
    shared = [one for one in graph.slots(head) if len(graph.readers(one)) > 1]
    assert bool(shared) != ungrouped
    for size, cuts in ((120, [head]), (100, [*edges, mlp]), (90, [head, mlp, *edges])):
        # What enters a cut head goes as well, but for keys and values that another head reads.
        left = [one for one in circuit.edges[:size] if one not in cuts and one.source not in cuts]
        left = [one for one in left if one.target in shared or not {*graph.readers(one.target)} <= {*cuts}]
        told = mk.Circuit.of_edges(left, scores).evaluate(
            model, task, ablation=ablation, controls=0, curve=False, progress=False
        )
        found = runs.run(size, [str(one) for one in cuts])
        assert found["faithfulness"] == pytest.approx(told.faithfulness, abs=1e-5)
    assert runs.run(50, [str(one) for one in circuit.edges[50:]]) == runs.run(50)  # those are out already


@pytest.mark.parametrize("name", planted.ALL)
@pytest.mark.parametrize("grouped", [False, True])
@torch.no_grad()
def test_what_is_left_of_a_planted_circuit_is_as_written_out(name, grouped):
    made = planted.ALL[name](n=6, grouped=grouped)
    graph, task = truth.WrittenOut(made.model.hf), made.task
    scores = mk.patch(made.model, task, "heads", progress=False)
    circuit = mk.Circuit(tuple(made.model.heads(made.nodes)), scores, scores.meta)
    elsewhere = graph.run(graph.embedded(task.corrupt)).wrote

    def metric(kept: set[tuple[str, str]]) -> float:
        carried = {one: elsewhere[one[0]] for one in graph.edges() if one not in kept}
        return float(truth.logit_diff(graph.run(graph.embedded(task.clean), carried).logits, task).mean())

    runs, real = CircuitRuns(circuit, made.model, task, "resample"), made.model.graph()
    empty, full = metric(edges_left(circuit, real, 0, ())), metric({*graph.edges()})
    cuts = [f"{source}->{target}" for source, target in made.edges]
    for cut in [(), *((one,) for one in cuts), tuple(cuts[-2:]), (made.nodes[0], cuts[-1])]:
        left = metric(edges_left(circuit, real, len(circuit), cut))
        found = runs.run(len(circuit), cut)
        assert found["faithfulness"] == pytest.approx((left - empty) / (full - empty), abs=1e-4), cut
    if name == "distractor_copy":  # each of its edges carries all of it
        assert [runs.run(2, [one])["faithfulness"] for one in cuts] == pytest.approx([0, 0, 0], abs=1e-4)
        assert runs.run(2)["faithfulness"] == pytest.approx(1, abs=1e-4)


def test_a_single_prompt_has_no_interval():
    model, task = tiny("gpt2"), tiny_task(n=1)
    found = CircuitRuns(nodes_of(model, task), model, task).run(3)
    assert "low" not in found
    assert np.isfinite(found["faithfulness"])


# -- what is shown ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "grouped"), [("distractor_copy", True), ("backup", False)])
def test_the_edges_of_a_planted_circuit_are_shown_with_their_scores(name, grouped):
    made = planted.ALL[name](n=6, grouped=grouped)
    scores = mk.patch(made.model, made.task, "heads", progress=False)
    nodes = made.model.heads([*made.nodes, "0.2", "1.2", "2.1"])
    circuit = mk.Circuit(tuple(nodes), scores, scores.meta)
    data = circuit_view_data(circuit, made.model, made.task, edges=len(made.edges))
    shown = [one["edge"] for one in data["edges"]]
    assert set(shown[: len(made.edges)]) == {f"{source}->{target}" for source, target in made.edges}
    told = truth.attribution(truth.WrittenOut(made.model.hf), made.task, steps=0)
    for one in data["edges"]:
        assert one["score"] == pytest.approx(told[tuple(one["edge"].split("->"))], abs=1e-4)
    assert "EAP" in data["edges_by"]


@pytest.mark.parametrize("most", [0, 5, 1000])
@pytest.mark.parametrize("ungroup", [False, True])
def test_the_strongest_edges_are_shown_and_no_node_stands_alone(most, ungroup):
    model, task = tiny("llama"), tiny_task()
    circuit = mk.discover(model, task, "eap", size=6, sites="heads mlps", min_share=0, ungroup=ungroup, progress=False)
    data = circuit_view_data(circuit, model, task, edges=most)
    names = {"embed", "logits", *map(str, circuit.nodes)}
    every = mk.edges(model, task, method="eap", ungroup=ungroup, progress=False)
    graph, inside = every.graph, {}
    for row in every.frame.itertuples():
        readers = [str(one) for one in graph.readers(mk.edge(f"{row.source}->{row.target}").target)]
        if row.source in names and (read := [one for one in readers if one in names]):
            inside[f"{row.source}->{row.target}"] = (row.score, row.source, read)
    ranked = sorted(inside, key=lambda one: -abs(inside[one][0]))
    wanted = {*ranked[:most]}
    for node in names:
        wanted.update([one for one in ranked if inside[one][1] == node][:1])
        wanted.update([one for one in ranked if node in inside[one][2]][:1])
    assert [one["edge"] for one in data["edges"]] == [one for one in ranked if one in wanted]
    order = {one["site"]: one["order"] for one in data["nodes"]}
    assert order == {"embed": 0, "logits": 0, **{str(one): i for i, one in enumerate(circuit.nodes)}}
    for one in data["edges"]:
        score, *ends = inside[one["edge"]]
        assert one["score"] == pytest.approx(score, rel=1e-4, abs=1e-6)
        assert [one["source"], one["readers"]] == ends
        assert one["slot"] == mk.edge(one["edge"]).target.kind
        assert one["order"] == max(order[one["source"]], min(order[node] for node in one["readers"]))
    cut = data["edges"][0]["edge"]  # what is shown can be cut
    assert np.isfinite(CircuitRuns(circuit, model, task).run(6, [cut])["faithfulness"])


@pytest.mark.parametrize("several", [False, True])
def test_nodes_stand_where_patching_them_does_most(several):
    model, task = tiny("llama"), tiny_task(n=3)
    places = {"A": torch.tensor([3, 3, 3]), "B": torch.tensor([4, 5, 6]), "END": None}
    if several:
        ids = (task.clean, task.corrupt, task.correct, task.wrong)
        task = mk.Task.from_tokens(*ids, spans={name: places[name] for name in "BA"})
    circuit, hub = nodes_of(model, task, size=9), untouched("llama")
    data = circuit_view_data(circuit, model, task)
    label = ["A", "B", "END"] if several else [str(one) for one in task.clean[0].tolist()]
    places["END"] = torch.tensor([8, 8, 8])
    where = [places[name] for name in label] if several else [torch.full((3,), i) for i in range(9)]
    base = mk.metrics.logit_diff(hub(task.corrupt, use_cache=False).logits.detach(), task).mean()
    rows = {one["site"]: one for one in data["nodes"]}
    for node in circuit.nodes:
        changes = []
        for positions in where:
            each = [
                patch_cell(hub, task.corrupt[[i]], task.clean[[i]], node.kind, node.layer, node.head, int(at))
                for i, at in enumerate(positions)
            ]
            changes.append(float((mk.metrics.logit_diff(torch.cat(each), task).mean() - base).abs()))
        assert data["columns"][rows[str(node)]["column"]] == label[int(np.argmax(changes))]
    assert rows["embed"]["column"] == 0
    assert rows["logits"]["column"] == len(data["columns"]) - 1
    used = {rows[str(node)]["column"] for node in circuit.nodes}
    assert used | {len(data["columns"]) - 1} == {*range(len(data["columns"]))}
    assert data["columns"][-1] == label[-1]
    assert "span" in data["columns_by"] if several else "position" in data["columns_by"]


def test_what_cannot_be_measured_is_said_and_the_rest_is_shown():
    model, task = tiny("llama"), tiny_task()
    circuit = nodes_of(model, task)
    same = task.with_metric(lambda logits, task: torch.ones(len(task)))
    data = circuit_view_data(circuit, model, same)
    assert data["columns"] == ["all positions"]
    assert {one["column"] for one in data["nodes"]} == {0}
    assert data["edges"] == []
    assert "cannot score" in data["edges_by"]
    with pytest.raises(MetricError):
        CircuitRuns(circuit, model, same)


def test_without_a_model_heads_stand_by_their_number():
    circuit = node_circuit("2.7 m1 0.3 1.7")
    data = circuit_view_data(circuit)
    assert data["columns"] == ["head 3", "head 7", "MLP"]
    assert [(one["site"], one["column"]) for one in data["nodes"]] == [("2.7", 1), ("m1", 2), ("0.3", 0), ("1.7", 1)]
    assert data["edges"] == []
    assert [one["score"] for one in data["nodes"]] == circuit.frame["score"].tolist()
    assert {one["se"] for one in data["nodes"]} == {None}
    assert data["title"] == "Circuit of 4 nodes"
    assert circuit_view_data(node_circuit("m0"))["title"] == "Circuit of 1 node"


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_a_circuit_of_edges_shows_its_edges(graph):
    circuit = made_of_edges(graph, 20)
    data = circuit_view_data(circuit)
    assert [one["edge"] for one in data["edges"]] == [str(one) for one in circuit.edges]
    assert [one["score"] for one in data["edges"]] == circuit.frame["score"].tolist()
    assert [one["order"] for one in data["edges"]] == [*range(20)]
    sums = circuit.scores.nodes().frame.set_index("site")["score"]
    for node in data["nodes"]:
        touched = [i for i, one in enumerate(data["edges"]) if node["site"] in (one["source"], *one["readers"])]
        assert node["order"] == touched[0]
        assert node["score"] == (None if node["site"] == "logits" else pytest.approx(sums[node["site"]]))
    assert {r for one in data["edges"] for r in (one["source"], *one["readers"])} == {n["site"] for n in data["nodes"]}


@pytest.mark.parametrize("level", ["node", "edge"])
@pytest.mark.parametrize("live", [False, True])
def test_all_of_it_is_plain(level, live):
    model, task = tiny("llama"), tiny_task()
    circuit = (
        nodes_of(model, task)
        if level == "node"
        else mk.discover(model, task, "eap", level="edge", size=30, progress=False)
    )
    data = circuit_view_data(circuit, *((model, task) if live else ()))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["title"] == f"Circuit of {len(circuit)} {level}s, tiny, {model.name}"
    assert data["unit"] == circuit.scores.unit
    assert {one["column"] for one in data["nodes"]} <= {*range(len(data["columns"]))}


def test_bad_input():
    model, task = tiny("llama"), tiny_task()
    circuit, edges = nodes_of(model, task), edge_circuit(model)
    for given, told in ((("model", model), "model without a task"), (("task", task), "task without a model")):
        with pytest.raises(OptionError, match=told):
            circuit_view_data(circuit, **dict([given]))
    with pytest.raises(OptionError, match="edges = -1"):
        circuit_view_data(circuit, edges=-1)
    for of, (other, why) in itertools.product(
        (CircuitRuns, circuit_view_data), ((node_circuit("0.1", 3), "n_heads 3"), (node_circuit("", 4), "nothing"))
    ):
        with pytest.raises(OptionError, match=why):
            of(other, model, task)
        with pytest.raises(OptionError, match="n_kv_heads=4"):
            of(edge_circuit(tiny("gpt2")), model, task)
        with pytest.raises(SiteError, match=r"7\.1"):
            of(node_circuit("7.1", None, n_layers=8), model, task)
    keys = mk.discover(model, task, sites="q", size=2, progress=False)
    with pytest.raises(UnsupportedError, match="kinds q"):
        CircuitRuns(keys, model, task)
    for one in (circuit, edges):
        runs = CircuitRuns(one, model, task)
        for size in (-1, len(one) + 1, 2.0, True):
            with pytest.raises(OptionError, match="size"):
                runs.run(size, [])
        for cut in ("9.9", "logits", "embed", "m0->0.0.q", "no site", "a->b", f"{one.nodes[0]}.q"):
            with pytest.raises(SiteError):
                runs.run(2, [cut])
    out = next(one for one in edges.scores.graph.edges if one not in edges.edges)
    with pytest.raises(SiteError, match="not in the circuit"):
        CircuitRuns(edges, model, task).run(2, [str(out)])
