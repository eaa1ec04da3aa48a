"""The circuit view: what it measures is what evaluating says, what it shows is the circuit, what is cut is cut."""

from __future__ import annotations

import base64
import json

import pytest
from families import tiny, tiny_task

import mechkit as mk
from mechkit import errors, planted
from mechkit.view.circuit_of import circuit_view_data
from mechkit.view.circuit_runs import CircuitRuns

ABLATIONS = ("mean", "zero", "resample")


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def task():
    return tiny_task(n=6)


@pytest.fixture(scope="module")
def of_nodes(model, task):
    return mk.discover(model, task, "patch", sites="heads mlps", size=6, min_share=0.0, progress=False)


@pytest.fixture(scope="module")
def of_edges(model, task):
    return mk.discover(model, task, "eap", level="edge", size=40, progress=False)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_whole_and_smaller_circuits_are_as_evaluated(model, task, of_nodes, of_edges, ablation):
    for circuit in (of_nodes, of_edges):
        runs = CircuitRuns(circuit, model, task, ablation)
        told = circuit.evaluate(model, task, ablation=ablation, controls=0, progress=False)
        found = runs.run(len(circuit))
        assert found["faithfulness"] == pytest.approx(told.faithfulness, abs=1e-5)
        assert (found["low"], found["high"]) == pytest.approx(told.interval, abs=1e-5)
        known = {one["size"]: one["faithfulness"] for one in runs.curve()}
        assert known[0] == 0
        for size, value in told.curve[["size", "faithfulness"]].itertuples(index=False):
            assert known[size] == pytest.approx(value, abs=1e-5)


def test_cut_nodes_are_those_that_are_not_in_the_circuit(model, task, of_nodes, of_edges):
    gone = of_nodes.nodes[1]
    less = mk.Circuit(tuple(one for one in of_nodes.nodes if one != gone), of_nodes.scores, of_nodes.meta)
    told = less.evaluate(model, task, controls=0, curve=False, progress=False).faithfulness
    assert CircuitRuns(of_nodes, model, task).run(6, [str(gone)])["faithfulness"] == pytest.approx(told, abs=1e-5)
    head = next(one for one in of_edges.nodes if one.is_head)
    own = {str(slot) for slot in of_edges.graph.slots(head) if len(of_edges.graph.readers(slot)) == 1}
    left = [one for one in of_edges.edges if one.source != head and str(one.target) not in own]
    told = mk.Circuit.of_edges(left, of_edges.scores).evaluate(model, task, controls=0, curve=False, progress=False)
    found = CircuitRuns(of_edges, model, task).run(len(of_edges), [str(head)])
    assert found["faithfulness"] == pytest.approx(told.faithfulness, abs=1e-5)


