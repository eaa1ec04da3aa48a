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
