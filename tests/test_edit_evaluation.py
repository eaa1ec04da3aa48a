"""An edit's evaluation is what runs one by one give, and its controls are what they are said to be."""

from __future__ import annotations

import elsewhere
import pytest
import torch
from families import VOCAB, tiny, tiny_task
from reference import edit_evaluation as literal

import mechkit as mk
from mechkit import metrics
from mechkit.errors import EditError, MetricError, OptionError
from mechkit.evidence import controls
from mechkit.evidence.edit_evaluation import EditEvaluation
from mechkit.evidence.evaluate import evaluate
from mechkit.evidence.measure import measured, text_losses

FEW = ("gpt2", "llama", "gemma2", "neox", "falcon")


def _task(metric="logit_diff"):
    """Prompts of two lengths, with a span."""
    return mk.Task.join([tiny_task(3, 9, seed=1), tiny_task(4, 7, seed=2)]).with_metric(metric)


def _edits(model, task):
    values = torch.randn(len(task), 1, model.d_head, generator=torch.Generator().manual_seed(0))
    return [
        [mk.ablate("2.0"), mk.scale("1.1.q", 0.3)],
        [mk.steer("resid.2", torch.ones(model.d_model), 0.2, positions="END")],
        [mk.ablate("1.2 2.3", "mean", reference=task)],
        [mk.ablate("1.2", "resample", reference=task)],
        [mk.patch_in("0.1", values, positions=(2,))],
        [mk.attend("1.3", bias=2.0, keys=0)],
        [mk.scale("embed", 0.5)],
        [],
    ]


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_measured_is_one_run_a_prompt(family, metric):
    model, task = tiny(family), _task(metric)
    edits = _edits(model, task)
    found = measured(model, task, edits, progress=False)
    for values, some in zip(found, [[], *edits], strict=True):
        cut = [_rows(some, i, task) for i in range(len(task))]
        wanted = torch.cat([literal.metric(model, task[[i]], cut[i]) for i in range(len(task))])
        assert torch.allclose(values, wanted, atol=1e-4), some


def _rows(edits, i, task):
    """What an edit has for one prompt of a task, picked by hand."""
    done = []
    for edit in edits:
        if isinstance(edit, mk.edits.PatchIn):
            done.append(mk.patch_in("0.1", next(iter(edit.values.values()))[i], positions=(2,)))
        elif isinstance(edit, mk.edits.Ablate) and edit.mode == "resample":
            done.append(mk.ablate("1.2", "resample", reference=task[[i]]))
        else:
            done.append(edit)
    return done


@pytest.mark.parametrize("family", FEW)
def test_evaluation_is_the_loop(family):
    model, task = tiny(family), _task("loss")
    edits = [mk.ablate("1.0 2.1")]
    found = evaluate(model, task, edits, fresh=tiny_task(3, 8, seed=5).with_metric("loss"), controls=3, progress=False)
    own, edited = (literal.metric(model, task, some) for some in ((), edits))
    assert found.effect == pytest.approx(float((edited - own).mean()), abs=1e-4)
    low, high = literal.interval((edited - own).tolist(), 1)
    assert found.interval == pytest.approx((low, high), abs=0.05 * (high - low))
    rows = found.frame.loc[found.frame["split"] == "held-out"]
    assert rows.condition.tolist() == ["none", "edit", *["random"] * 3, "shuffled labels"]
    none = rows.iloc[0]
    assert none.metric == pytest.approx(float(own.mean()), abs=1e-4)
    assert (none.effect, none.low, none.high) == (0, 0, 0)
    for row in rows.to_dict("records")[2:5]:
        drawn = _drawn(edits, model.info, int(row["draw"]))
        values = literal.metric(model, task, drawn)
        assert row["metric"] == pytest.approx(float(values.mean()), abs=1e-4)
        assert row["effect"] == pytest.approx(float((values - own).mean()), abs=1e-4)
    assert set(found.frame.split) == {"held-out", "fresh"}
    assert set(found.frame[found.frame.split == "fresh"].n) == {3}


