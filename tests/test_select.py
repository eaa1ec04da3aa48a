"""What is chosen is the best of what was tried, one run at a time, and is reported on other prompts."""

from __future__ import annotations

import itertools

import elsewhere
import pytest
import torch
from families import tiny, tiny_task
from reference import edit_evaluation as literal

import mechkit as mk
from mechkit import planted
from mechkit.errors import EditError, OptionError, SiteError
from mechkit.evidence.evaluate import evaluate
from mechkit.fitting.select import Selection, select

SHORT = {"controls": 3, "progress": False}


def _mean(model, task, edits):
    return float(literal.metric(model, task, edits).mean())


def _zeroed(heads):
    return mk.ablate(heads, "zero")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("maximise", [True, False])
def test_a_sweep_takes_the_best(family, maximise):
    model, task, values = tiny(family), tiny_task(10), [0.0, 0.5, 2.0, 4.0]
    done = select(model, task, lambda value: mk.scale("1.1 2.0", value), values, maximise=maximise, **SHORT)
    train, held_out = task.split(0.5, 0)
    assert torch.equal(done.train.clean, train.clean)
    assert torch.equal(done.held_out.clean, held_out.clean)
    means = [_mean(model, train, [mk.scale("1.1 2.0", value)]) for value in values]
    assert done.frame.metric.tolist() == pytest.approx(means, abs=1e-4)
    assert done.frame.effect.tolist() == pytest.approx([one - _mean(model, train, []) for one in means], abs=1e-4)
    best = values[means.index(max(means) if maximise else min(means))]
    assert done.chosen == best
    assert done.frame.candidate[done.frame.chosen].tolist() == [str(best)]
    assert done.edits[0].alpha == best  # type: ignore[attr-defined]


def test_the_report_is_on_other_prompts():
    model, task = tiny("llama"), tiny_task(12)
    done = select(model, task, lambda value: [mk.scale("1.1", value), mk.ablate("0.0")], [0.0, 2.0, 3.0], **SHORT)
    assert isinstance(done.edit, tuple)
    report = done.report
    assert report is done.report
    own, edited = (literal.metric(model, done.held_out, some) for some in ((), done.edits))
    assert report.effect == pytest.approx(float((edited - own).mean()), abs=1e-4)
    assert set(report.frame.condition) == {"none", "edit", "random", "shuffled labels"}
    with pytest.raises(OptionError, match="among those that the edit was found on"):
        evaluate(model, task, done, **SHORT)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("keep", [1, 2])
def test_greedy_is_the_loop(family, keep):
    model, task = tiny(family), tiny_task(8, seed=1)
    candidates = [str(one) for one in model.heads()][::2]
    done = select(model, task, _zeroed, candidates, method="greedy", rounds=3, keep=keep, held_out=task[:2], **SHORT)
    chosen, reached = [], _mean(model, task, [])
    for _ in range(3):
        tried = {one: _mean(model, task, [_zeroed([*chosen, one])]) for one in candidates if one not in chosen}
        better = sorted((one for one in tried if tried[one] > reached + 1e-6), key=tried.__getitem__, reverse=True)[
            :keep
        ]
        if not better:
            break
        added, reached = better[:1], tried[better[0]]
        if len(better) > 1 and (together := _mean(model, task, [_zeroed([*chosen, *better])])) > reached:
            added, reached = better, together
        chosen += added
    assert [str(one) for one in done.chosen] == chosen
    rows = done.frame[done.frame.chosen]
    assert rows.metric.iloc[-1] == pytest.approx(reached, abs=1e-4)
    assert len(rows) == rows["round"].nunique()


def test_greedy_finds_what_is_planted():
    circuit = planted.distractor_copy(n=24)
    heads = circuit.model.heads()
    done = select(circuit.model, circuit.task, _zeroed, heads, method="greedy", rounds=1, maximise=False, **SHORT)
    (chosen,) = map(str, done.chosen)
    assert chosen in circuit.nodes
    assert done.frame.effect[done.frame.chosen].iloc[-1] < -1
    assert done.report.effect < -1
    assert done.report.beats_every_draw


def test_greedy_where_nothing_helps():
    circuit = planted.distractor_copy(n=12)
    done = select(circuit.model, circuit.task, _zeroed, "2.1 2.2", method="greedy", objective=_distance, **SHORT)
    assert len(done.chosen) == 0
    assert done.edits == ()
    assert not done.frame.chosen.any()
    assert "nothing helped" in repr(done)
    with pytest.raises(OptionError, match="no edit"):
        _ = done.report


