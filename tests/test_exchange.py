"""Circuits written and read back: JSON, networkx, and the files of MIB's circuit track."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, tiny
from reference.eap_ig import graph_file
from test_circuit_algebra import GRAPHS, edge_circuit, edge_scores, node_circuit, pair

import mechkit as mk
from mechkit.edge_scores import EdgeScores
from mechkit.errors import OptionError, SiteError, StorageError, UnsupportedError
from mechkit.graph import Edge, Graph, edge
from mechkit.sites import Site, site


def same_table(one: pd.DataFrame, other: pd.DataFrame, **options) -> None:
    """Equal scores of equal rows, in whatever order; columns that did not travel are left out."""
    keys = ["source", "target"] if "source" in one else ["site"]
    left, right = (table.set_index(keys)[["score"]].sort_index() for table in (one, other))
    pd.testing.assert_frame_equal(left, right, **options)


# -- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["node", "edge"])
def test_saved_and_loaded_is_the_same_circuit(tmp_path, level):
    for circuit in (pair(level)[0], pair(level)[0] - pair(level)[0]):
        again = mk.Circuit.from_json(circuit.to_json(tmp_path / "deep" / "circuit.json"))
        assert (again.nodes, again.edges, again.level) == (circuit.nodes, circuit.edges, level)
        assert type(again.scores) is type(circuit.scores)
        pd.testing.assert_frame_equal(again.scores.frame, circuit.scores.frame)
        assert again.scores.unit == circuit.scores.unit
        assert again.scores.meta == circuit.scores.meta
        assert again.meta == json.loads(json.dumps(circuit.meta))
        assert again.frame.equals(circuit.frame)


def test_missing_numbers_are_missing_again(tmp_path):
    circuit = edge_circuit(GRAPHS["plain"])
    frame = circuit.scores.frame.assign(se=np.nan)
    frame.loc[3, "score"] = np.nan
    circuit = replace(circuit, scores=replace(circuit.scores, frame=frame))
    pd.testing.assert_frame_equal(mk.Circuit.from_json(circuit.to_json(tmp_path / "c.json")).scores.frame, frame)


def test_files_of_the_first_version_are_still_read(tmp_path):
    (tmp_path / "old.json").write_text(
        json.dumps(
            {
                "format": "mechkit circuit",
                "version": 1,
                "nodes": ["1.2", "0.1"],
                "meta": {"method": "discover: patch"},
                "scores": {
                    "unit": "fraction of the gap",
                    "meta": {"n_heads": 4},
                    "columns": {"site": "str", "layer": "int64", "head": "Int64", "kind": "str", "score": "float64"},
                    "rows": [["0.1", 0, 1, "z", -0.5], ["1.2", 1, 2, "z", 0.75], ["m0", 0, None, "mlp", None]],
                },
            }
        )
    )
    circuit = mk.Circuit.from_json(tmp_path / "old.json")
    assert [str(node) for node in circuit.nodes] == ["1.2", "0.1"]
    assert (circuit.level, circuit.edges) == ("node", ())
    assert circuit.frame.score.tolist() == [0.75, -0.5]
    assert circuit.heads.heads_per_layer == 4
    assert circuit.scores.frame["head"].isna().tolist() == [False, False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"edges": ["2.1->m0"]},
        {"edges": None},
        {"nodes": ["0.1"]},
        {"nodes": ["what"]},
        {"scores": {}},
        {"scores": []},
    ],
)
def test_a_file_that_was_changed_into_no_circuit_is_refused(tmp_path, change):
    path = edge_circuit(GRAPHS["plain"]).to_json(tmp_path / "circuit.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StorageError, match=r"circuit\.json"):
        mk.Circuit.from_json(path)


# -- networkx -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_a_circuit_of_edges_goes_through_networkx(graph):
    circuit = edge_circuit(graph, 20)
    made = circuit.to_networkx()
    assert isinstance(made, networkx.DiGraph)
    assert networkx.is_directed_acyclic_graph(made)
    again = mk.Circuit.from_networkx(made)
    assert (again.nodes, again.edges, again.scores.unit) == (circuit.nodes, circuit.edges, circuit.scores.unit)
    pd.testing.assert_frame_equal(again.frame, circuit.frame)
    assert again.graph == graph
    assert again.meta == circuit.meta


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_the_edges_of_networkx_are_those_of_every_reader(graph):
    circuit = edge_circuit(graph, 20)
    made = circuit.to_networkx()
    readers = [
        (str(one.source), str(node), str(one.target)) for one in circuit.edges for node in graph.readers(one.target)
    ]
    assert sorted(made.edges(keys=True)) == sorted(readers)
    score = dict(zip(map(str, circuit.edges), circuit.frame.score, strict=True))
    for source, _, key, data in made.edges(keys=True, data=True):
        assert data["slot"] == site(key).kind
        assert data["edge"] == f"{source}->{key}"
        assert data["score"] == score[data["edge"]]
        assert data["n"] == 7
    total = circuit.scores.nodes().frame.set_index("site").score
    for name, data in made.nodes(data=True):
        one = site(name)
        assert (data["kind"], data["layer"], data.get("head")) == (one.kind, one.layer, one.head)
        assert data.get("score") == (None if name == "logits" else total[name])


def test_paths_of_networkx_are_what_pruning_keeps():
    circuit = edge_circuit(GRAPHS["grouped"], 60)
    made = circuit.to_networkx()
    on_path = networkx.descendants(made, "embed") & networkx.ancestors(made, "logits")
    assert {str(node) for node in circuit.pruned().nodes} >= on_path  # a group's other heads may be dead ends
    assert {str(one.source) for one in circuit.pruned().edges} == on_path | {"embed"}
    assert 0 < len(circuit.pruned()) < len(circuit)


def test_a_circuit_of_nodes_has_the_models_edges_among_them():
    circuit = node_circuit("2.1 0.3 m1")
    bare = circuit.to_networkx()
    assert list(bare) == ["2.1", "0.3", "m1"]  # its model's key/value groups are not known
    assert bare.number_of_edges() == 0
    meta = {**circuit.scores.meta, "n_heads": 12, "n_kv_heads": 12, "parallel": False}
    known = replace(circuit, scores=replace(circuit.scores, meta=meta))
    made = known.to_networkx()
    among = {"embed", "logits", "2.1", "0.3", "m1"}
    expected = [
        (str(one.source), str(reader), str(one.target))
        for one in Graph(3, 12, 12).edges
        for reader in Graph(3, 12, 12).readers(one.target)
        if {str(one.source), str(reader)} <= among
    ]
    assert sorted(made.edges(keys=True)) == sorted(expected)
    assert all("score" not in data for *_, data in made.edges(data=True))
    for one in (bare, made):
        again = mk.Circuit.from_networkx(one)
        assert again.nodes == circuit.nodes
        assert again.level == "node"
        assert again.frame.equals(circuit.frame)
        assert again.scores.unit == circuit.scores.unit


def test_a_model_says_which_edges_a_circuit_of_its_nodes_has():
    model = tiny("llama")
    circuit = node_circuit("2.1 0.3 m1", n_heads=4)
    made = circuit.to_networkx(model)
    keys = {(source, reader, key) for source, reader, key in made.edges(keys=True)}
    assert ("0.3", "2.1", "2.kv0.k") in keys
    assert ("embed", "0.3", "0.kv1.v") in keys
    assert not any(reader in ("2.0", "0.2") for _, reader, _ in keys)


def test_networkx_can_write_what_it_is_given(tmp_path):
    for circuit in (edge_circuit(GRAPHS["grouped"]), node_circuit("2.1 m1")):
        made = circuit.to_networkx()
        networkx.write_graphml(made, tmp_path / "circuit.graphml")
        read = [
            networkx.read_graphml(tmp_path / "circuit.graphml", force_multigraph=True),
            networkx.node_link_graph(json.loads(json.dumps(networkx.node_link_data(made)))),
        ]
        for again in map(mk.Circuit.from_networkx, read):
            assert (again.nodes, again.edges) == (circuit.nodes, circuit.edges)
            assert again.frame.score.tolist() == circuit.frame.score.tolist()


def test_a_graph_made_by_hand_is_read():
    model = tiny("llama")
    made = networkx.DiGraph()
    made.add_edge("embed", "0.1", slot="v")
    made.add_edge("0.1", "m1")
    made.add_edge("m1", "logits")
    circuit = mk.Circuit.from_networkx(made, model)
    assert [str(one) for one in circuit.edges] == ["embed->0.kv0.v", "0.1->m1", "m1->logits"]
    assert circuit.frame.score.tolist() == [1, 1, 1]
    assert "membership" in circuit.scores.unit
    nodes = networkx.DiGraph()
    nodes.add_nodes_from(["2.1", "m0"], score=0.5)
    circuit = mk.Circuit.from_networkx(nodes)
    assert ([str(one) for one in circuit.nodes], circuit.frame.score.tolist()) == (["2.1", "m0"], [0.5, 0.5])


def _graph(**edges) -> networkx.MultiDiGraph:
    made = edge_circuit(GRAPHS["plain"], 3).to_networkx()
    made.add_edge(*edges.pop("between"), **edges)
    return made


def test_graphs_that_are_no_circuit_are_refused():
    with pytest.raises(OptionError, match="Graph"):
        mk.Circuit.from_networkx(networkx.Graph())
    with pytest.raises(OptionError, match="dict"):
        mk.Circuit.from_networkx({})
    with pytest.raises(SiteError, match="Alice"):
        mk.Circuit.from_networkx(_graph(between=("Alice", "m1"), score=1))
    with pytest.raises(SiteError, match=r"2\.1->m0"):
        mk.Circuit.from_networkx(_graph(between=("2.1", "m0"), score=1))
    with pytest.raises(OptionError, match="slot = None"):
        mk.Circuit.from_networkx(_graph(between=("m0", "2.1"), score=1))
    with pytest.raises(OptionError, match="no score"):
        mk.Circuit.from_networkx(_graph(between=("m0", "2.1"), slot="q"))
    with pytest.raises(OptionError, match="'much'"):
        mk.Circuit.from_networkx(networkx.DiGraph([("embed", "m0", {"score": "much"})]), tiny("gpt2"))
    with pytest.raises(OptionError, match="model="):
        mk.Circuit.from_networkx(networkx.DiGraph([("embed", "m0")]))
    with pytest.raises(OptionError, match="neuron"):
        mk.Circuit.from_networkx(networkx.DiGraph(level="neuron"))
    lonely = _graph(between=("m0", "m1"), score=1)
    lonely.add_nodes_from(["2.3", "0.0"])
    lonely.remove_edges_from([end for end in list(lonely.edges) if set(end) & {"2.3", "0.0"}])
    with pytest.raises(OptionError, match=r"0\.0, 2\.3"):
        mk.Circuit.from_networkx(lonely)


# -- MIB ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_circuit_goes_through_a_file_of_mib(tmp_path, family, suffix):
    circuit = edge_circuit(tiny(family).graph(), 30)
    again = mk.Circuit.from_mib(circuit.to_mib(tmp_path / f"circuit{suffix}"))
    assert again.same_as(circuit)
    assert again.graph == circuit.graph
    same_table(again.scores.frame, circuit.scores.frame, rtol=1e-12)
    assert again.scores.unit == circuit.scores.unit
    assert again.meta == circuit.meta
    assert [str(one) for one in again.edges] == sorted(
        map(str, again.edges), key=lambda text: -abs(again.frame.score[list(map(str, again.edges)).index(text)])
    )


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_a_circuit_of_nodes_goes_through_a_file_of_mib(tmp_path, graph, suffix):
    edges = edge_circuit(graph, 10)
    circuit = edges.as_nodes()
    again = mk.Circuit.from_mib(circuit.to_mib(tmp_path / f"circuit{suffix}"))
    assert again.same_as(circuit)
    same_table(again.scores.frame, circuit.scores.frame)
    heads = replace(circuit.scores, frame=circuit.scores.frame[circuit.scores.frame.kind == "z"])
    circuit = mk.Circuit(tuple(circuit.heads), heads)
    again = mk.Circuit.from_mib(circuit.to_mib(tmp_path / f"heads{suffix}"))
    assert again.same_as(circuit)
    assert again.graph == replace(graph)


def test_nodes_that_were_not_scored_stay_in_the_file(tmp_path):
    graph = GRAPHS["plain"]
    scores = edge_circuit(graph).as_nodes().scores
    heads = replace(scores, frame=scores.frame[scores.frame.kind == "z"])
    circuit = mk.Circuit((site("2.1"), site("0.3")), heads)
    written = json.loads(circuit.to_mib(tmp_path / "circuit.json").read_text())
    mlps = {"m0", "m1", "m2"}
    inside = {name for name, one in written["nodes"].items() if one["in_graph"]}
    assert inside == mlps | {"a2.h1", "a0.h3", "input", "logits"}
    assert {name for name, one in written["nodes"].items() if "score" not in one} == mlps | {"input", "logits"}
    among = graph.between([*circuit.nodes, *map(site, mlps)])
    assert {name for name, one in written["edges"].items() if one["in_graph"]} == set(map(_named, among))


def test_the_file_is_what_eap_ig_writes(tmp_path):
    """Every name, in the graph or not, and the sum of the scores, as the literal form has them."""
    for name, graph in GRAPHS.items():
        circuit = edge_circuit(graph, 30)
        written = json.loads(circuit.to_mib(tmp_path / f"{name}.json").read_text())
        literal = graph_file(3, 4, graph.parallel, lambda name: 0.0, lambda name: False)
        assert list(written["nodes"]) == list(literal["nodes"])
        assert set(written["edges"]) == set(literal["edges"])
        assert written["cfg"].items() >= literal["cfg"].items()
        assert all(set(one) == {"score", "in_graph"} for one in written["edges"].values())
        total = sum(one["score"] for one in written["edges"].values())
        assert total == pytest.approx(circuit.scores.frame.score.sum())
        inside = {edge for edge, one in written["edges"].items() if one["in_graph"]}
        expected = set()
        for one in circuit.edges:
            source = {"embed": "input", "mlp": f"m{one.source.layer}"}.get(
                one.source.kind, f"a{one.source.layer}.h{one.source.head}"
            )
            if one.target.kind in ("mlp", "logits"):
                expected.add(f"{source}->{one.target}")
            for head in graph.readers(one.target) if one.target.kind in "qkv" else ():
                expected.add(f"{source}->a{head.layer}.h{head.head}<{one.target.kind}>")
        assert inside == expected
        touched = {part.split("<")[0] for one in inside for part in one.split("->")}
        assert {node for node, one in written["nodes"].items() if one["in_graph"]} == touched | {"logits"}


def test_groups_share_a_score_evenly(tmp_path):
    scores = edge_scores(GRAPHS["grouped"])
    circuit = mk.Circuit.of_edges(["m0->1.kv1.v"], scores)
    written = json.loads(circuit.to_mib(tmp_path / "circuit.json").read_text())["edges"]
    value = circuit.frame.score[0]
    assert written["m0->a1.h2<v>"] == written["m0->a1.h3<v>"] == {"score": value / 2, "in_graph": True}
    assert written["m0->a1.h1<v>"]["in_graph"] is False


def _number(name: str) -> float:
    return (crc32(name.encode()) % 2001 - 1000) / 1000


def _inside(name: str) -> bool:
    return crc32(name.encode()) % 5 == 0


def _named(one: Edge | Site) -> str:
    if isinstance(one, Edge):
        return f"{_named(one.source)}->{_named(one.target)}"
    if one.head is None:
        return "input" if one.kind == "embed" else str(one)
    return f"a{one.layer}.h{one.head}" + ("" if one.is_head else f"<{one.kind}>")


@pytest.mark.parametrize("parallel", [False, True])
def test_a_file_of_eap_ig_is_read(tmp_path, parallel):
    content = graph_file(3, 4, parallel, _number, _inside)
    (tmp_path / "importances.json").write_text(json.dumps(content))
    circuit = mk.Circuit.from_mib(tmp_path / "importances.json")
    assert circuit.level == "edge"
    assert circuit.graph == Graph(3, 4, 4, parallel)
    assert len(circuit.scores) == len(content["edges"])
    table = {_named(one): score for one, score in zip(circuit.scores.edges, circuit.scores.frame.score, strict=True)}
    assert table == {name: one["score"] for name, one in content["edges"].items()}
    assert {_named(one) for one in circuit.edges} == {name for name in content["edges"] if _inside(name)}
    assert circuit.dimensions["d_model"] == 32
    assert circuit.heads.heads_per_layer == 4
    assert circuit.meta["file"] == "importances.json"


@pytest.mark.parametrize("parallel", [False, True])
def test_importances_of_query_heads_are_summed_to_their_groups(tmp_path, parallel):
    content = graph_file(3, 4, parallel, _number, _inside)
    (tmp_path / "importances.json").write_text(json.dumps(content))
    circuit = mk.Circuit.from_mib(tmp_path / "importances.json", n_kv_heads=2)
    assert circuit.graph == Graph(3, 4, 2, parallel)
    inside = set()
    for one, score in zip(circuit.scores.edges, circuit.scores.frame.score, strict=True):
        target = one.target
        members = [target]
        if target.kind in ("k", "v"):
            members = [Site(target.layer, 2 * target.head + i, target.kind) for i in range(2)]
        names = [_named(Edge(one.source, member)) for member in members]
        assert score == pytest.approx(sum(map(_number, names)))
        if any(map(_inside, names)):
            inside.add(one)
    assert {*circuit.edges} == inside


def test_scores_of_nodes_make_a_circuit_of_nodes(tmp_path):
    content = graph_file(3, 4, False, lambda name: 0.0, _inside, _number)
    content["nodes"]["m1"]["score"] = float("nan")  # not scored: always in, and no part of what was found
    (tmp_path / "nodes.json").write_text(json.dumps(content))
    circuit = mk.Circuit.from_mib(tmp_path / "nodes.json")
    assert circuit.level == "node"
    scored = {name for name in content["nodes"] if name not in ("logits", "m1")}
    assert dict(zip(map(_named, map(site, circuit.scores.frame.site)), circuit.scores.frame.score, strict=True)) == {
        name: _number(name) for name in scored
    }
    assert {_named(one) for one in circuit.nodes} == {name for name in scored - {"input"} if _inside(name)}
    assert mk.Circuit.from_mib(tmp_path / "nodes.json", level="edge").level == "edge"


def test_a_file_of_membership_alone_is_read(tmp_path):
    content = graph_file(3, 4, False, _number, _inside)
    for one in content["edges"].values():
        del one["score"]
    (tmp_path / "circuit.json").write_text(json.dumps(content))
    circuit = mk.Circuit.from_mib(tmp_path / "circuit.json")
    assert {_named(one) for one in circuit.edges} == {name for name in content["edges"] if _inside(name)}
    assert circuit.frame.score.tolist() == [1] * len(circuit)
    assert circuit.scores.frame.score.sum() == len(circuit)
    assert "membership" in circuit.scores.unit
    nodes = mk.Circuit.from_mib(tmp_path / "circuit.json", level="node")
    inside = {name for name in content["nodes"] if _inside(name)} - {"input", "logits"}
    assert {_named(one) for one in nodes.nodes} == inside
    content["edges"] = {}
    (tmp_path / "circuit.json").write_text(json.dumps(content))
    assert mk.Circuit.from_mib(tmp_path / "circuit.json").same_as(nodes)


def test_tensors_of_eap_ig_are_read(tmp_path):
    content = graph_file(3, 4, False, _number, _inside)
    sources = [name for name in content["nodes"] if name != "logits"]
    targets = [f"a{at}.h{head}<{slot}>" for at in range(3) for slot in "qkv" for head in range(4)]
    targets = [*targets[:12], "m0", *targets[12:24], "m1", *targets[24:], "m2", "logits"]
    scores, inside = torch.zeros(len(sources), len(targets)), torch.zeros(len(sources), len(targets), dtype=torch.bool)
    for name, one in content["edges"].items():
        source, target = name.split("->")
        scores[sources.index(source), targets.index(target)] = one["score"]
        inside[sources.index(source), targets.index(target)] = one["in_graph"]
    inside[-1, 0] = True  # where there is no edge, as selecting whole nodes leaves it
    saved = {
        "cfg": content["cfg"],
        "src_nodes": sources,
        "dst_nodes": targets,
        "edges_scores": scores,
        "edges_in_graph": inside,
        "nodes_in_graph": torch.tensor([_inside(name) for name in sources]),
    }
    torch.save(saved, tmp_path / "circuit.pt")
    (tmp_path / "circuit.json").write_text(json.dumps(content))
    circuit, same = (mk.Circuit.from_mib(tmp_path / f"circuit{suffix}") for suffix in (".pt", ".json"))
    assert circuit.same_as(same)
    same_table(circuit.scores.frame, same.scores.frame, rtol=1e-6)
    torch.save(saved | {"nodes_scores": torch.tensor([_number(name) for name in sources])}, tmp_path / "nodes.pt")
    assert mk.Circuit.from_mib(tmp_path / "nodes.pt").level == "node"
    written = torch.load(circuit.to_mib(tmp_path / "again.pt"), weights_only=True)
    assert (written["src_nodes"], written["dst_nodes"]) == (sources, targets)
    for name, wrong in {
        "src_nodes": targets,
        "edges_scores": scores[1:],
        "nodes_in_graph": inside,
        "edges_in_graph": [1],
        "cfg": {"n_layers": 3},
    }.items():
        torch.save(saved | {name: wrong}, tmp_path / "wrong.pt")
        with pytest.raises(StorageError, match=r"wrong\.pt"):
            mk.Circuit.from_mib(tmp_path / "wrong.pt")
    torch.save(saved | {"edges_scores": scores / 0}, tmp_path / "wrong.pt")
    with pytest.raises(StorageError, match="not finite"):
        mk.Circuit.from_mib(tmp_path / "wrong.pt")
    torch.save(saved | {"neurons_in_graph": scores}, tmp_path / "neurons.pt")
    with pytest.raises(UnsupportedError, match="neurons"):
        mk.Circuit.from_mib(tmp_path / "neurons.pt")


def test_edges_that_were_not_scored_stay_so(tmp_path):
    circuit = edge_circuit(GRAPHS["grouped"], 20)
    few = replace(circuit, scores=circuit.scores.only([*circuit.edges, edge("embed->0.kv0.k")]))
    assert len(mk.Circuit.from_mib(few.to_mib(tmp_path / "few.json")).scores) == len(few.scores)
    assert len(mk.Circuit.from_mib(few.to_mib(tmp_path / "few.pt")).scores) == len(circuit.scores)


def test_importances_alone_are_an_empty_circuit_with_scores(tmp_path):
    path = tmp_path / "importances.json"
    path.write_text(json.dumps(graph_file(3, 4, False, _number, lambda name: False)))
    found = mk.Circuit.from_mib(path)
    assert (len(found), found.level) == (0, "edge")
    assert isinstance(found.scores, EdgeScores)
    best = mk.Circuit.of_edges(found.scores.ranked()[:10], found.scores)
    assert best.frame.score.abs().min() >= found.scores.frame.score.abs().sort_values().iloc[-10]


def _broken(change) -> str:
    content = graph_file(2, 2, False, _number, _inside)
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("[]", "list"),
        ("{}", "'cfg' is missing"),
        (_broken(lambda c: c.pop("edges")), "'edges' is missing"),
        (_broken(lambda c: c["cfg"].pop("n_heads")), "'n_heads' is missing"),
        (_broken(lambda c: c["cfg"].update(n_layers="2")), "cfg"),
        (_broken(lambda c: c["cfg"].update(n_heads=0)), "cfg"),
        (_broken(lambda c: c["nodes"].update({"a5.h0": {"in_graph": True}})), "a5.h0"),
        (_broken(lambda c: c["edges"].update({"m1->m0": {"score": 1.0, "in_graph": True}})), "m1->m0"),
        (_broken(lambda c: c["cfg"].update(parallel_attn_mlp=True)), "no edge 'a0.h0->m0'"),
        (_broken(lambda c: c["edges"]["m0->m1"].update(score="high")), "high"),
        (_broken(lambda c: c["edges"]["m0->m1"].update(score=float("inf"))), "inf"),
        (_broken(lambda c: c["nodes"]["m1"].update(score=float("inf"))), "inf"),
        (_broken(lambda c: c["edges"]["m0->m1"].update(in_graph="yes")), "yes"),
        (_broken(lambda c: (c["edges"]["m0->m1"].clear(), c["edges"]["m0->m1"].update(in_graph=True))), "no score"),
        (_broken(lambda c: c.update(nodes=["m0"])), "list"),
    ],
)
def test_a_file_that_is_none_of_mib_is_refused(tmp_path, text, says):
    (tmp_path / "circuit.json").write_text(text)
    with pytest.raises(StorageError, match=r"circuit\.json") as error:
        mk.Circuit.from_mib(tmp_path / "circuit.json")
    assert says in str(error.value)


def test_what_mib_cannot_hold_is_refused(tmp_path):
    for name in ("missing.json", "missing.pt"):
        with pytest.raises(StorageError, match=name):
            mk.Circuit.from_mib(tmp_path / name)
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(StorageError, match=r"text\.pt"):
        mk.Circuit.from_mib(tmp_path / "text.pt")
    circuit = edge_circuit(GRAPHS["plain"])
    with pytest.raises(OptionError, match=r"\.csv"):
        circuit.to_mib(tmp_path / "circuit.csv")
    with pytest.raises(OptionError, match=r"\.csv"):
        mk.Circuit.from_mib(tmp_path / "circuit.csv")
    path = circuit.to_mib(tmp_path / "circuit.json")
    with pytest.raises(OptionError, match="3 of 4 heads"):
        mk.Circuit.from_mib(path, n_kv_heads=3)
    with pytest.raises(OptionError, match="neuron"):
        mk.Circuit.from_mib(path, level="neuron")  # type: ignore[arg-type]
    content = json.loads(path.read_text())
    content["nodes"]["m0"]["neurons"] = [True] * 32
    path.write_text(json.dumps(content))
    with pytest.raises(UnsupportedError, match="neurons"):
        mk.Circuit.from_mib(path)
    nodes = node_circuit("0.1", n_heads=4)
    with pytest.raises(OptionError, match="model="):
        nodes.to_mib(tmp_path / "nodes.json")
    assert mk.Circuit.from_mib(nodes.to_mib(tmp_path / "nodes.json", tiny("gpt2"))).same_as(nodes)
    rows = nodes.scores.frame.iloc[:1].assign(site="embed", layer=-1, kind="embed")
    embed = mk.Circuit((site("embed"),), replace(nodes.scores, frame=rows))
    with pytest.raises(UnsupportedError, match="embed"):
        embed.to_mib(tmp_path / "embed.json", tiny("gpt2"))
    frame = circuit.scores.frame.assign(score=np.nan)
    with pytest.raises(OptionError, match="not finite"):
        replace(circuit, scores=replace(circuit.scores, frame=frame)).to_mib(tmp_path / "nan.json")
    left = sorted(Path(one).name for one in tmp_path.iterdir())
    assert left == ["circuit.json", "nodes.json", "text.pt"]
