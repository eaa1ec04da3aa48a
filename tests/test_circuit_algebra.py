"""Set algebra of circuits, and the difference of two: against plain sets."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
from made_circuits import GRAPHS, edge_circuit, node_circuit, pair

import mechkit as mk
from mechkit.errors import OptionError

# -- set algebra ------------------------------------------------------------------------------------------------------


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


# -- difference -------------------------------------------------------------------------------------------------------


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
