"""Completeness and minimality, against sets measured one by one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from drawn import edge_circuit, node_scores
from families import tiny, tiny_task

import mechkit as mk
from mechkit.circuits.criteria import completeness, minimality
from mechkit.circuits.keep import EdgeKeeper, Keeper
from mechkit.errors import OptionError


def _sizes_of(table: pd.DataFrame) -> list[int]:
    return table["removed"].str.split().map(len).tolist()


@pytest.mark.parametrize("level", ["node", "edge"])
def test_completeness_is_the_distance_of_circuit_and_model_without_the_same(level):
    model, task = tiny("llama"), tiny_task()
    if level == "node":
        circuit = mk.Circuit(tuple(model.heads("0.1 1.2 2.0 2.3")), node_scores(model, task, "heads"))
        keeper = Keeper(model, task, "mean")
    else:
        circuit = edge_circuit(model, size=12)
        keeper = EdgeKeeper(model, task, "mean")
    table = completeness(circuit, model, task, random=3, steps=3, candidates=4, progress=False)
    frame = table.frame
    assert frame.how.tolist() == ["none"] + ["random"] * 3 + ["greedy"] * 3
    assert frame["size"].tolist() == _sizes_of(frame)
    assert frame["size"].tolist()[-3:] == [1, 2, 3]
    gap = abs(keeper.model_metric.mean() - keeper.metric([[]])[0].mean())
    for row in frame.itertuples():
        taken = set(row.removed.split())
        of_circuit, of_model = (
            keeper.metric([[one for one in parts if str(one) not in taken]])[0].mean()
            for parts in (circuit.members, keeper.parts)
        )
        assert (row.circuit, row.model) == pytest.approx((of_circuit, of_model), abs=1e-5)
        assert row.score == pytest.approx(abs(of_circuit - of_model) / gap, abs=1e-4)


def test_nothing_is_missing_from_the_whole_model():
    model, task = tiny("gpt2"), tiny_task()
    everything = mk.Circuit(tuple(model.heads()), node_scores(model, task, "heads"))
    table = completeness(everything, model, task, random=3, steps=2, candidates=3, progress=False)
    np.testing.assert_allclose(table.frame.score, 0, atol=1e-5)


def test_a_greedy_step_takes_the_worst_of_its_candidates():
    model, task = tiny("gpt2"), tiny_task()
    circuit = mk.Circuit(tuple(model.heads("0.1 1.2 2.0")), node_scores(model, task, "heads"))
    table = completeness(circuit, model, task, random=0, steps=1, candidates=3, progress=False)
    keeper = Keeper(model, task, "mean")
    worst = 0.0
    for node in circuit.nodes:
        sets = [[one for one in parts if one != node] for parts in (circuit.nodes, keeper.parts)]
        worst = max(worst, abs(float(np.subtract(*keeper.metric(sets).mean(1)))))
    gap = abs(keeper.model_metric.mean() - keeper.metric([[]])[0].mean())
    assert table.frame.score.iloc[-1] == pytest.approx(worst / gap, abs=1e-5)


@pytest.mark.parametrize("level", ["node", "edge"])
def test_minimality_is_the_largest_change_that_a_member_makes(level):
    model, task = tiny("llama"), tiny_task()
    if level == "node":
        circuit = mk.Circuit(tuple(model.heads("0.1 1.2 2.0 2.3")), node_scores(model, task, "heads"))
        keeper = Keeper(model, task, "mean")
    else:
        circuit = edge_circuit(model, size=12)
        keeper = EdgeKeeper(model, task, "mean")
    frame = minimality(circuit, model, task, sets=3, progress=False).frame
    gap = abs(keeper.model_metric.mean() - keeper.metric([[]])[0].mean())
    assert frame.member.tolist() == [str(one) for one in circuit.members]
    for row in frame.itertuples():
        for taken, size in (({*row.removed.split()}, row.score), (set(), abs(row.alone))):
            assert row.member not in taken
            rest = [one for one in circuit.members if str(one) not in taken]
            without = [one for one in rest if str(one) != row.member]
            change = np.subtract(*keeper.metric([rest, without]).mean(1)) / gap
            assert size == pytest.approx(abs(float(change)), abs=1e-4)
        assert row.score >= abs(row.alone) - 1e-6


@pytest.mark.parametrize("options", [{"random": -1}, {"greedy": 1.5}, {"steps": 0}, {"candidates": 0}])
def test_completeness_names_the_bad_option(options):
    model, task = tiny("gpt2"), tiny_task()
    with pytest.raises(OptionError, match=next(iter(options))):
        completeness(edge_circuit(model, 5), model, task, progress=False, **options)
