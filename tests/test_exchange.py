"""Circuits written and read back: JSON and networkx."""

from __future__ import annotations

import json
from dataclasses import replace

import networkx
import numpy as np
import pandas as pd
import pytest
from families import tiny
from made_circuits import GRAPHS, edge_circuit, node_circuit, pair

import mechkit as mk
from mechkit.errors import OptionError, SiteError, StorageError
from mechkit.graph import Graph
from mechkit.sites import site

# -- JSON -------------------------------------------------------------------------------------------------------------


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


# -- networkx ---------------------------------------------------------------------------------------------------------


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
