"""Circuits of edges, set algebra, overlap and difference: against plain sets, literal draws and exact probabilities."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from reference.overlap import random_pairs
from scipy.stats import hypergeom

import mechkit as mk
from mechkit.circuits.compare import overlap
from mechkit.edge_scores import EdgeScores
from mechkit.errors import OptionError, SiteError, UnsupportedError
from mechkit.graph import EMBED, LOGITS, Edge, Graph, edge
from mechkit.sites import site

GRAPHS = {
    "plain": Graph(3, 4, 4),
    "grouped": Graph(3, 4, 2),
    "one group": Graph(3, 4, 1, parallel=True),
    "ungrouped": Graph(3, 4, 2, ungrouped=True),
}


def edge_scores(graph: Graph, seed: int = 0, unit: str = "fraction of the gap") -> EdgeScores:
    values = np.random.default_rng(seed).normal(size=graph.exists.shape)
    meta = {"method": "made up", "n_layers": graph.n_layers, "n_heads": graph.n_heads, "d_model": 32}
    return EdgeScores.of_matrix(graph, values, unit, meta, se=np.abs(values) / 5, n=7)


def edge_circuit(graph: Graph, size: int = 12, seed: int = 0) -> mk.Circuit:
    chosen = np.random.default_rng(seed + 100).permutation(len(graph))[:size]
    return mk.Circuit.of_edges([graph.edges[i] for i in chosen], edge_scores(graph, seed), {"seed": seed})


def node_circuit(nodes: str, n_heads: int | None = 12, seed: int = 0, n_layers: int = 3) -> mk.Circuit:
    sites = [f"{layer}.{head}" for layer in range(n_layers) for head in range(n_heads or 12)]
    sites += [f"m{layer}" for layer in range(n_layers)]
    found = [site(text) for text in sites]
    frame = pd.DataFrame(
        {
            "site": sites,
            "layer": [one.layer for one in found],
            "head": pd.array([one.head for one in found], dtype="Int64"),
            "kind": [one.kind for one in found],
            "score": np.random.default_rng(seed).normal(size=len(sites)),
        }
    )
    meta = {"n_layers": n_layers, "n_heads": n_heads} if n_heads else {}
    return mk.Circuit(tuple(site(text) for text in nodes.split()), mk.Scores(frame, "fraction of the gap", meta))


def pair(level: str) -> tuple[mk.Circuit, mk.Circuit]:
    if level == "edge":
        return edge_circuit(GRAPHS["grouped"], 40, seed=1), edge_circuit(GRAPHS["grouped"], 50, seed=2)
    return node_circuit("2.1 0.3 m1 1.5 2.0", seed=1), node_circuit("0.3 2.2 1.5 m0 m1 0.1", seed=2)


# -- circuits of edges --------------------------------------------------------------------------------------------


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


# -- set algebra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["node", "edge"])
def test_set_algebra_is_that_of_sets_in_the_left_order(level):
    left, right = pair(level)
    a, b = list(left.members), list(right.members)
    assert list((left | right).members) == a + [one for one in b if one not in a]
    assert list((left & right).members) == [one for one in a if one in b]
    assert list((left - right).members) == [one for one in a if one not in b]
    assert list((left ^ right).members) == [one for one in a if one not in b] + [one for one in b if one not in a]
    assert 0 < len(left & right) < len(left)
    assert (left | right).same_as(right | left)
    assert ((left | right) - (left & right)).same_as(left ^ right)
    assert not left.same_as(right)
    assert (left & right) <= left <= (left | right)
    assert not left <= right
    assert (left - left).level == level
    assert len(left - left) == 0
    assert (left - left) <= right
    assert (left | right).level == level


@pytest.mark.parametrize("level", ["node", "edge"])
def test_each_member_of_a_union_has_the_score_it_was_chosen_by(level):
    left, right = pair(level)
    union = left | right
    of_left = dict(zip(left.members, left.frame.score, strict=True))
    of_right = dict(zip(right.members, right.frame.score, strict=True))
    assert union.frame.score.tolist() == [of_left.get(one, of_right.get(one)) for one in union.members]
    assert len(union.scores) == len(left.scores)  # both scored everything
    assert (left & right).scores is left.scores
    assert union.meta["method"] == "union"
    assert union.meta["left"] == left.meta
    assert union.meta["right"] == right.meta
    assert union.scores.meta["joined_with"] == right.scores.meta
    assert union.frame.dtypes.equals(left.frame.dtypes)


def test_a_union_brings_what_only_the_right_scored():
    left, right = pair("edge")
    few = replace(left, scores=left.scores.only(left.edges))
    assert len((few | right).scores) == len(right.scores)
    assert (few | right).frame.equals((left | right).frame)


def test_rows_of_several_positions_are_kept_together():
    left, right = pair("node")
    twice = pd.concat([left.scores.frame.assign(position=0), left.scores.frame.assign(position=1)], ignore_index=True)
    doubled = replace(left, scores=replace(left.scores, frame=twice))
    assert doubled.frame.position.tolist() == [0] * len(left)
    union = doubled | right
    counts = Counter(union.scores.frame.site)
    assert {counts[str(one)] for one in left.nodes} == {2}
    assert {counts[str(one)] for one in right.nodes if one not in left.nodes} == {1}


def test_circuits_that_cannot_be_compared_are_refused():
    edges, nodes = edge_circuit(GRAPHS["plain"]), node_circuit("0.1")
    for act in (
        lambda a, b: a | b,
        lambda a, b: a & b,
        lambda a, b: a - b,
        lambda a, b: a ^ b,
        lambda a, b: a <= b,
        lambda a, b: a.same_as(b),
        lambda a, b: a.overlap(b),
        lambda a, b: a.diff(b),
    ):
        with pytest.raises(OptionError, match="edge level beside one at node level"):
            act(edges, nodes)
        with pytest.raises(OptionError, match="n_kv_heads 4 and 2"):
            act(edges, edge_circuit(GRAPHS["grouped"]))
        with pytest.raises(OptionError, match="n_heads 12 and 16"):
            act(nodes, node_circuit("0.1", n_heads=16))
        with pytest.raises(OptionError, match="beside list"):
            act(nodes, ["0.1"])
    other = mk.Circuit(nodes.nodes, replace(nodes.scores, unit="logits"))
    assert (nodes & other).same_as(nodes)
    with pytest.raises(OptionError, match="'logits'"):
        nodes | other
    assert (
        edge_circuit(GRAPHS["ungrouped"]).as_nodes().overlap(edge_circuit(GRAPHS["grouped"]).as_nodes()).draws == 10_000
    )


# -- overlap ----------------------------------------------------------------------------------------------------------


def place(one) -> tuple:
    ends = (one.source, one.target) if isinstance(one, Edge) else (one,)
    return tuple((end.layer, end.kind) for end in ends)


def exact_p(left: mk.Circuit, right: mk.Circuit, everything) -> float:
    """By convolving the hypergeometric distributions of the places."""
    pool, a, b = (Counter(map(place, members)) for members in (everything, left.members, right.members))
    total = np.ones(1)
    for key in pool:
        total = np.convolve(total, hypergeom(pool[key], a[key], b[key]).pmf(np.arange(min(a[key], b[key]) + 1)))
    return float(total[len({*left.members} & {*right.members}) :].sum())


CASES = {
    "nodes": lambda: (*pair("node"), [site(text) for text in node_circuit("").scores.frame.site]),
    **{
        name: lambda graph=graph, seed=seed: (
            edge_circuit(graph, 30, seed),
            edge_circuit(graph, 45, seed + 50),
            graph.edges,
        )
        for seed, (name, graph) in enumerate(GRAPHS.items())
    },
}


@pytest.mark.parametrize("case", CASES)
def test_chance_is_that_of_random_pairs_and_of_the_exact_distribution(case):
    left, right, everything = CASES[case]()
    found = left.overlap(right, draws=40_000)
    drawn = random_pairs(left.members, right.members, everything, place, 2_000)
    assert found.expected == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 2_000**0.5)
    exact = exact_p(left, right, everything)
    assert 0.01 < exact < 0.99  # or nothing would be tested
    assert found.p == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 40_000) ** 0.5 + 1 / 40_000)
    literal = np.mean([shared >= found.shared for shared in drawn])
    assert literal == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 2_000) ** 0.5)


@pytest.mark.parametrize("level", ["node", "edge"])
def test_overlap_counts_what_is_shared(level):
    left, right = pair(level)
    a, b = {*left.members}, {*right.members}
    found = left.overlap(right, draws=500, seed=3)
    assert {*found.both} == a & b
    assert found.shared == len(a & b)
    assert found.jaccard == pytest.approx(len(a & b) / len(a | b))
    assert (found.of_left, found.of_right) == (len(a & b) / len(a), len(a & b) / len(b))
    assert found.frame.equals(left.overlap(right, draws=500, seed=3).frame)
    back = right.overlap(left, draws=500, seed=3)
    assert (back.shared, back.jaccard, back.of_left) == (found.shared, found.jaccard, found.of_right)
    assert found.frame.shared[0] == found.shared
    assert f"{found.shared} {level}s shared" in repr(found)
    assert "<table" in found._repr_html_()


def test_layers_that_are_full_and_mlps_say_nothing():
    full = node_circuit(" ".join(f"2.{head}" for head in range(12)) + " m1 m2")
    found = full.overlap(full, draws=100)
    assert found.p == 1
    assert found.expected == found.shared == 14
    apart = node_circuit("0.1 1.3").overlap(node_circuit("0.2 2.3"), draws=100)
    assert (apart.shared, apart.p) == (0, 1)
    assert apart.expected == pytest.approx(1 / 12)


def test_a_p_value_is_never_nought():
    circuit = node_circuit(" ".join(f"{layer}.{head}" for layer in range(3) for head in (1, 4, 7, 9)))
    assert circuit.overlap(circuit, draws=999).p == 1 / 1000


def test_overlap_of_empty_circuits_has_no_shares():
    empty = node_circuit("")
    found = empty.overlap(node_circuit("0.1"), draws=10)
    assert np.isnan(found.of_left)
    assert (found.of_right, found.jaccard, found.p) == (0, 0, 1)
    assert np.isnan(empty.overlap(empty, draws=10).jaccard)


def test_overlap_names_what_is_amiss():
    circuit = node_circuit("0.1")
    for draws in (0, 2.5, -1):
        with pytest.raises(OptionError, match="draws"):
            overlap(circuit, circuit, draws=draws)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="n_heads"):
        node_circuit("0.1", n_heads=None).overlap(node_circuit("0.2", n_heads=None))
    assert node_circuit("0.1", n_heads=None).overlap(circuit, draws=10).shared == 1  # one of them knows
    outside = mk.Circuit((site("1.12"),), circuit.scores)
    with pytest.raises(SiteError, match=r"1\.12"):
        circuit.overlap(outside)


# -- difference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["node", "edge"])
def test_the_difference_has_every_node_and_edge_once_with_both_scores(level):
    before, after = pair(level)
    found = before.diff(after)
    a, b = {*before.members}, {*after.members}
    assert ({*found.kept}, {*found.emergent}, {*found.lost}) == (a & b, b - a, a - b)
    assert found.frame is (found.edges if level == "edge" else found.nodes)
    assert len(found.edges) == len({*before.edges} | {*after.edges})
    nodes = {*before.nodes} | {*after.nodes}
    assert sorted(found.nodes.node) == sorted(map(str, nodes))
    for column, circuit in (("score_before", before), ("score_after", after)):
        table = circuit.scores.frame
        for row in found.frame.itertuples():
            if level == "edge":
                mask = (table.source == row.source) & (table.target == row.target)
            else:
                mask = table.site == row.node
            assert getattr(row, column) == table.score[mask].item()
    heads = found.heads("emergent")
    assert {*heads} == {one for one in {*after.nodes} - {*before.nodes} if one.is_head}
    assert heads.heads_per_layer == (4 if level == "edge" else 12)
    assert f"{len(a & b)} kept, {len(b - a)} emergent, {len(a - b)} lost" in repr(found)
    assert "<table" in found._repr_html_()
    assert found.meta["before"]["unit"] == "fraction of the gap"
    with pytest.raises(OptionError, match="gained"):
        found.heads("gained")  # type: ignore[arg-type]


def test_what_was_not_scored_has_no_score_in_the_difference():
    before, after = pair("edge")
    found = replace(before, scores=before.scores.only(before.edges)).diff(after)
    assert found.edges.score_before[found.edges.change == "emergent"].isna().all()
    assert found.edges.score_before[found.edges.change != "emergent"].notna().all()
    assert found.edges.score_after.notna().all()


def test_nothing_changed_between_a_circuit_and_itself():
    circuit = edge_circuit(GRAPHS["one group"])
    found = circuit.diff(circuit)
    assert found.kept == circuit.edges
    assert found.emergent == found.lost == ()
    assert found.edges.score_before.equals(found.edges.score_after.rename("score_before"))
