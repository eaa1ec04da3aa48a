"""What two circuits share, against plain sets, literal draws and exact probabilities."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from made_circuits import GRAPHS, edge_circuit, node_circuit, pair
from reference.overlap import random_pairs
from scipy.stats import hypergeom

import mechkit as mk
from mechkit.circuits.compare import overlap
from mechkit.errors import OptionError, SiteError
from mechkit.graph import Edge
from mechkit.sites import site


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