def test_shuffled_labels_are_measured_against_the_answers_of_others():
    model, task = tiny("llama"), _task()
    edits = [mk.ablate("2.1")]
    found = evaluate(model, task, edits, controls=0, seed=3, progress=False)
    other = controls.shuffled_labels(task, 3)
    assert other is not None
    assert sorted(other.correct.tolist()) == sorted(task.correct.tolist())
    own, edited = (literal.metric(model, other, some) for some in ((), edits))
    row = found.frame[found.frame.condition == "shuffled labels"].iloc[0]
    assert row.metric == pytest.approx(float(edited.mean()), abs=1e-4)
    assert row.effect == pytest.approx(float((edited - own).mean()), abs=1e-4)
    same = mk.Task.from_tokens(task.clean, task.corrupt, torch.full((7,), 5), torch.full((7,), 6), lengths=task.lengths)
    assert controls.shuffled_labels(same, 3) is None
    assert "same answers" in evaluate(model, same, edits, controls=0, progress=False).notes[0]


def test_a_neutral_edit_has_no_effect_and_beats_nothing():
    model, task = tiny("gpt2"), _task()
    found = evaluate(model, task, mk.scale("1.0", 1.0), neutral=task.clean[:2, :6], controls=4, progress=False)
    assert found.effect == pytest.approx(0, abs=1e-6)
    assert found.side_effect == pytest.approx(0, abs=1e-6)
    assert not found.beats_controls
    assert found.percentile == 1


def test_the_share_of_draws_and_what_beats_them():
    frame = evaluate(tiny("gpt2"), _task(), mk.ablate("1.0"), controls=4, progress=False).frame
    table = frame.copy()
    table.loc[table.condition == "edit", ["effect", "low", "high"]] = [-2.0, -3.0, -1.0]
    table.loc[table.condition == "random", "effect"] = [0.5, -1.0, 1.5, 2.5]
    table.loc[table.condition == "shuffled labels", "effect"] = 0.1
    found = _evaluation(table)
    assert (found.percentile, found.beats_every_draw, found.beats_controls) == (0.25, False, False)
    table.loc[table.condition == "random", "effect"] = [0.5, -1.0, 1.5, 1.9]
    found = _evaluation(table)
    assert (found.percentile, found.beats_every_draw, found.beats_controls) == (0, True, True)
    table.loc[table.condition == "shuffled labels", "effect"] = -2.2
    assert not _evaluation(table).beats_controls
    table.loc[table.condition == "shuffled labels", "effect"] = 0.0
    table.loc[table.condition == "edit", "high"] = 0.1
    assert not _evaluation(table).beats_controls
    assert not _evaluation(table[table.condition.isin(["none", "edit"])]).beats_controls


def _drawn(edits, info, seed):
    drawn = controls.random_edits(edits, info, seed)
    assert drawn is not None
    return drawn


def _evaluation(frame):
    return EditEvaluation(frame, "logits", None, (), {})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_random_places(family):
    info = tiny(family).info
    edits = [mk.steer("1.0 1.2 2.3", {"1.0": torch.zeros(8), "1.2": torch.ones(8), "2.3": torch.ones(8)}),
             mk.scale("1.2.q 2.3", 0.5)]  # fmt: skip
    seen = set()
    for seed in range(30):
        drawn = _drawn(edits, info, seed)
        steered, scaled = ([(one.layer, one.head, one.kind) for one in edit.sites] for edit in drawn)
        assert [layer for layer, _, _ in steered] == [1, 1, 2]
        assert {*steered} != {(1, 0, "z"), (1, 2, "z"), (2, 3, "z")}
        assert [one[:2] for one in scaled] == [one[:2] for one in steered[1:]]  # what shares a head goes on sharing one
        assert [kind for _, _, kind in scaled] == ["q", "z"]
        vectors = drawn[0].vector  # type: ignore[attr-defined]
        assert [float(vectors[site].sum()) for site in drawn[0].sites] == [0, 8, 8]
        seen.add(tuple(steered))
    assert len(seen) > 10


def test_shared_keys_move_among_groups():
    info = tiny("llama").info
    for seed in range(10):
        (drawn,) = _drawn([mk.scale("1.1.k 1.0", 0.5)], info, seed)
        by_kind = {one.kind: one for one in drawn.sites}
        assert by_kind["k"].grouped
        assert (by_kind["k"].layer, by_kind["z"].layer) == (1, 1)
        assert (by_kind["k"].head, by_kind["z"].head) != (0, 0)


