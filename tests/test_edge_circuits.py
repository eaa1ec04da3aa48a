"""Circuits of edges: what they are made of, what is in them, dead ends, and what makes none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_circuits import GRAPHS, edge_circuit, edge_scores, node_circuit

import mechkit as mk
from mechkit.errors import OptionError, SiteError, UnsupportedError
from mechkit.graph import EMBED, LOGITS, edge
from mechkit.sites import site


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_the_nodes_of_a_circuit_of_edges_are_what_the_edges_touch(graph):
    circuit = edge_circuit(graph)
    touched = set()
    for one in circuit.edges:
        touched.add(str(one.source))
        target = one.target
        if target.grouped:
            size = graph.n_heads // graph.n_kv_heads
            touched.update(f"{target.layer}.{target.head * size + i}" for i in range(size))
        else:
            touched.add(f"{target.layer}.{target.head}" if target.head is not None else str(target))
    assert {str(one) for one in circuit.nodes} == touched - {"embed", "logits"}
    assert circuit.level == "edge"
    assert len(circuit) == len(circuit.edges) == 12
    assert circuit.heads.heads_per_layer == 4
    assert circuit.graph == graph


def test_the_frame_of_a_circuit_of_edges_has_its_rows_in_its_order():
    circuit = edge_circuit(GRAPHS["grouped"])
    rows = circuit.frame
    assert [f"{a}->{b}" for a, b in zip(rows.source, rows.target, strict=True)] == [str(one) for one in circuit.edges]
    full = {(row.source, row.target): row.score for row in circuit.scores.frame.itertuples()}
    assert rows.score.tolist() == [full[row.source, row.target] for row in rows.itertuples()]
    assert list(rows.columns) == ["source", "target", "score", "se", "n"]


def test_what_is_in_a_circuit_is_found_by_name():
    circuit = mk.Circuit.of_edges(
        ["embed->1.2.k", ("m0", "2.1.q"), "1.3->logits", "embed->1.3.k"], edge_scores(GRAPHS["grouped"])
    )
    assert [str(one) for one in circuit.edges] == ["embed->1.kv1.k", "m0->2.1.q", "1.3->logits"]
    assert "embed->1.3.k" in circuit  # the key of its group
    assert edge("m0->2.1.q") in circuit
    assert "m0->2.1.k" not in circuit
    assert "1.2" in circuit
    assert "m0" in circuit
    assert "0.0" not in circuit
    assert repr(circuit) == "Circuit of 3 edges among 4 nodes: embed->1.kv1.k m0->2.1.q 1.3->logits"
    assert "3 edges among 4 nodes" in circuit._repr_html_()
    with pytest.raises(SiteError, match=r"2\.0->1\.0\.q"):
        "2.0->1.0.q" in circuit  # noqa: B015


def test_many_edges_are_shown_in_part():
    circuit = edge_circuit(GRAPHS["plain"], 30)
    assert repr(circuit).endswith("…")
    assert "the first 20" in circuit._repr_html_()
    assert circuit._repr_html_().count("<tr>") == 21


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("seed", range(4))
def test_pruned_keeps_the_edges_on_a_path_and_no_others(graph, seed):
    circuit = edge_circuit(graph, 60, seed)

    def reaches(node, goal, forward) -> bool:
        if node == goal:
            return True
        steps = [(e.source, graph.readers(e.target)) for e in circuit.edges]
        onward = [nodes for source, nodes in steps if source == node] if forward else []
        back = [(source,) for source, nodes in steps if node in nodes] if not forward else []
        return any(reaches(one, goal, forward) for nodes in (*onward, *back) for one in nodes)

    on_path = [
        one
        for one in circuit.edges
        if reaches(one.source, EMBED, False) and any(reaches(node, LOGITS, True) for node in graph.readers(one.target))
    ]
    pruned = circuit.pruned()
    assert list(pruned.edges) == on_path
    assert 0 < len(pruned) < len(circuit)
    assert pruned.pruned().same_as(pruned)
    assert pruned.scores is circuit.scores


def test_a_circuit_of_edges_becomes_one_of_nodes():
    circuit = edge_circuit(GRAPHS["grouped"])
    nodes = circuit.as_nodes()
    assert nodes.level == "node"
    assert nodes.nodes == circuit.nodes
    table = circuit.scores.frame
    for row in nodes.frame.itertuples():
        assert row.score == pytest.approx(table.score[table.source == row.site].sum())
    again = nodes.as_nodes()
    assert again.same_as(nodes)
    assert again.scores is nodes.scores


def test_what_makes_no_circuit_is_refused():
    graph = GRAPHS["grouped"]
    scores, nodes = edge_scores(graph), node_circuit("0.1").scores
    assert isinstance(nodes, mk.Scores)
    one = edge("m0->2.1.q")
    with pytest.raises(OptionError, match="EdgeScores"):
        mk.Circuit((site("m0"), site("2.1")), nodes, {}, (one,))
    with pytest.raises(OptionError, match="EdgeScores"):
        mk.Circuit.of_edges([one], nodes)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="that the edges touch"):
        mk.Circuit((site("m0"),), scores, {}, (one,))
    with pytest.raises(OptionError, match=r"scores\.nodes"):
        mk.Circuit((site("m0"),), scores)
    with pytest.raises(OptionError, match="of_edges"):
        mk.Circuit((), scores, {}, ("m0->2.1.q",))  # type: ignore[arg-type]
    for wrong in ("2.1->m0", "m0->9.1.q", "m0->2.1"):
        with pytest.raises(SiteError):
            mk.Circuit.of_edges([wrong], scores)
    with pytest.raises(UnsupportedError, match="Pruning"):
        node_circuit("0.1").pruned()
    with pytest.raises(OptionError, match=r"m0->2\.1\.q"):
        mk.Circuit.of_edges([one], scores.only(["embed->0.0.q"])).frame  # noqa: B018
    with pytest.raises(OptionError, match=r"1 node without a score: 2\.11"):
        mk.Circuit((site("2.11"),), replace(nodes, frame=nodes.frame.head(5))).frame  # noqa: B018
