"""What stands in a file of MIB's circuit track: as EAP-IG writes it, and read from it."""

from __future__ import annotations

import json
from dataclasses import replace
from zlib import crc32

import pytest
import torch
from made_circuits import GRAPHS, edge_circuit, edge_scores, same_table
from reference.eap_ig import graph_file

import mechkit as mk
from mechkit.edge_scores import EdgeScores
from mechkit.errors import StorageError, UnsupportedError
from mechkit.graph import Edge, Graph
from mechkit.sites import Site, site


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


# -- written ----------------------------------------------------------------------------------------------------------


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


# -- read -------------------------------------------------------------------------------------------------------------


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