def test_no_place_to_move_to():
    model, task = tiny("gpt2"), _task()
    assert controls.random_edits([mk.scale(model.heads(), 0.5)], model.info, 0) is None
    found = evaluate(model, task, mk.scale("m1", 0.5), controls=3, progress=False)
    assert "random" not in set(found.frame.condition)
    assert "No random control" in found.notes[0]
    assert "No random control" in repr(found)
    assert found.percentile != found.percentile
    assert not found.beats_every_draw


def test_a_vector_is_replaced_by_one_of_its_length():
    info, vector = tiny("gpt2").info, torch.arange(32.0)
    (drawn,) = _drawn([mk.steer("resid.1", vector)], info, 0)
    other = drawn.vector  # type: ignore[attr-defined]
    assert float(other.norm()) == pytest.approx(float(vector.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(other, vector, 0))) < 0.6


def test_the_least_heads():
    model, task = tiny("llama"), _task()
    ranking = mk.patch(model, task, "heads", progress=False)
    last = [str(one) for one in ranking.ranked()[::-1]]
    (edit,) = controls.least_heads([mk.scale("1.0 2.1", 0.5)], model.info, ranking)
    assert [str(one) for one in edit.sites] == last[:2]
    found = evaluate(model, task, mk.scale("1.0 2.1", 0.5), ranking=ranking, controls=0, progress=False)
    row = found.frame[found.frame.condition == "reversed"].iloc[0]
    wanted = literal.metric(model, task, [edit]) - literal.metric(model, task, ())
    assert row.effect == pytest.approx(float(wanted.mean()), abs=1e-4)
    with pytest.raises(OptionError, match="A ranking of 12 heads for edits of 0"):
        evaluate(model, task, mk.scale("m1", 0.5), ranking=ranking, progress=False)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_a_text_loses(family):
    model, edits = tiny(family), [mk.ablate("1.0"), mk.scale("m2", 0.5)]
    ids = tiny_task(3, 9, seed=4).clean
    lengths = torch.tensor([9, 5, 7])
    found = text_losses(model, ids, lengths, [edits])
    for value, some in zip(found.tolist(), [(), edits], strict=True):
        each = [
            (int(n) - 1, literal.text_loss(model, row[:n].tolist(), some)) for row, n in zip(ids, lengths, strict=True)
        ]
        assert value == pytest.approx(sum(n * loss for n, loss in each) / sum(n for n, _ in each), abs=1e-4)


def test_a_text_without_the_span():
    model, task = tiny("gpt2"), _task()
    edit = mk.scale("1.0", 0.5, positions="END")
    with pytest.raises(EditError, match="span"):
        evaluate(model, task, edit, neutral=task.clean[:1, :5], controls=0, progress=False)


def test_shown_and_drawn():
    model, task = tiny("gpt2"), _task()
    found = evaluate(model, task, mk.ablate("1.0"), fresh=tiny_task(3, 8), controls=3, progress=False)
    assert "effect" in repr(found)
    assert "<table" in found._repr_html_()
    assert len(found.plot().axes[0].get_yticklabels()) == 6
    summary = found.summary.set_index(["split", "condition"])
    drawn = found.frame[(found.frame.split == "fresh") & (found.frame.condition == "random")].effect
    assert summary.loc[("fresh", "random"), "low"] == drawn.min()
    assert found.meta["options"]["controls"] == 3


def test_bad_input():
    model, task = tiny("gpt2"), _task()
    with pytest.raises(EditError, match="is no edit"):
        evaluate(model, task, "1.0")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no edit"):
        evaluate(model, task, [])
    with pytest.raises(OptionError, match="controls = -1"):
        evaluate(model, task, mk.ablate("1.0"), controls=-1)
    with pytest.raises(EditError, match="no vector yet"):
        evaluate(model, task, mk.steer("1.0"), progress=False, controls=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_elsewhere(family, tmp_path):
    place = elsewhere.folder(tmp_path, family)
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    task, edit = elsewhere.TASK(), [mk.ablate("1.0 2.1", "mean", reference=elsewhere.TASK())]
    ours, theirs = (evaluate(one, task, edit, controls=3, progress=False) for one in (far, own))
    columns = ["metric", "effect", "low", "high"]
    assert ours.frame[columns].to_numpy() == pytest.approx(theirs.frame[columns].to_numpy(), abs=1e-4)
    assert ours.side_effect == pytest.approx(theirs.side_effect, abs=1e-4)
    assert theirs.loss is not None


# -- metrics ----------------------------------------------------------------------------------------------------------


def _answers(correct, wrong):
    n = len(correct)
    clean = torch.arange(3, 3 + 2 * n).view(n, 2)
    return mk.Task.from_tokens(clean, clean + 20, torch.tensor(correct), torch.tensor(wrong))


def test_rates():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [4.0, 1.0, 0.0, 2.0], [0.0, 1.0, 5.0, 2.0]])
    task = _answers([1, 1, 1], [2, 2, 2])
    assert metrics.METRICS["correct_rate"](logits, task).tolist() == [1, 0, 0]
    assert metrics.METRICS["wrong_rate"](logits, task).tolist() == [0, 0, 1]


