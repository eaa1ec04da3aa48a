"""Direct logit attribution: parts equal those of the Hub's own model, and make up its logit difference."""

from __future__ import annotations

import elsewhere
import numpy as np
import pytest
import torch
from families import FAMILIES, tiny, tiny_task, untouched
from reference.direct import head_writes, logits_before_cap, through_final_norm
from reference.patching import value_of

import mechkit as mk
from mechkit import errors
from mechkit.head_scores.direct import direct

FINAL_CAP = ("gemma2",)


def difference(logits: torch.Tensor, task: mk.Task) -> torch.Tensor:
    rows = torch.arange(len(task))
    return logits[rows, task.correct] - logits[rows, task.wrong]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_make_up_the_models_own_logits(family):
    model, task = untouched(family), tiny_task()
    own = float(difference(logits_before_cap(model, task.clean), task).mean())
    for what, left in (
        ("heads", {"mlps", "embed", "biases"}),
        ("mlps", {"heads", "embed", "biases"}),
        ("all", {"biases"}),
    ):
        scores = direct(tiny(family), task, what=what, progress=False)
        assert set(scores.meta["rest"]) == left
        assert scores.meta["total"] == pytest.approx(own, abs=1e-4 * max(1, abs(own)))
        made = scores.frame.score.sum() + sum(scores.meta["rest"].values())
        assert made == pytest.approx(own, abs=1e-4 * max(1, abs(own)))
        assert scores.meta["capped"] == (family in FINAL_CAP)
    if family not in FINAL_CAP:
        logits = tiny(family).run(task).logits
        assert own == pytest.approx(float(mk.metrics.logit_diff(logits, task).mean()), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_that_of_the_hubs_model(family):
    model, task = untouched(family), tiny_task()
    frame = direct(tiny(family), task, what="all", progress=False).frame.set_index("site")
    assert len(frame) == 3 * 4 + 3 + 1

    def by(written: torch.Tensor) -> torch.Tensor:
        return difference(through_final_norm(model, task.clean, written), task)

    for layer in range(3):
        for head in range(4):
            own = by(head_writes(model, task.clean, layer, head))
            row = frame.loc[f"{layer}.{head}"]
            assert row.score == pytest.approx(float(own.mean()), abs=1e-4)
            assert row.se == pytest.approx(float(own.std() / len(task) ** 0.5), abs=1e-4)
        own = by(value_of(model, task.clean, "mlp", layer)[:, -1])
        row = frame.loc[f"m{layer}"]
        assert (row.layer, row["kind"], row.n) == (layer, "mlp", 4)
        assert row.score == pytest.approx(float(own.mean()), abs=1e-4)
        assert row.se == pytest.approx(float(own.std() / len(task) ** 0.5), abs=1e-4)
    own = by(value_of(model, task.clean, "resid", 0)[:, -1])
    assert frame.loc["embed"].score == pytest.approx(float(own.mean()), abs=1e-4)


def test_biases_count():
    rest = {
        family: direct(tiny(family), tiny_task(), progress=False).meta["rest"]["biases"] for family in ("gpt2", "llama")
    }
    assert abs(rest["gpt2"]) > 1e-3
    assert rest["llama"] == 0


def test_prompts_of_several_lengths():
    model, task = tiny("neox"), mk.Task.join([tiny_task(3, 9, seed=1), tiny_task(2, 5, seed=2)])
    together = direct(model, task, what="all", progress=False).frame.score.to_numpy()
    parts = [
        direct(model, task[some], what="all", progress=False).frame.score.to_numpy() for some in ([0, 1, 2], [3, 4])
    ]
    assert together == pytest.approx((3 * parts[0] + 2 * parts[1]) / 5, abs=1e-5)


def test_tables_of_parts():
    scores = direct(tiny("llama"), tiny_task(), what="all", progress=False)
    assert {"m1", "embed", "0.1"} <= {str(one) for one in scores.ranked()}
    assert np.isfinite(scores.grid("z")).all()
    assert scores.grid("mlp").shape == (3, 1)
    one = direct(tiny("llama"), tiny_task(1), what="mlps", progress=False)
    assert one.frame.se.isna().all()


def test_a_planted_writer_is_all_there_is():
    planted = mk.planted.induction()
    scores = direct(planted.model, planted.task, progress=False)
    assert [str(one) for one in scores.heads(1)] == ["1.0"]
    assert scores.top(1).score[0] == pytest.approx(scores.meta["total"], abs=0.1)


@pytest.mark.parametrize("family", elsewhere.FAMILIES)
def test_the_same_elsewhere(tmp_path, family):
    place = elsewhere.folder(tmp_path, family)
    far, own = (
        direct(mk.load(place, **where), elsewhere.TASK(), what="all", progress=False)
        for where in ({"remote": "local"}, {"device": "cpu"})
    )
    elsewhere.same(far, own)
    assert far.meta["rest"] == pytest.approx(own.meta["rest"], abs=1e-4)


def test_bad_input():
    with pytest.raises(errors.TaskError, match="two answers"):
        direct(tiny("llama"), tiny_task().clean)  # type: ignore[arg-type]
    for option in ({"what": "edges"}, {"scale": "own"}):
        with pytest.raises(errors.OptionError, match=next(iter(option))):
            direct(tiny("llama"), tiny_task(), **option)
