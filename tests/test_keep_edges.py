"""Circuits of edges, and of heads and MLPs: the engine against one run a slot of the Hub's model; what must hold."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny, tiny_task, untouched
from reference import keep as literal

import mechkit as mk
from mechkit.backends.edge_masks import Stages
from mechkit.circuits.keep import EdgeKeeper, Keeper
from mechkit.errors import OptionError, SiteError, UnsupportedError
from mechkit.graph import Graph
from mechkit.sites import Site

TOLERANCE = 1e-4
ABLATIONS = ["resample", "mean", "zero"]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_ablation = pytest.mark.parametrize("ablation", ABLATIONS)


def masks_of(keeper: EdgeKeeper, shares: tuple[float, ...], seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.stack([(draw.random(keeper.graph.exists.shape) < share) & keeper.graph.exists for share in shares])


def as_text(mask: np.ndarray, graph: Graph) -> set[tuple[str, str]]:
    return {(str(graph.sources[i]), str(graph.targets[j])) for i, j in np.argwhere(mask)}


@functools.cache
def ablated(family: str, ablation: str, seed: int = 0) -> literal.Values:
    values = literal.written_values(untouched(family), tiny_task(n=3, seed=seed).corrupt)
    if ablation == "mean":
        return {key: value.mean(0, keepdim=True) for key, value in values.items()}
    return {key: torch.zeros(()) for key in values} if ablation == "zero" else values


def metric_of(logits: torch.Tensor, task: mk.Task) -> np.ndarray:
    return mk.metrics.logit_diff(logits, task).numpy()


@every_family
@every_ablation
def test_some_edges_equal_one_run_for_every_slot(family, ablation):
    model, task = tiny(family), tiny_task(n=3)
    keeper = EdgeKeeper(model, task, ablation)
    masks = masks_of(keeper, (0.3, 0.9))
    for mask, row in zip(masks, keeper.metric(masks), strict=True):
        kept = as_text(mask, keeper.graph)
        values = ablated(family, ablation)
        logits = literal.keep_edges(untouched(family), task.clean, kept, values, model.backend.parallel)
        np.testing.assert_allclose(row, metric_of(logits, task), atol=TOLERANCE)
        assert np.abs(row - keeper.model_metric).max() > 1e-3


@pytest.mark.parametrize("family", [family for family in FAMILIES if tiny(family).info.grouped and family != "olmo2"])
def test_keys_and_values_of_each_query_head_by_themselves(family):
    model, task = tiny(family), tiny_task(n=3)
    keeper = EdgeKeeper(model, task, "resample", ungrouped=True)
    for mask, row in zip(masks := masks_of(keeper, (0.4, 0.8)), keeper.metric(masks), strict=True):
        kept = as_text(mask, keeper.graph)
        values = ablated(family, "resample")
        logits = literal.keep_edges(untouched(family), task.clean, kept, values, model.backend.parallel)
        np.testing.assert_allclose(row, metric_of(logits, task), atol=TOLERANCE)


def test_ungrouped_edges_of_keys_that_are_normed_together_are_refused():
    with pytest.raises(UnsupportedError, match="norms the keys"):
        EdgeKeeper(tiny("olmo2"), tiny_task(), ungrouped=True)


@every_family
@every_ablation
def test_every_edge_is_the_model_and_none_is_the_other_run(family, ablation):
    model, task = tiny(family), tiny_task()
    keeper = EdgeKeeper(model, task, ablation)
    every = keeper.graph.exists
    whole, none = keeper.metric(np.stack([every, np.zeros_like(every)]))
    np.testing.assert_allclose(whole, keeper.model_metric, atol=1e-5)
    assert np.abs(none - whole).max() > 1e-2
    if ablation == "resample":
        corrupt = metric_of(untouched(family)(task.corrupt, use_cache=False).logits.detach(), task)
        np.testing.assert_allclose(none, corrupt, atol=TOLERANCE)


@every_family
@every_ablation
def test_every_edge_of_some_nodes_is_the_ablation_of_the_others(family, ablation):
    model, task = tiny(family), tiny_task()
    keeper, nodes = EdgeKeeper(model, task, ablation), Keeper(model, task, ablation, kinds=("z", "mlp"))
    sets = [nodes.parts[::2], nodes.parts[1::3], nodes.parts[:1], ()]
    masks = np.zeros((len(sets), *keeper.graph.exists.shape), bool)
    for mask, kept in zip(masks, sets, strict=True):
        mask[[0, *(keeper.graph.source_index[one] for one in kept)]] = True
    np.testing.assert_allclose(keeper.metric(masks & keeper.graph.exists), nodes.metric(sets), atol=TOLERANCE)


@every_family
@pytest.mark.parametrize("kinds", [("z", "mlp"), ("mlp",)])
def test_keeping_some_heads_and_mlps_equals_one_hooked_forward_a_set(family, kinds):
    model, task = tiny(family), tiny_task(n=3)
    for ablation in ABLATIONS:
        keeper = Keeper(model, task, ablation, kinds=kinds)
        values = {key: value for key, value in ablated(family, ablation).items() if key[0] in kinds}
        sets = [(), keeper.parts[1::2], keeper.parts[-2:]]
        for kept, row in zip(sets, keeper.metric(sets), strict=True):
            logits = literal.keep_nodes(untouched(family), task.clean, {str(one) for one in kept}, values)
            np.testing.assert_allclose(row, metric_of(logits, task), atol=TOLERANCE)
            alone = keeper.metric([kept])[0]  # begins as late as it can
            np.testing.assert_allclose(alone, metric_of(logits, task), atol=TOLERANCE)


def graphs() -> list[Graph]:
    sizes = [{}, {"parallel": True}, {"n_kv_heads": 2}, {"n_kv_heads": 2, "ungrouped": True}]
    return [Graph(**{"n_layers": 3, "n_heads": 4, "n_kv_heads": 4, **some}) for some in sizes]


@pytest.mark.parametrize("graph", graphs(), ids=str)
def test_what_is_alive_is_what_the_graph_says(graph):
    draw = np.random.default_rng(0)
    masks = np.stack([(draw.random(graph.exists.shape) < share) & graph.exists for share in (0.05, 0.1, 0.2, 0.5, 1)])
    alive = Stages(graph).alive(torch.from_numpy(masks)).numpy()
    for mask, found in zip(masks, alive, strict=True):
        edges = [edge for edge in graph.edges if mask[graph.source_index[edge.source], graph.target_index[edge.target]]]
        expected = {(str(one.source), str(one.target)) for one in graph.alive(edges)}
        assert as_text(found, graph) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-j"])
def test_dead_ends_change_nothing_where_values_are_those_of_one_run(family):
    model, task = tiny(family), tiny_task()
    keeper = EdgeKeeper(model, task, "resample")
    masks = masks_of(keeper, (0.1, 0.2, 0.3))
    alive = Stages(keeper.graph).alive(torch.from_numpy(masks)).numpy()
    assert (alive.sum((1, 2)) < masks.sum((1, 2))).all()
    np.testing.assert_allclose(keeper.metric(alive), keeper.metric(masks), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2"])
def test_sets_that_begin_late_equal_each_set_by_itself(family):
    model, task = tiny(family), tiny_task()
    keeper = EdgeKeeper(model, task, "resample")
    every, graph = keeper.graph.exists, keeper.graph
    masks = np.repeat(every[None], 12, 0)
    for number, (i, j) in enumerate(np.argwhere(every)[:: len(graph) // 12][:12]):
        masks[number, i, j] = False  # ACDC's sets: everything but one edge
    together = keeper.metric(masks)
    apart = np.concatenate([keeper.metric(one[None]) for one in masks])
    np.testing.assert_allclose(together, apart, atol=1e-5)
    for mask, row in list(zip(masks, together, strict=True))[::4]:
        logits = literal.keep_edges(
            untouched(family),
            task.clean,
            as_text(mask, graph),
            literal.written_values(untouched(family), task.corrupt),
            model.backend.parallel,
        )
        np.testing.assert_allclose(row, metric_of(logits, task), atol=TOLERANCE)


@every_ablation
def test_prompts_of_different_lengths_and_first_differences(ablation):
    model = tiny("llama")
    parts = [
        tiny_task(n=2, length=9, first=1, seed=1),
        tiny_task(n=3, length=7, first=6, seed=2),
        tiny_task(n=2, length=9, first=7, seed=3),
    ]
    task = mk.Task.join(parts)
    keeper = EdgeKeeper(model, task, ablation)
    masks = masks_of(keeper, (0.3, 0.8))
    apart = [EdgeKeeper(model, part, ablation).metric(masks) for part in parts]
    np.testing.assert_allclose(keeper.metric(masks), np.concatenate(apart, 1), atol=1e-5)
    nodes = Keeper(model, task, ablation, kinds=("z", "mlp"))
    sets = [nodes.parts[::2], nodes.parts[-3:]]
    apart = [Keeper(model, part, ablation, kinds=("z", "mlp")).metric(sets) for part in parts]
    np.testing.assert_allclose(nodes.metric(sets), np.concatenate(apart, 1), atol=1e-5)


def test_more_prompts_than_fit_at_once_give_the_same(monkeypatch):
    model, task = tiny("gemma2"), tiny_task(n=5)
    masks = masks_of(EdgeKeeper(model, task), (0.3, 0.8, 0.5))
    expected = EdgeKeeper(model, task).metric(masks)
    monkeypatch.setattr("mechkit.backends.keep_edges.rows_at_once", lambda *_: 2)
    np.testing.assert_allclose(EdgeKeeper(model, task).metric(masks), expected, atol=1e-5)
    monkeypatch.setattr(type(model.backend), "base_tokens", lambda _: 20)
    np.testing.assert_allclose(EdgeKeeper(model, task).metric(masks), expected, atol=1e-5)


@pytest.mark.parametrize("metric", ["prob", "kl"])
def test_metrics_of_the_whole_vocabulary(metric):
    model, task = tiny("llama"), tiny_task(n=3).with_metric(metric)
    keeper = EdgeKeeper(model, task, "resample")
    mask = masks_of(keeper, (0.6,))
    hf = untouched("llama")
    values = literal.written_values(hf, task.corrupt)
    logits = literal.keep_edges(hf, task.clean, as_text(mask[0], keeper.graph), values, False)[:, -1]
    clean = hf(task.clean, use_cache=False).logits[:, -1].detach()
    np.testing.assert_allclose(keeper.metric(mask)[0], task.metric(logits, task, clean).numpy(), atol=TOLERANCE)


def test_a_reference_gives_the_values():
    model, task, other = tiny("gpt2"), tiny_task(n=3), tiny_task(n=3, seed=7)
    keeper = EdgeKeeper(model, task, "resample", other)
    mask = masks_of(keeper, (0.7,))
    hf = untouched("gpt2")
    values = literal.written_values(hf, other.corrupt)
    logits = literal.keep_edges(hf, task.clean, as_text(mask[0], keeper.graph), values, False)
    np.testing.assert_allclose(keeper.metric(mask)[0], metric_of(logits, task), atol=TOLERANCE)


def test_edges_are_sets_or_masks():
    keeper = EdgeKeeper(tiny("llama"), tiny_task())
    sets = [["embed->0.1.q", "0.1->m1", "m1->logits"], ["embed->1.3.k"]]
    np.testing.assert_array_equal(keeper.metric(sets), keeper.metric(keeper.masks(sets)))
    assert as_text(keeper.masks(sets)[1], keeper.graph) == {("embed", "1.kv1.k")}
    assert len(keeper.parts) == len(keeper.graph)


def test_what_cannot_be_kept_is_named():
    model, task = tiny("llama"), tiny_task()
    keeper = EdgeKeeper(model, task)
    with pytest.raises(OptionError, match="Masks of shape"):
        keeper.metric(np.ones((2, 3, 4), bool))
    with pytest.raises(OptionError, match="float"):
        keeper.metric(keeper.graph.exists[None].astype(np.float32))
    with pytest.raises(SiteError, match="no edge"):
        keeper.metric([["2.0->0.1.q"]])
    with pytest.raises(OptionError, match="shuffle"):
        EdgeKeeper(model, task, "shuffle")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="Resampling"):
        EdgeKeeper(model, task, "resample", tiny_task(n=2))
    with pytest.raises(UnsupportedError, match="kinds q"):
        Keeper(model, task, "mean", kinds=("q",))
    with pytest.raises(UnsupportedError, match="m1"):
        Keeper(model, task, "mean").metric([[Site(1, None, "mlp")]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_float32_metric_roughly(dtype):
    from families import plain

    model, task = mk.load((plain("gemma2", dtype=dtype), None), device="cpu"), tiny_task()
    masks = masks_of(EdgeKeeper(tiny("gemma2"), task), (0.3, 0.8))
    whole = EdgeKeeper(tiny("gemma2"), task).metric(masks)
    assert np.abs(EdgeKeeper(model, task).metric(masks) - whole).max() < 0.15 * max(1.0, np.abs(whole).max())