def test_choices():
    share = torch.tensor([[0.05, 0.6, 0.2, 0.15], [0.5, 0.2, 0.2, 0.1], [0.15, 0.3, 0.4, 0.15]])
    task, choices = _answers([1, 1, 1], [2, 2, 2]), torch.tensor([1, 2])
    logits = share.log() + 3.0
    assert metrics.choice_mass(choices)(logits, task).tolist() == pytest.approx([0.8, 0.4, 0.7])
    assert metrics.choice_accuracy(torch.tensor([1, 2, 3]))(logits, task).tolist() == [1, 1, 0]
    assert metrics.surface_bound(choices)(logits, task).tolist() == [1, 0, 0]  # .2 < .4, .6 > 0, .3 > .1


def test_surface_bound_is_whether_any_share_of_the_rest_could_turn_it():
    share = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)).softmax(-1) ** 3
    share /= share.sum(-1, keepdim=True)
    task = _answers([1] * 50, [2] * 50)
    found = metrics.surface_bound(torch.tensor([0, 1, 2, 3]))(share.log(), task)
    turned = []
    for row in share:
        rest = float(row[4:].sum())
        best = int(row[:4].argmax())
        turned.append(any(float(row[c]) + rest >= float(row[best]) for c in range(4) if c != best))
    assert found.bool().tolist() == [not one for one in turned]
    assert 0 < sum(turned) < 50


def test_rows_of_choices_find_their_prompts():
    share = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.5, 0.2, 0.2, 0.1]])
    task, rows = _answers([1, 0], [2, 2]), torch.tensor([[1, 2], [0, 3]])
    measure = metrics.choice_mass(rows, task)
    assert measure(share.log(), task).tolist() == pytest.approx([0.7, 0.6])
    assert measure(share.log()[1:], task[[1]]).tolist() == pytest.approx([0.6])
    with pytest.raises(MetricError, match="has no row of choices"):
        measure(share.log(), _answers([1, 0, 1], [2, 2, 2])[1:])


def test_bad_choices():
    task = _answers([1, 0], [2, 2])
    with pytest.raises(MetricError, match="two token ids or more"):
        metrics.choice_mass(torch.tensor([1]))
    with pytest.raises(MetricError, match="same token twice"):
        metrics.choice_mass(torch.tensor([1, 1]))
    with pytest.raises(MetricError, match="2 rows of choices and no prompts"):
        metrics.choice_mass(torch.tensor([[1, 2], [1, 3]]))
    with pytest.raises(MetricError, match="is none of its choices"):
        metrics.choice_accuracy(torch.tensor([1, 2]))(torch.zeros(2, 4), task)


def test_choices_are_sent(tmp_path):
    place = elsewhere.folder(tmp_path, "llama")
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    task = elsewhere.TASK()
    rows = torch.stack([task.correct, task.wrong], 1)
    for made in (metrics.choice_mass(torch.arange(3, VOCAB - 50)), metrics.choice_accuracy(rows, task)):
        measured_there, measured_here = (measured(one, task.with_metric(made), [], False) for one in (far, own))
        assert torch.allclose(measured_there, measured_here, atol=1e-5)


def test_an_edit_of_the_last_position_has_no_side_effect_to_see():
    model, task = tiny("llama"), _task()
    found = evaluate(
        model, task, mk.scale("1.0", 0.0, positions=-1), controls=0, neutral=task.clean[:2], progress=False
    )
    assert found.loss is None
    assert any("last position" in note for note in found.notes)
