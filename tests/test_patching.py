"""The sweep engine against the literal form, on every family, and what must hold whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, plain, tiny, tiny_task
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference import patching as literal

import mechkit as mk
from mechkit.errors import MetricError, OptionError, SiteError, TaskError, UnsupportedError

TOLERANCE = 1e-4


def _metric(task: mk.Task, logits: torch.Tensor) -> torch.Tensor:
    return mk.metrics.logit_diff(logits, task)


def _pair(task: mk.Task, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    return (task.corrupt, task.clean) if direction == "denoise" else (task.clean, task.corrupt)


def _expected(task: mk.Task, model, patched: torch.Tensor, direction: str) -> tuple[float, float]:
    base, source = (_metric(task, model(ids, use_cache=False).logits) for ids in _pair(task, direction))
    values = _metric(task, patched)
    return float((values - base).mean() / (source - base).mean()), float(values.mean())


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_head_equals_one_forward_a_head(family, direction):
    model, hf, task = tiny(family), plain(family), tiny_task()
    frame = mk.patch(model, task, "heads", direction=direction, progress=False).frame
    base, source = _pair(task, direction)
    for row in frame.itertuples():
        patched = literal.patch_head(hf, base, source, row.layer, row.head, model.d_head)
        score, metric = _expected(task, hf, patched, direction)
        assert row.metric == pytest.approx(metric, abs=TOLERANCE), row.site
        assert row.score == pytest.approx(score, abs=TOLERANCE), row.site


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mlps_equal_one_forward_an_mlp(family):
    model, hf, task = tiny(family), plain(family), tiny_task(seed=1)
    for row in mk.patch(model, task, "mlps", progress=False).frame.itertuples():
        patched = literal.patch_output(hf, literal.mlp(hf, row.layer), task.corrupt, task.clean)
        assert row.metric == pytest.approx(float(_metric(task, patched).mean()), abs=TOLERANCE), row.site


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_residual_at_each_position_equals_one_forward_a_cell(family):
    model, hf, task = tiny(family), plain(family), tiny_task(n=2, seed=2)
    frame = mk.patch(model, task, "resid", positions="each", progress=False).frame
    assert len(frame) == (model.n_layers + 1) * task.clean.shape[1]
    for row in frame[frame.layer > 0].itertuples():
        # The stream entering block l is what block l-1 put out.
        module = literal.block(hf, row.layer - 1)
        patched = literal.patch_output(hf, module, task.corrupt, task.clean, row.position)
        expected = float(_metric(task, patched).mean())
        assert row.metric == pytest.approx(expected, abs=TOLERANCE), (row.site, row.position)


@settings(max_examples=15, deadline=None, phases=[Phase.generate])  # shrinking runs models for minutes
@given(
    family=st.sampled_from(FAMILIES),
    seed=st.integers(0, 1000),
    first=st.integers(0, 8),
    head=st.integers(0, 11),
    position=st.integers(0, 8),
    direction=st.sampled_from(["denoise", "noise"]),
)
@torch.no_grad()
def test_one_head_at_one_position_equals_one_forward(family, seed, first, head, position, direction):
    model, hf = tiny(family), plain(family)
    task = tiny_task(n=3, seed=seed, first=first)
    layer, head = divmod(head, model.n_heads)
    base, source = _pair(task, direction)
    frame = mk.patch(model, task, f"{layer}.{head}", positions=position, direction=direction, progress=False).frame
    patched = literal.patch_head(hf, base, source, layer, head, model.d_head, position)
    assert frame.metric[0] == pytest.approx(float(_metric(task, patched).mean()), abs=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_everything_is_the_source_run(family):
    model, task = tiny(family), tiny_task()
    whole = mk.patch(model, task, "resid.0", progress=False).frame
    end = mk.patch(model, task, f"resid.{model.n_layers}", positions="END", progress=False).frame
    assert whole.score[0] == pytest.approx(1, abs=TOLERANCE)
    assert end.score[0] == pytest.approx(1, abs=TOLERANCE)


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
    logits = literal.patch_head(hf, task.corrupt, task.clean, 1, 2, model.d_head)[:, -1]
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
    monkeypatch.setattr("mechkit.patching.sweep.TOKENS_AT_ONCE", 20)
    torch.testing.assert_close(
        torch.tensor(whole.metric), torch.tensor(mk.patch(model, task, progress=False).frame.metric), atol=1e-5, rtol=0
    )


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
        ({"sites": "0.1.pattern"}, UnsupportedError, "0.1.pattern"),
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

    own = LensReplay._block

    def broken(self, layer, resid, rows):
        if fault == "no such call":
            raise TypeError("forward() got an unexpected argument")
        return own(self, layer, resid, rows) * 1.5 + 0.1

    monkeypatch.setattr(LensReplay, "_block", broken)
    model = mk.load((plain("llama", seed=1), None), device="cpu")
    with pytest.raises(UnsupportedError, match="one by one"):
        mk.patch(model, tiny_task(), progress=False)
    circuit = mk.Circuit(tuple(model.heads("0.1")), mk.Scores(_no_scores(), "", {}))
    with pytest.raises(UnsupportedError, match="one by one"):
        circuit.evaluate(model, tiny_task(), progress=False)


def _no_scores():
    import pandas as pd

    return pd.DataFrame({"site": ["0.1"], "score": [1.0]})
