"""Activation patching: metrics, lengths, refusals. That it equals the literal form: test_conformance.py."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from families import FAMILIES, plain, tiny, tiny_task
from reference import patching as literal

import mechkit as mk
from mechkit.backends import memory
from mechkit.errors import MetricError, OptionError, SiteError, TaskError, UnsupportedError
from mechkit.patching import groups
from mechkit.patching.cells import Cell, covered

TOLERANCE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_moves_before_the_first_difference(family):
    model, task = tiny(family), tiny_task(first=4)
    frame = mk.patch(model, task, "heads", positions="each", progress=False).frame
    assert (frame[frame.position < 4].score == 0).all()
    assert (frame[frame.position >= 4].score != 0).any()


def test_prompts_of_different_lengths_are_the_same_together_and_apart():
    model = tiny("llama")
    long, short = tiny_task(n=3, length=9, seed=3), tiny_task(n=3, length=7, seed=4, first=2)
    pad = lambda ids: torch.nn.functional.pad(ids, (0, 2))  # noqa: E731
    both = mk.Task.from_tokens(
        torch.cat([long.clean, pad(short.clean)]),
        torch.cat([long.corrupt, pad(short.corrupt)]),
        torch.cat([long.correct, short.correct]),
        torch.cat([long.wrong, short.wrong]),
        lengths=torch.tensor([9] * 3 + [7] * 3),
    )
    together = mk.patch(model, both, progress=False).frame.metric
    apart = sum(mk.patch(model, task, progress=False).frame.metric for task in (long, short)) / 2
    torch.testing.assert_close(torch.tensor(together), torch.tensor(apart), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("metric", ["prob", "loss", "kl", lambda logits, task: logits[:, 5] * 2.0])
@torch.no_grad()
def test_metrics_that_need_the_whole_row(metric):
    model, hf = tiny("llama"), plain("llama")
    task = tiny_task().with_metric(metric)
    frame = mk.patch(model, task, "1.2", progress=False).frame
    logits = literal.patch_cell(hf, task.corrupt, task.clean, "z", 1, 2)[:, -1]
    clean = hf(task.clean, use_cache=False).logits[:, -1]
    expected = {
        "prob": lambda: logits.softmax(-1)[torch.arange(4), task.correct],
        "loss": lambda: torch.nn.functional.cross_entropy(logits, task.correct, reduction="none"),
        "kl": lambda: torch.nn.functional.kl_div(
            logits.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1),
    }.get(metric if isinstance(metric, str) else "", lambda: logits[:, 5] * 2.0)()
    assert frame.metric[0] == pytest.approx(float(expected.mean()), abs=TOLERANCE)


def test_small_batches_give_the_same_table(monkeypatch):
    model, task = tiny("gpt2"), tiny_task()
    whole = mk.patch(model, task, progress=False).frame
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", 20)
    pd.testing.assert_frame_equal(whole, mk.patch(model, task, progress=False).frame, atol=1e-5)


def test_the_models_own_hooks_are_off_again_afterwards():
    model, task = tiny("llama"), tiny_task()
    before = model.run(task.clean).logits
    mk.patch(model, task, progress=False)
    assert torch.equal(before, model.run(task.clean).logits)
    assert not any(point.has_hooks() for point in model.bridge.hook_dict.values())


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"sites": "9.0"}, SiteError, "3 layers"),
        ({"sites": "0.9"}, SiteError, "4 heads"),
        ({"sites": "nonsense"}, SiteError, "nonsense"),
        ({"sites": []}, SiteError, "No sites"),
        ({"sites": "logits"}, UnsupportedError, "logits"),
        ({"sites": "resid.4"}, SiteError, "resid.4"),
        ({"positions": "S2"}, TaskError, "S2"),
        ({"positions": 9}, OptionError, "9"),
        ({"positions": [-1]}, OptionError, "-1"),
        ({"positions": []}, OptionError, "[]"),
        ({"direction": "sideways"}, OptionError, "sideways"),
    ],
)
def test_bad_input_names_what_was_given(options, error, names):
    with pytest.raises(error, match=names.replace("[", r"\[").replace("]", r"\]")):
        mk.patch(tiny("gpt2"), tiny_task(), progress=False, **options)


def test_a_metric_that_sees_no_difference_is_refused():
    task = tiny_task().with_metric(lambda logits, task: torch.ones(len(task)))
    with pytest.raises(MetricError, match="alike"):
        mk.patch(tiny("gpt2"), task, progress=False)


@pytest.mark.parametrize(
    ("metric", "names"),
    [(lambda logits, task: logits.mean(), "prompts"), (lambda logits, task: logits[:, 0] / 0, "prompt 0")],
)
def test_a_metric_that_is_not_one_finite_number_a_prompt_is_refused(metric, names):
    with pytest.raises(MetricError, match=names):
        mk.patch(tiny("gpt2"), tiny_task().with_metric(metric), progress=False)


@pytest.mark.parametrize("fault", ["other numbers", "no such call"])
def test_a_family_whose_blocks_cannot_be_run_one_by_one_is_refused(monkeypatch, fault):
    from mechkit.backends.replay import LensReplay

    own = LensReplay.block

    def broken(self, layer, resid, rows):
        if fault == "no such call":
            raise TypeError("forward() got an unexpected argument")
        return own(self, layer, resid, rows) * 1.5 + 0.1

    monkeypatch.setattr(LensReplay, "block", broken)
    model = mk.load((plain("llama", seed=1), None), device="cpu")
    with pytest.raises(UnsupportedError, match="one by one"):
        mk.patch(model, tiny_task(), progress=False)
    circuit = mk.Circuit(tuple(model.heads("0.1")), mk.Scores(_no_scores(), "", {}))
    with pytest.raises(UnsupportedError, match="one by one"):
        circuit.evaluate(model, tiny_task(), progress=False)


def _no_scores():
    import pandas as pd

    return pd.DataFrame({"site": ["0.1"], "score": [1.0]})


def test_sites_are_words_and_addresses_together():
    model, task = tiny("llama"), tiny_task()
    frame = mk.patch(model, task, "mlps 1.2 0.kv1.k embed 1.2", progress=False).frame
    assert frame.site.tolist() == ["m0", "m1", "m2", "1.2", "0.kv1.k", "embed"]
    assert len(mk.patch(model, task, "k v", progress=False)) == 2 * model.n_layers * model.n_kv_heads
    assert len(mk.patch(tiny("gpt2"), task, "k", progress=False)) == 12


def test_a_query_heads_key_is_patched_as_that_of_its_group():
    frame = mk.patch(tiny("llama"), tiny_task(), "1.2.k 1.3.k 1.2.v", progress=False).frame
    assert frame.site.tolist() == ["1.kv1.k", "1.kv1.v"]


def test_patching_what_a_head_writes_is_patching_its_output():
    frame = mk.patch(tiny("llama"), tiny_task(), "1.2 1.2.result", progress=False).frame
    assert frame.score[0] == pytest.approx(frame.score[1], abs=1e-6)
    assert frame.kind.tolist() == ["z", "result"]


def test_a_pattern_at_a_position_is_that_of_the_query():
    model, task = tiny("gpt2"), tiny_task(first=2)
    frame = mk.patch(model, task, "0.1.pattern", positions="each", progress=False).frame
    assert (frame.score[:2] == 0).all()
    assert (frame.score[2:] != 0).any()


def test_several_tasks_are_measured_together():
    model = tiny("llama")
    tasks = [tiny_task(n=3, length=9, seed=3), tiny_task(n=2, length=7, seed=4, first=2)]
    together = mk.patch(model, tasks, "heads resid.3", positions="END", progress=False)
    apart = [mk.patch(model, task, "heads resid.3", positions="END", progress=False).frame.metric for task in tasks]
    expected = (3 * apart[0] + 2 * apart[1]) / 5
    pd.testing.assert_series_equal(together.frame.metric, expected, atol=TOLERANCE)
    assert (together.frame.n == 5).all()
    assert [one["n"] for one in together.meta["task"]["made"]["tasks"]] == [3, 2]


def test_a_family_without_a_site_says_which(monkeypatch):
    model = mk.load((plain("llama", seed=1), None), device="cpu")
    hooks = dict(model.backend.sites._points)
    del hooks["blocks.1.attn.hook_q"]
    monkeypatch.setattr(model.backend.sites, "_points", hooks)
    with pytest.raises(UnsupportedError, match="no site of kind 'q' in layer 1"):
        mk.patch(model, tiny_task(), "q", progress=False)


def test_patterns_that_cannot_be_changed_are_refused(monkeypatch):
    from mechkit.backends import hooks

    model = mk.load((plain("opt", seed=1), None), device="cpu")
    monkeypatch.setattr(hooks, "_SOFTMAX", ())
    with pytest.raises(UnsupportedError, match="no site of kind 'pattern' in layer 0"):
        model.run(tiny_task().clean, edits=[mk.ablate("0.1", "uniform")])


def test_a_bridge_that_gives_other_logits_is_refused(monkeypatch):
    from mechkit.backends import bridge

    own, calls = bridge._last_logits, []

    def last_logits(model):
        calls.append(model)
        return own(model) + (0.5 if len(calls) > 1 else 0.0)

    monkeypatch.setattr(bridge, "_last_logits", last_logits)
    with pytest.raises(UnsupportedError, match="other logits"):
        mk.load((plain("llama", seed=1), None), device="cpu")


@pytest.mark.parametrize("base_tokens", [1, 40, 400, 10**6])
def test_groups_hold_every_variant_once_and_begin_early_enough(base_tokens):
    task = mk.Task.join([tiny_task(n=3, length=9), tiny_task(n=2, length=7, seed=4, first=1)])
    sites = mk.sites.sites("2.1 0.0 m1 resid.3 0.1.pattern")
    cells = [Cell(site, where) for site in sites for where in (None, 0, 2, 5, 8, "END")]
    masks = {cell.positions: covered(task, cell.positions) for cell in cells}
    found = groups.grouped(task, cells, masks, base_tokens)
    pairs = torch.cat([group.pairs for group in found])
    assert len(pairs.unique(dim=0)) == len(pairs)
    assert len(pairs) == sum(int(masks[cell.positions].any(1).sum()) for cell in cells)
    for group in found:
        for cell, prompt in group.pairs.tolist():
            assert group.first <= int(masks[cells[cell].positions][prompt].int().argmax())
        layers = [cells[cell].site.layer for cell in group.pairs[:, 0].tolist()]
        assert layers == sorted(layers)
        prompts = group.pairs[:, 1].unique()
        assert len(prompts) == 1 or 2 * len(prompts) * int(task.lengths[prompts].max()) <= base_tokens
    assert (len(found) == 1) == (base_tokens == 10**6)
