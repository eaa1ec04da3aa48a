"""A fit goes down the true gradient, leaves the model alone, finds what is planted, and claims nothing else."""

from __future__ import annotations

import math
from types import SimpleNamespace

import elsewhere
import pytest
import torch
from families import FAMILIES, plain, tiny, tiny_task
from reference import fitting as literal

import mechkit as mk
from mechkit import planted
from mechkit.edits import free, inject, with_tensors
from mechkit.errors import EditError, Interrupted, MetricError, OptionError, TaskError
from mechkit.evidence.evaluate import evaluate
from mechkit.fitting.fit import Fit, fit
from mechkit.fitting.train import Objective, Plan, trained


def _plan(objective="loss", **changes):
    told = {"steps": 3, "batch": 4, "lr": 0.01, "l1": 0.0, "beta": 0.5, "every": 1, "seed": 0}
    return Plan(objective, True, **{**told, **changes})  # type: ignore[arg-type]


def _task(metric="logit_diff"):
    """Prompts of two lengths."""
    return mk.Task.join([tiny_task(2, 8, seed=1), tiny_task(1, 6, seed=2)]).with_metric(metric)


def _checked(model, task, edits, objective="loss"):
    """The gradient of the free tensors, beside differences of runs one by one."""
    made = Objective(model, edits, _plan(objective))
    value, grads = made.gradient(task, torch.arange(len(task)))
    frees = [free(one, model.info) for one in edits]
    flat = [one for some in frees for one in some]
    start = _filled(edits, frees, [one.start for one in flat])
    assert value == pytest.approx(literal.objective(model, task, start, objective), abs=1e-4)
    for number, one in enumerate(flat):

        def at(tensor, number=number):
            tensors = [tensor if i == number else f.start for i, f in enumerate(flat)]
            return literal.objective(model, task, _filled(edits, frees, tensors), objective)

        wanted = literal.gradient(at, one.start)
        scale = 0.25 if one.unit else 1.0  # of a gate's logit, at one half
        assert torch.allclose(grads[number], scale * wanted, atol=2e-3 + 1e-2 * float(wanted.abs().max())), one
    assert max(float(grad.abs().max()) for grad in grads) > 1e-3