def test_cut_edges_of_a_circuit_of_edges(model, task, of_edges):
    cut = of_edges.edges[3:6]
    left = [one for one in of_edges.edges if one not in cut]
    told = mk.Circuit.of_edges(left, of_edges.scores).evaluate(model, task, controls=0, curve=False, progress=False)
    runs = CircuitRuns(of_edges, model, task)
    assert runs.run(len(of_edges), list(map(str, cut)))["faithfulness"] == pytest.approx(told.faithfulness, abs=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
def test_cutting_the_planted_edge_ends_the_behaviour(grouped):
    made = planted.q_composition(n=12, grouped=grouped)
    nodes = mk.heads("0.0 1.0")
    scores = mk.patch(made.model, made.task, "heads", progress=False)
    circuit = mk.Circuit(tuple(nodes), scores, scores.meta)
    view = circuit.show(made.model, made.task, ablation="resample")
    assert view.result["faithfulness"] > 0.9
    drawn = {one["edge"] for one in view.about["edges"]}
    assert "0.0->1.0.q" in drawn
    view.cut("0.0->1.0.q")
    assert view.result["faithfulness"] < 0.1  # only the query of 1.0 reads what 0.0 writes
    view.restore("0.0->1.0.q")
    assert view.result["faithfulness"] > 0.9
    spare = next(one for one in drawn if one.startswith("0.0->1.") and one.endswith((".k", ".v")))
    view.cut(spare)
    assert view.result["faithfulness"] > 0.9


def test_what_is_shown_is_the_circuit(model, task, of_nodes, of_edges):
    data = circuit_view_data(of_edges)
    assert [one["edge"] for one in data["edges"]] == list(map(str, of_edges.edges))
    assert {one["site"] for one in data["nodes"]} - {"embed", "logits"} == set(map(str, of_edges.nodes))
    for i, (one, row) in enumerate(zip(data["edges"], of_edges.frame.to_dict("records"), strict=True)):
        assert (one["order"], one["score"]) == (i, row["score"])
        assert one["source"] == row["source"]
    data = circuit_view_data(of_nodes, model, task)
    assert {one["site"] for one in data["nodes"]} == {"embed", "logits", *map(str, of_nodes.nodes)}
    by_site = of_nodes.scores.frame.set_index("site")["score"]
    for one in data["nodes"]:
        if one["kind"] in ("z", "mlp"):
            assert one["score"] == pytest.approx(by_site[one["site"]])
            assert one["order"] == list(map(str, of_nodes.nodes)).index(one["site"])
    ends = {one["source"] for one in data["edges"]}, {r for one in data["edges"] for r in one["readers"]}
    for node in map(str, of_nodes.nodes):  # none stands alone
        assert node in ends[0]
        assert node in ends[1]
    json.dumps(data)
    assert circuit_view_data(of_nodes)["edges"] == []


def test_nodes_stand_where_they_do_most(model):
    task = tiny_task(n=4)
    circuit = mk.discover(model, task, "patch", size=4, min_share=0.0, progress=False)
    data = circuit_view_data(circuit, model, task)
    each = mk.patch(model, task, list(circuit.nodes), positions="each", progress=False).frame
    names = [str(int(i)) for i in task.clean[0]]
    for one in data["nodes"]:
        if one["kind"] != "z":
            continue
        rows = each.loc[each["site"] == one["site"]]
        best = int(rows.loc[rows["score"].abs().idxmax(), "position"])
        assert data["columns"][one["column"]] == names[best]


def test_changes_from_python(model, task, of_edges):
    view = of_edges.show(model, task)
    first, second = map(str, of_edges.edges[:2])
    view.cut(first, second)
    view.cut(first)
    assert list(map(str, view.cuts)) == [first, second]
    assert set(view.circuit.edges) == set(of_edges.edges[2:])
    told = view.circuit.evaluate(model, task, controls=0, curve=False, progress=False).faithfulness
    assert view.result["faithfulness"] == pytest.approx(told, abs=1e-5)
    view.resize(10)
    assert set(view.circuit.edges) == set(of_edges.edges[2:10])
    view.restore()
    assert view.cuts == []
    assert view.result["answered"] == view.asked
    shared = next(one for one in of_edges.edges if one.target.grouped)
    head = next(one for one in of_edges.graph.readers(shared.target) if one in of_edges.nodes)
    view.cut(str(head))
    assert (shared in view.circuit.edges) == (shared.source != head)
    told = view.circuit.evaluate(model, task, controls=0, curve=False, progress=False).faithfulness
    assert view.result["faithfulness"] == pytest.approx(told, abs=1e-5)
    view.restore()
    with pytest.raises(errors.OptionError, match="0 to 40"):
        view.resize(41)
    with pytest.raises(errors.SiteError):
        view.cut("9.9")
    with pytest.raises(errors.SiteError):
        view.cut("m2->0.0.q")
    assert view.asked == 6


def test_a_circuit_of_nodes_cannot_say_that_an_edge_is_cut(model, task, of_nodes):
    view = of_nodes.show(model, task)
    view.cut(str(of_nodes.nodes[0]))
    assert view.circuit.nodes == of_nodes.nodes[1:]
    view.cut(next(one["edge"] for one in view.about["edges"] if one["edge"].startswith("embed")))
    assert sum(isinstance(one, mk.Edge) for one in view.cuts) == 1
    with pytest.raises(errors.OptionError, match=r"view\.cuts"):
        _ = view.circuit


def test_groups(of_nodes):
    view = of_nodes.show()
    one, two, three = map(str, of_nodes.nodes[:3])
    view.group("first", [one, two])
    view.group("second", [two, three])
    assert view.groups == [{"name": "first", "sites": [one]}, {"name": "second", "sites": [two, three]}]
    view.group("second", [])
    assert [group["name"] for group in view.groups] == ["first"]
    with pytest.raises(errors.SiteError):
        view.group("third", ["9.9"])
    for name in ("", one):
        with pytest.raises(errors.OptionError, match="name"):
            view.group(name, [two])
    view.group("with $a_$ in it", [two])
    assert view.picture().axes


def test_a_circuit_of_no_part_can_be_shown(model, task, of_edges):
    circuit = mk.Circuit.of_edges(["embed->logits"], of_edges.scores)
    for view in (circuit.show(), circuit.show(model, task)):
        assert {node["column"] for node in view.about["nodes"]} == {0}
        assert view.picture().axes


def test_without_a_model_it_is_not_live(of_nodes, of_edges, tmp_path):
    for circuit in (of_nodes, of_edges):
        view = circuit.show()
        assert view.about["live"] is False
        assert view.about["curve"] == []
        view.cut(str(circuit.nodes[0]))
        assert "faithfulness" not in view.result
        data, _ = view._repr_mimebundle_()
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
        assert str(circuit.nodes[0]) in data["text/plain"]
        assert view.to_html(tmp_path / "page.html").stat().st_size < 200_000


def test_bad_input(model, task, of_nodes):
    with pytest.raises(errors.OptionError, match="task without a model"):
        of_nodes.show(task=task)
    with pytest.raises(errors.OptionError, match="model without a task"):
        of_nodes.show(model)
    with pytest.raises(errors.OptionError, match="at least one"):
        mk.Circuit((), of_nodes.scores).show()
    other = planted.induction(n=4)
    with pytest.raises(errors.OptionError, match="as planted-induction has"):
        of_nodes.show(other.model, other.task)


def test_a_failed_run_is_told_and_the_view_goes_on(model, task, of_nodes):
    view = of_nodes.show(model, task)
    run, view._run = view._run, lambda size, cuts: (_ for _ in ()).throw(RuntimeError("no memory"))
    view.cut(str(of_nodes.nodes[0]))
    assert view.result["error"] == "RuntimeError: no memory"
    view._run = run
    view.restore()
    assert "error" not in view.result


def test_the_explorer_links_its_views(model, task):
    explorer = mk.explore(model, task, size=5, progress=False)
    assert explorer.tokens is None
    assert "no tokenizer" in explorer.without
    chosen = [str(one) for one in explorer.circuit._circuit.nodes[:2]]
    explorer.selection = chosen
    assert explorer.attention.selection == explorer.circuit.selection == explorer.scores.selection == chosen
    explorer.circuit.site = chosen[1]
    assert explorer.attention.head == explorer.scores.site == chosen[1]
    explorer.attention.ablate(chosen[0])
    assert [str(edit.sites[0]) for edit in explorer.edits] == [chosen[0]]
    page = explorer.to_html()
    assert page.count('class="code"') == 3
    data, _ = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "faithfulness" in data["text/plain"]
    outside = next(one for one in explorer.attention._sites() if one not in explorer.circuit._sites())
    explorer.attention.selection = [outside, chosen[0]]
    explorer.circuit.selection = [chosen[1], "embed"]
    assert explorer.attention.selection == [outside, chosen[1]]
    assert explorer.selection == [outside, chosen[1], "embed"]
    assert explorer.without in explorer.sentence()
    with pytest.raises(errors.SiteError):
        explorer.selection = ["9.9"]
    with pytest.raises(errors.OptionError, match="0 to 5"):
        mk.explore(model, task, prompt=6)


def test_the_explorer_of_what_was_found_before(model, task, of_edges):
    explorer = mk.explore(model, task, circuit=of_edges, progress=False)
    assert explorer.circuit.about["total"] == len(of_edges)
    scores = mk.patch(model, task, "heads", progress=False)
    explorer = mk.explore(model, task, scores=scores, size=3, progress=False)
    assert list(explorer.circuit._circuit.nodes) == scores.ranked()[:3]
