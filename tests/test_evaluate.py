"""Circuits of edges and of MLPs beside random ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from drawn import edge_circuit, node_scores
from families import tiny, tiny_task

import mechkit as mk
from mechkit.circuits.curve import curve
from mechkit.circuits.evaluate import evaluate, random_edges
from mechkit.circuits.keep import EdgeKeeper, Keeper
from mechkit.errors import OptionError, UnsupportedError


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_circuit_of_edges_beside_random_ones(family):
    model, task = tiny(family), tiny_task(n=6)
    circuit = edge_circuit(model)
    found = evaluate(circuit, model, task, ablation="resample", controls=4, areas=True, progress=False)
    keeper = EdgeKeeper(model, task, "resample")
    empty, own = keeper.metric([[], circuit.edges]).mean(1)
    assert found.faithfulness == pytest.approx((own - empty) / (keeper.model_metric.mean() - empty), abs=1e-4)
    assert found.interval[0] <= found.faithfulness <= found.interval[1]
    sizes = found.curve["size"]
    assert sizes.is_monotonic_increasing
    assert sizes.iloc[-1] == len(circuit)
    assert found.curve["edge"].iloc[0] == str(circuit.edges[0])
    assert found.curve.faithfulness.iloc[-1] == pytest.approx(found.faithfulness)
    assert len(found.control) == 4
    whole = curve(circuit.scores, model, task, progress=False)
    assert (found.cpr, found.cmd) == pytest.approx((whole.cpr, whole.cmd))
    assert found.frame.cmd[0] == pytest.approx(whole.cmd)
    assert len(found.plot().axes) == 1
    again = evaluate(circuit, model, task, ablation="resample", controls=4, progress=False)
    assert again.control.equals(found.control)
    with pytest.raises(OptionError, match="areas=True"):
        _ = again.cpr


def test_every_edge_is_the_model_and_so_is_its_control():
    model, task = tiny("gemma2"), tiny_task()
    circuit = edge_circuit(model, size=10_000)
    found = evaluate(circuit, model, task, controls=2, curve=False, progress=False)
    assert found.faithfulness == pytest.approx(1, abs=1e-5)
    assert found.control.faithfulness.tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_random_edges_match_the_targets_of_each_layer(family):
    model = tiny(family)
    circuit = edge_circuit(model)
    graph = model.graph()
    mask = np.zeros(graph.exists.shape, bool)
    for one in circuit.edges:
        mask[graph.source_index[one.source], graph.target_index[one.target]] = True

    def by_target(of: np.ndarray) -> Counter:
        return Counter((graph.targets[j].layer, graph.targets[j].kind) for j in np.nonzero(of)[1])

    drawn = [random_edges(mask, graph, seed) for seed in range(300)]
    for one in drawn:
        assert not (one & ~graph.exists).any()
        assert by_target(one) == by_target(mask)
    # Within a layer and kind, every edge there is comes about as often as any other.
    logits = np.mean([one[:, -1] for one in drawn], 0)
    assert logits == pytest.approx(mask[:, -1].mean(), abs=0.15)
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_circuit_of_heads_and_mlps():
    model, task = tiny("llama"), tiny_task(n=6)
    scores = node_scores(model, task)
    nodes = [mk.site(text) for text in ("m1", "0.1", "2.3", "m2")]
    found = evaluate(mk.Circuit(tuple(nodes), scores), model, task, controls=5, progress=False)
    keeper = Keeper(model, task, "mean", kinds=("z", "mlp"))
    empty, own = keeper.metric([[], nodes]).mean(1)
    assert found.faithfulness == pytest.approx((own - empty) / (keeper.model_metric.mean() - empty), abs=1e-5)
    assert found.curve["node"].tolist() == ["m1", "0.1", "2.3", "m2"]
    for text in found.control["nodes"]:
        drawn = mk.sites.sites(text)
        assert sorted(one.layer for one in drawn if one.is_head) == [0, 2]
        assert len({one for one in drawn if one.kind == "mlp"}) == 2
    everything = mk.Circuit(keeper.parts, scores)
    assert evaluate(everything, model, task, controls=0, curve=False, progress=False).faithfulness == pytest.approx(1)


def test_heads_are_left_in_where_only_mlps_were_candidates():
    model, task = tiny("gpt2"), tiny_task()
    scores = node_scores(model, task, "mlps")
    found = evaluate(mk.Circuit((mk.site("m0"),), scores), model, task, controls=3, progress=False)
    own = Keeper(model, task, "mean", kinds=("mlp",)).metric([[mk.site("m0")]])[0]
    assert found.circuit_metric == pytest.approx(own.mean(), abs=1e-5)
    with pytest.raises(UnsupportedError, match=r"0\.1"):
        evaluate(mk.Circuit((mk.site("0.1"),), scores), model, task, progress=False)