def _filled(edits, frees, tensors):
    rest = iter(tensors)
    return [with_tensors(edit, [next(rest) for _ in some]) for edit, some in zip(edits, frees, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_runs_one_by_one(family):
    model = tiny(family)
    _checked(model, _task(), [mk.steer("1.1"), mk.attend("1.2 2.0", bias=0.0, keys=0), inject("2.3", torch.ones(1))])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("objective", ["loss", "metric", "preference"])
def test_every_objective(family, objective):
    model, task = tiny(family), _task("prob" if family == "gpt2" else "logit_diff")
    _checked(
        model, task, [mk.scale("1.1"), mk.ablate("2.0"), mk.steer("0.3", torch.full((model.d_head,), 0.3))], objective
    )


def test_a_metric_against_the_clean_run():
    _checked(tiny("llama"), _task("kl"), [mk.steer("1.1", torch.full((8,), 0.5))], "metric")


def test_at_a_span_and_on_keys():
    model = tiny("llama")
    _checked(
        model, _task(), [mk.steer("1.1", positions="END"), mk.scale("1.kv0.k", positions=(1, 2)), mk.scale("m1", 1.0)]
    )


def test_memory_runs_out(monkeypatch):
    model, task = tiny("llama"), _task()
    rows, made = torch.arange(3), Objective(model, [mk.steer("1.1")], _plan())
    value, grads = made.gradient(task, rows)
    each = made._each

    def tight(task, rows):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return each(task, rows)

    monkeypatch.setattr(made, "_each", tight)
    again, parts = made.gradient(task, rows)
    assert again == pytest.approx(value, abs=1e-5)
    assert torch.allclose(parts[0], grads[0], atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_is_left_alone(family):
    model = mk.load((plain(family), None), device="cpu")
    before, task = model.weights_hash, tiny_task(8)
    asked = [one.requires_grad for one in model.hf.parameters()]
    logits = model.run(task).logits
    fit(model, task, mk.scale(model.heads()), steps=2, progress=False)
    del model.__dict__["weights_hash"]
    assert model.weights_hash == before
    assert [one.requires_grad for one in model.hf.parameters()] == asked
    assert all(one.grad is None for one in model.hf.parameters())
    assert torch.equal(model.run(task).logits, logits)


def test_adam_walks_the_planted_direction():
    """Where the metric is linear in the vector, every step of Adam is ``lr`` along the gradient's signs."""
    circuit = planted.distractor_copy(n=12)
    model, task = circuit.model, circuit.task
    edit, plan = mk.steer("1.0", positions="END"), _plan("metric", steps=10, batch=99, every=10)
    found = trained(model, task, task, [edit], plan, progress=False)
    weights = model.bridge.blocks[1].attn.W_O[0]  # [d_head, d_model]
    unembed = model.hf.get_output_embeddings().weight
    towards = (unembed[task.correct] - unembed[task.wrong]).mean(0) @ weights.T
    moved = towards.abs() > 1e-3
    assert moved.any()
    assert found.best == 10
    assert torch.allclose(found.tensors[0][moved], 0.1 * towards[moved].sign(), atol=1e-3)


def test_lofit_finds_the_planted_heads():
    circuit = planted.distractor_copy(n=40)
    first = fit(circuit.model, circuit.task, mk.scale(circuit.model.heads()), l1=5e-4, steps=40, progress=False)
    chosen = first.scores.heads(2)
    assert set(map(str, chosen)) == set(circuit.nodes)
    assert first.history.validation.min() < first.history.validation.iloc[0]
    assert float(first.scores.frame.score.nlargest(3).iloc[2]) < 0.1 * float(first.scores.frame.score.max())
    second = fit(circuit.model, circuit.task, mk.steer(chosen), steps=20, progress=False)
    assert {str(site) for site in second.edits[0].sites} == set(circuit.nodes)


def test_a_true_claim_holds_on_held_out_prompts():
    circuit = planted.distractor_copy(n=40)
    done = fit(circuit.model, circuit.task, mk.scale("1.0"), steps=30, controls=6, progress=False)
    report = done.report
    assert report is done.report
    assert report.effect > 0.3
    assert report.interval[0] > 0
    assert report.beats_every_draw
    assert report.beats_controls
    assert set(report.frame.condition) == {"none", "edit", "random", "shuffled labels"}
    assert set(report.frame.n) == {12}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_false_claim_comes_out_false(family):
    around = 0
    for seed in range(4):
        done = fit(tiny(family), tiny_task(60, seed=seed), mk.steer("1.1 2.0"), objective="metric", steps=30, every=10,
                   lr=0.1, controls=4, progress=False)  # fmt: skip
        low, high = done.report.interval
        around += low <= 0 <= high
        assert not done.report.beats_controls
    assert around >= 3  # of four 95% intervals


def test_l1_draws_what_does_nothing_to_neutral():
    circuit = planted.distractor_copy(n=12)
    edit = mk.steer("2.1", torch.full((16,), 0.5))
    plan = _plan(steps=20, batch=99, l1=1.0, every=20)
    objective = Objective(circuit.model, [edit], plan)
    _, (grad,) = objective.gradient(circuit.task, torch.arange(4))
    assert torch.allclose(grad, torch.ones(16), atol=1e-4)
    scaled = Objective(circuit.model, [mk.scale("2.1", torch.full((16,), 0.5))], plan)
    _, (grad,) = scaled.gradient(circuit.task, torch.arange(4))
    assert torch.allclose(grad, -torch.ones(16), atol=1e-4)


def test_preference_begins_at_an_even_chance():
    done = fit(tiny("llama"), tiny_task(10), mk.steer("1.1"), objective="preference", steps=4, every=2, progress=False)
    assert done.history.validation.iloc[0] == pytest.approx(math.log(2), abs=1e-5)
    assert done.history.step.tolist() == [0, 2, 4]
    assert done.history.train.iloc[1] < math.log(2) + 1e-3


def test_the_best_in_validation_is_kept():
    model, task = tiny("gpt2"), tiny_task(20, seed=1)
    learnt, validation = task.split(0.5)
    found = trained(model, learnt, validation, [mk.steer("1.1 2.2")], _plan(steps=30, lr=0.3), progress=False)
    values = [value for _, _, value in found.history]
    best = min(range(len(values)), key=values.__getitem__)
    assert found.best == found.history[best][0]
    edit = with_tensors(mk.steer("1.1 2.2"), found.tensors)
    assert literal.objective(model, validation, [edit], "loss") == pytest.approx(values[best], abs=1e-4)


def test_gates():
    model, task = tiny("llama"), tiny_task(12)
    values = torch.randn(model.d_head, generator=torch.Generator().manual_seed(0))
    closed = model.run(task, edits=[inject("1.1 2.0", values, gate=0.0)]).logits
    assert torch.equal(closed, model.run(task).logits)
    done = fit(model, task, inject("1.1 2.0", values, positions="END"), steps=20, lr=0.2, progress=False)
    gates = list(done.edits[0].gate.values())  # type: ignore[attr-defined]
    assert all(0 < float(gate) < 1 for gate in gates)
    assert done.scores.frame.score.tolist() == pytest.approx([float(gate) for gate in gates])
    half = literal.objective(model, done.train.split(0.8, 0)[1], [inject("1.1 2.0", values, 0.5, "END")], "loss")
    assert done.history.validation.iloc[0] == pytest.approx(half, abs=1e-4)


def test_several_edits_and_their_scores():
    model, task = tiny("llama"), tiny_task(12)
    given = [mk.steer("1.1"), mk.scale("1.1 2.0"), mk.ablate("0.0"), mk.attend("2.2", bias=0.0, keys=0), mk.steer("m1")]
    done = fit(model, task, given, steps=6, every=3, progress=False)
    assert isinstance(done.edit, tuple)
    assert done.edits[2] is given[2]
    frame = done.scores.frame.set_index("site")
    assert list(frame.index) == ["1.1", "2.0", "2.2", "m1"]
    steered, scaled = done.edits[0].vector[mk.site("1.1")], done.edits[1].alpha[mk.site("1.1")]  # type: ignore[attr-defined]
    assert frame.score["1.1"] == pytest.approx(float(torch.cat([steered, scaled - 1]).norm()), rel=1e-5)
    bias = next(iter(done.edits[3].value.values()))  # type: ignore[attr-defined]
    assert frame.score["2.2"] == pytest.approx(abs(float(bias)))
    assert set(map(str, done.scores.heads(3))) == {"1.1", "2.0", "2.2"}


def test_again_is_the_same():
    model, task = tiny("llama"), tiny_task(16)
    done = fit(model, task, mk.steer("1.1"), steps=5, every=2, lr=0.05, progress=False)
    again = done.again(done.train, progress=False)
    assert isinstance(again, Fit)
    assert again.history.equals(done.history)
    assert torch.equal(*(next(iter(one.edits[0].vector.values())) for one in (done, again)))  # type: ignore[attr-defined]
    assert again.held_out is done.held_out
    assert {*map(tuple, done.train.clean.tolist())}.isdisjoint(map(tuple, done.held_out.clean.tolist()))


def test_prompts_of_the_training_are_no_evidence():
    model, task = tiny("gpt2"), tiny_task(16)
    done = fit(model, task, mk.steer("1.1"), steps=2, progress=False)
    with pytest.raises(OptionError, match="11 of 16 held-out prompts are among those"):
        evaluate(model, task, done, controls=0, progress=False)
    other = evaluate(model, tiny_task(6, 8, seed=9), done, controls=0, progress=False)
    assert other.frame.condition.tolist() == ["none", "edit", "shuffled labels"]


def test_stopped_it_hands_over_what_there_is():
    calls = SimpleNamespace(n=0)

    def stops(logits, task):
        calls.n += 1
        if calls.n > 7:
            raise KeyboardInterrupt
        return logits[:, 5]

    task = tiny_task(16).with_metric(stops)
    with pytest.raises(Interrupted, match="of 50 steps") as caught:
        fit(tiny("gpt2"), task, mk.steer("1.1"), objective="metric", steps=50, every=2, progress=False)
    done = caught.value.scores
    assert isinstance(done, Fit)
    assert done.history.step.tolist()[0] == 0
    assert len(done.history) >= 2
    assert "Fit of 1 sites" in repr(done)


def test_shown():
    done = fit(tiny("gpt2"), tiny_task(16), mk.steer("1.1"), steps=2, progress=False)
    assert "validation" in repr(done)
    assert "<table" in done._repr_html_()
    assert done.meta["options"]["steps"] == 2
    assert done.scores.meta["n_heads"] == 4


def test_bad_input():
    model, task = tiny("gpt2"), tiny_task(16)
    with pytest.raises(EditError, match="Nothing to fit in Ablate"):
        fit(model, task, mk.ablate("1.1"))
    with pytest.raises(EditError, match="is no edit"):
        fit(model, task, ["1.1"])  # type: ignore[list-item]
    for changes in (
        {"steps": 0},
        {"batch": 0},
        {"every": 1.5},
        {"lr": 0},
        {"l1": -1},
        {"beta": "x"},
        {"objective": "best"},
    ):
        with pytest.raises(OptionError, match=next(iter(changes))):
            fit(model, task, mk.steer("1.1"), progress=False, **changes)
    with pytest.raises(TaskError, match="1 training prompts"):
        fit(model, task[:3], mk.steer("1.1"), fraction=0.3, progress=False)
    with pytest.raises(OptionError, match="leaves one side empty"):
        fit(model, task[:1], mk.steer("1.1"), progress=False)
    with pytest.raises(MetricError, match="no gradient"):
        fit(model, task.with_metric("correct_rate"), mk.steer("1.1"), objective="metric", progress=False)
    with pytest.raises(MetricError, match=r'gradient of vector of "1\.1" at step 0 is not finite'):
        fit(model, task.with_metric(_flat), mk.steer("1.1"), objective="metric", progress=False)


def _flat(logits, task):
    """0, with a gradient that is not a number."""
    return (logits[:, 5] * 0).sqrt()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_same_elsewhere(family, tmp_path):
    place = elsewhere.folder(tmp_path, family)
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    task = tiny_task(16)
    ours, theirs = (
        fit(one, task, mk.steer("1.1 2.0"), steps=6, every=2, controls=2, progress=False) for one in (far, own)
    )
    assert ours.history.to_numpy() == pytest.approx(theirs.history.to_numpy(), abs=1e-4, nan_ok=True)
    assert ours.scores.frame.score.to_numpy() == pytest.approx(theirs.scores.frame.score.to_numpy(), abs=1e-3)
    assert ours.report.effect == pytest.approx(theirs.report.effect, abs=1e-3)
