"""Components of heads taken out, scaled and set: in the weights as while the model runs, and beside chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, tiny, tiny_task
from reference import weights as dense
from torch.testing import assert_close

import mechkit as mk
from mechkit.errors import EditError, MetricError, OptionError, PromptError, SiteError
from mechkit.weights.channels import _random
from mechkit.weights.head_weights import HeadWeights
from mechkit.weights.rotation import rotations

TOKENS = tiny_task().clean
HEAD_NORM = {"qwen3", "gemma3"}  # of each query by itself
every_family = pytest.mark.parametrize("family", FAMILIES)
each_matrix = pytest.mark.parametrize("matrix", ["ov", "qk"])


def of_head(model: mk.Model, head: str, matrix: str) -> torch.Tensor:
    """The dense matrix as the weights of the model now are."""
    weights, one = HeadWeights.of(model), mk.site(head)
    at = (one.layer, one.head)
    return dense.ov(weights, at) if matrix == "ov" else dense.qk(weights, at, rotations(model, [0]))


def assert_same_logits(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(logits, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=0)


@every_family
@each_matrix
def test_what_is_left_of_the_matrix_is_all_but_the_components(family, matrix):
    model = tiny(family)
    one, before = mk.svd(model, "1.2", matrix), of_head(model, "1.2", matrix)
    size = float(before.norm())
    for edit, left in (
        (one.remove(1), before - one.reconstructed([1])),
        (one.remove([0, 3]), before - one.reconstructed([0, 3])),
        (one.scale([2, 4], -0.5), before - 1.5 * one.reconstructed([2, 4])),
        (one.scale(1, 1.0), before),
        (one.remove(range(model.d_head)), torch.zeros_like(before)),
    ):
        with mk.edit_weights(model, edit):
            assert float((of_head(model, "1.2", matrix) - left).norm()) < 1e-5 * size
    assert float((of_head(model, "1.2", matrix) - before).norm()) == 0


@every_family
@each_matrix
def test_edits_of_components_are_the_same_in_the_weights_and_while_it_runs(family, matrix):
    model = tiny(family)
    one, plainly = mk.svd(model, "1.2", matrix), model.run(TOKENS).logits
    other = mk.svd(model, "1.1", matrix)
    assert_same_logits(model.run(TOKENS, edits=[one.scale([0, 5], 1.0)]).logits, plainly)
    for edits in ([one.remove([0, 2])], [one.scale(1, -2.0)], [one.remove(0), other.remove(3), one.scale(4, 3.0)]):
        expected = model.run(TOKENS, edits=edits).logits
        with mk.edit_weights(model, edits):
            assert_same_logits(model.run(TOKENS).logits, expected)
        assert (expected - plainly).abs().max() > 1e-4
    setting = one.set({0: 2.0, 3: -1.0})
    expected = model.run(TOKENS, edits=[setting]).logits
    assert (expected - plainly).abs().max() > 1e-4
    if model.backend.branches.bias("o" if matrix == "ov" else "q", 1) is None:
        with pytest.raises(EditError, match="has no b_"):
            mk.edit_weights(model, setting)
    else:
        with mk.edit_weights(model, setting):
            assert_same_logits(model.run(TOKENS).logits, expected)
    assert torch.equal(model.run(TOKENS).logits, plainly)


@every_family
def test_taking_all_components_out_is_zero_ablation(family):
    model = tiny(family)
    for matrix, site in (("ov", "1.2"), ("qk", "1.2.q")):
        edit = mk.svd(model, "1.2", matrix).remove(range(model.d_head))
        expected = model.run(TOKENS, edits=[mk.ablate(site)]).logits
        run = model.run(TOKENS, site, [edit])
        assert run[site].abs().max() < 1e-5
        if matrix == "ov" or family not in HEAD_NORM:  # which makes much of what rounding leaves of a query
            assert_same_logits(run.logits, expected)


@every_family
def test_what_is_written_and_read_along_components_is_as_given(family):
    """Every other coordinate of what the head writes, or its query reads, stays as it was."""
    model = tiny(family)
    weights, given = HeadWeights.of(model), {1: 0.5, 4: -2.0}
    ov, qk = mk.svd(model, "1.2"), mk.svd(model, "1.2", "qk")
    onto = torch.linalg.pinv(weights.W_Q[1, 2].double()) @ qk.U.double()
    for one, site, along in ((ov, "1.2", weights.W_O[1, 2].double() @ ov.Vh.T.double()), (qk, "1.2.q", onto)):
        before = model.run(TOKENS, record=site)[site].double() @ along
        for edit, expected in (
            (one.set(given), {i: torch.full_like(before[..., 0], value) for i, value in given.items()}),
            (one.remove([0, 2]), {i: torch.zeros_like(before[..., 0]) for i in (0, 2)}),
            (one.scale(3, 2.5), {3: 2.5 * before[..., 3]}),
        ):
            after = model.run(TOKENS, record=site, edits=[edit])[site].double() @ along
            wanted = before.clone()
            for i, values in expected.items():
                wanted[..., i] = values
            assert_close(after, wanted, atol=1e-4 * max(1.0, float(before.abs().max())), rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "olmo2", "phi3"])
@pytest.mark.parametrize("components", [[0], [3], [0, 2, 5]])
@pytest.mark.parametrize("offset", [0, 2])
def test_random_changes_are_of_the_same_rank_and_sizes(family, components, offset):
    model = tiny(family)
    for matrix in ("ov", "qk"):
        one = mk.svd(model, "1.2", matrix, offset=offset) if matrix == "qk" else mk.svd(model, "1.2")
        turns = rotations(model, [offset])

        def dense_matrix(matrix=matrix, turns=turns):
            weights = HeadWeights.of(model)
            return dense.ov(weights, (1, 2)) if matrix == "ov" else dense.qk(weights, (1, 2), turns)

        draw, before, changes = torch.Generator().manual_seed(1), dense_matrix(), []
        site = "1.2" if matrix == "ov" else "1.2.q"
        for _ in range(2):
            with mk.edit_weights(model, mk.transform(site, _random(one, components, draw))):
                changes.append(dense_matrix() - before)
        for change in changes:
            sizes = torch.linalg.svdvals(change)
            assert_close(sizes[: len(components)].float(), one.S[components], atol=1e-4, rtol=1e-4)
            assert sizes[len(components)] < 1e-3 * sizes[0]
            # Within what the head reads and what it writes.
            outside = change - one.U.double() @ (one.U.T.double() @ change @ one.Vh.T.double()) @ one.Vh.double()
            assert outside.norm() < 1e-3 * change.norm()
        assert (changes[0] - changes[1]).norm() > 0.1 * changes[0].norm()


@pytest.fixture(scope="module")
def effects() -> mk.ChannelEffects:
    one = mk.svd(tiny("llama"), "1.2 2.0")
    some = {"1.2": [0, 2], "2.0": [1]}
    return mk.channel_effects(tiny("llama"), tiny_task(n=5), one, some, n_random=6, progress=False)


def test_the_table_has_the_channel_first_and_then_chance(effects):
    frame, model, task = effects.frame, tiny("llama"), tiny_task(n=5)
    assert list(frame.columns) == ["change", "site", "component", "score", "metric", "se", "n"]
    assert frame["change"].tolist() == ["channel"] + ["random"] * 6
    assert set(frame["site"]) == {"1.2 2.0"}
    assert frame["component"].tolist() == ["0+2 1"] + [""] * 6
    assert (frame["n"] == 5).all()
    edits = [mk.svd(model, "1.2").remove([0, 2]), mk.svd(model, "2.0").remove(1)]
    values = [mk.metrics.logit_diff(model.run(ids).logits, task) for ids in (task.clean, task.corrupt)]
    removed = mk.metrics.logit_diff(model.run(task.clean, edits=edits).logits, task)
    each = (removed - values[0]) / (values[1] - values[0]).mean()
    assert effects.channel == frame["score"][0] == pytest.approx(float(each.mean()), abs=1e-4)
    assert frame["metric"][0] == pytest.approx(float(removed.mean()), abs=1e-4)
    assert frame["se"][0] == pytest.approx(float(each.std()) / 5**0.5, abs=1e-4)
    assert frame["score"].nunique() == 7
    sizes = frame["score"].abs()
    assert effects.share_of_random == (sizes >= sizes[0]).sum() / 7 >= 1 / 7
    assert {"model", "weights", "task", "method", "options", "versions", "seconds"} <= set(effects.meta)
    assert effects.meta["options"] == {"matrix": "ov", "n_random": 6, "seed": 0}


def test_saved_and_loaded_is_the_same(effects, tmp_path):
    again = mk.ChannelEffects.load(effects.save(tmp_path / "effects.parquet"))
    pd.testing.assert_frame_equal(again.frame, effects.frame)
    assert (again.channel, again.share_of_random) == (effects.channel, effects.share_of_random)


@each_matrix
def test_the_same_seed_draws_the_same(matrix):
    model, task = tiny("qwen2"), tiny_task()
    one = mk.svd(model, "1.2", matrix)
    first, same, other = (
        mk.channel_effects(model, task, one, n_random=3, seed=seed, progress=False).frame["score"] for seed in (0, 0, 1)
    )
    assert first.tolist() == same.tolist()
    assert first[0] == other[0]
    assert not np.isclose(first[1:], other[1:], atol=1e-6).any()


def test_random_changes_do_what_random_maps_of_the_head_do():
    model, task, one = tiny("llama"), tiny_task(n=6), mk.svd(tiny("llama"), "2.1")
    frame = mk.channel_effects(model, task, one, 1, n_random=3, seed=4, progress=False).frame
    draw = torch.Generator().manual_seed(4)
    for metric in frame["metric"][1:]:
        edit = mk.transform("2.1", _random(one, [1], draw))
        logits = model.run(task.clean, edits=[edit]).logits
        assert metric == pytest.approx(float(mk.metrics.logit_diff(logits, task).mean()), abs=1e-4)


def test_metrics_that_read_everything_and_the_clean_run():
    model, one = tiny("llama"), mk.svd(tiny("llama"), "1.2")
    for metric in ("prob", "kl"):
        task = tiny_task().with_metric(metric)
        frame = mk.channel_effects(model, task, one, n_random=1, progress=False).frame
        logits, clean = model.run(task.clean, edits=[one.remove(0)]).logits, model.run(task.clean).logits
        values = mk.metrics.kl(logits, task, clean) if metric == "kl" else mk.metrics.prob(logits, task)
        assert frame["metric"][0] == pytest.approx(float(values.mean()), abs=1e-5)


OUTSIDE = mk.Task.from_tokens(*(torch.full((2, 4), i) for i in (99, 5)), *torch.eye(2).long())


@pytest.mark.parametrize(
    ("options", "kind", "names"),
    [
        ({"components": 8}, OptionError, "Components 8"),
        ({"components": [0, 0]}, OptionError, "different numbers"),
        ({"components": {"0.0": [0]}}, SiteError, "not among the heads"),
        ({"components": {}}, OptionError, "no head"),
        ({"n_random": 0}, OptionError, "n_random = 0"),
        ({"n_random": 1.5}, OptionError, "n_random = 1.5"),
        ({"task": tiny_task().with_metric(lambda logits, task: torch.zeros(len(task)))}, MetricError, "alike"),
        ({"task": OUTSIDE}, PromptError, "99"),
    ],
)
def test_bad_input_is_named(options, kind, names):
    model = tiny("llama")
    given = {"task": tiny_task(), "svd": mk.svd(model, "1.2"), "progress": False, **options}
    with pytest.raises(kind, match=names):
        mk.channel_effects(model, **given)


def test_weights_from_a_file_have_no_model_to_run():
    one = mk.svd(replace(HeadWeights.of(tiny("gpt2")), model=None), "1.2")
    with pytest.raises(OptionError, match="weights from a file"):
        mk.channel_effects(tiny("gpt2"), tiny_task(), one, progress=False)
    assert one.remove(0).matrix.shape == (8, 8)  # the edit itself needs none