def _distance(logits, task):
    """Never above 0 by what adds to all logits alike."""
    return (0.0 * logits).sum(-1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_cut_of_a_ranking(family):
    model, task = tiny(family), tiny_task(10)
    ranking = mk.patch(model, task, "heads", progress=False)
    sizes = ranking.frame.score.abs().sort_values(ascending=False).tolist()
    least = (sizes[3] + sizes[4]) / 2
    done = select(model, task, _zeroed, [1, 2, least], method="threshold", ranking=ranking, **SHORT)
    made = [str(ranking.heads(1)), str(ranking.heads(2)), str(ranking.heads(4))]
    assert done.frame.heads.tolist() == made
    means = [_mean(model, done.train, [_zeroed(heads)]) for heads in made]
    assert done.frame.metric.tolist() == pytest.approx(means, abs=1e-4)
    assert done.chosen == [1, 2, least][means.index(max(means))]
    for odd in (0, 13, 1e9, True, "x"):
        with pytest.raises(OptionError, match=r"leaves|as a threshold"):
            select(model, task, _zeroed, [odd], method="threshold", ranking=ranking, **SHORT)


def test_an_objective_of_its_own():
    model, task = tiny("llama"), tiny_task(10)
    done = select(model, task, lambda value: mk.scale("1.1", value), [0.0, 3.0], objective="prob", **SHORT)
    assert done.train.metric.name == done.held_out.metric.name == "prob"
    assert done.report.meta["task"]["metric"] == "prob"
    assert done.meta["options"]["objective"] == "prob"
    assert "rounds" not in done.meta["options"]


def test_again_is_the_same():
    model, task = tiny("gpt2"), tiny_task(10)
    done = select(model, task, _zeroed, "0.1 1.1 2.1", method="greedy", **SHORT)
    again = done.again(done.train, progress=False)
    assert isinstance(again, Selection)
    assert again.frame.equals(done.frame)
    assert again.chosen == done.chosen
    assert "Selection of" in done._repr_html_()


def test_a_false_claim_comes_out_false():
    """The best of many edits on prompts with answers at random is nothing on others."""
    around, beaten = 0, 0
    for seed in range(4):
        task = tiny_task(80, seed=seed)
        done = select(tiny("gpt2"), task, _zeroed, [str(one) for one in tiny("gpt2").heads()], **SHORT)
        low, high = done.report.interval
        around += low <= 0 <= high
        beaten += done.report.beats_controls
    assert around >= 3
    assert beaten <= 1


def test_bad_input():
    model, task = tiny("gpt2"), tiny_task(10)

    def make(value):
        return mk.scale("1.1", value)

    for given, options, words in (
        ([], {}, "candidates"),
        ("1.0", {}, "candidates"),
        (3, {}, "candidates"),
        ([1.0], {"method": "best"}, "method"),
        ([1.0], {"rounds": 0}, "rounds"),
        ([1.0], {"keep": 0.5}, "keep"),
        ([1], {"method": "threshold"}, "ranking"),
        ([], {"method": "greedy"}, "no heads"),
    ):
        with pytest.raises(OptionError, match=words):
            select(model, task, make, given, progress=False, **options)
    with pytest.raises(SiteError, match="9"):
        select(model, task, _zeroed, "9.9", method="greedy", progress=False)
    with pytest.raises(EditError, match="is no edit"):
        select(model, task, lambda value: value, [1.0], progress=False)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_elsewhere(family, tmp_path):
    place = elsewhere.folder(tmp_path, family)
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    for make, candidates, more in (
        (lambda value: mk.scale("1.1", value), [0.0, 2.0], {}),
        (_zeroed, "0.1 1.1 2.1", {"method": "greedy", "rounds": 2}),
    ):
        ours, theirs = (select(one, tiny_task(8), make, candidates, **more, **SHORT) for one in (far, own))
        assert ours.chosen == theirs.chosen
        columns = ["metric", "effect"]
        assert ours.frame[columns].to_numpy() == pytest.approx(theirs.frame[columns].to_numpy(), abs=1e-4)
        if ours.edits:
            assert ours.report.effect == pytest.approx(theirs.report.effect, abs=1e-4)


def test_every_candidate_is_tried_once():
    model = tiny("llama")
    pairs = list(itertools.product(["1.1", "2.0"], [0.0, 2.0]))
    done = select(model, tiny_task(8), lambda pair: mk.scale(*pair), pairs, **SHORT)
    assert done.frame.candidate.tolist() == [str(pair) for pair in pairs]
    assert done.chosen in pairs
