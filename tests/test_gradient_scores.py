"""Scores by gradients: one pass gives what autograd gives of the Hub's own model, prompt by prompt."""

from __future__ import annotations

import elsewhere
import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, tiny, tiny_task, untouched
from reference.gradients import gates, loss, query_norms

import mechkit as mk
from mechkit import errors
from mechkit.head_scores.causal import leave_one_out
from mechkit.head_scores.gradient import fisher, gate_gradient


def ids(n: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(5))


def numbers(scores, column: str = "score") -> np.ndarray:
    return scores.frame[column].to_numpy(dtype=float)


def close(found: np.ndarray, literal: torch.Tensor) -> bool:
    assert literal.abs().max() > 0
    return np.allclose(found, literal.flatten().numpy(), atol=1e-3 * float(literal.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_gates(family):
    literal = gates(untouched(family), ids(), loss)
    each = gate_gradient(tiny(family), ids(), absolute=False, each=True, progress=False)
    assert close(numbers(each), literal)
    assert close(numbers(gate_gradient(tiny(family), ids(), progress=False)), literal.abs().mean(-1))
    assert close(numbers(gate_gradient(tiny(family), ids(), absolute=False, progress=False)), literal.mean(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_fisher(family):
    literal = query_norms(untouched(family), ids(), loss)
    whole = fisher(tiny(family), ids(), normalise=False, each=True, progress=False)
    assert close(numbers(whole), literal)
    trace = literal.mean(-1)
    shares = fisher(tiny(family), ids(), progress=False)
    assert close(numbers(shares), trace / trace.sum(-1, keepdim=True))
    assert shares.frame.groupby("layer").score.sum().to_numpy() == pytest.approx(1)


@pytest.mark.parametrize("metric", ["logit_diff", "prob", "loss"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
def test_of_a_task(family, metric):
    task = mk.Task.join([tiny_task(3, 9, seed=1), tiny_task(2, 5, seed=2)]).with_metric(metric)
    prompts = [task[[i]] for i in range(5)]

    def literal(of) -> torch.Tensor:
        return torch.cat(
            [
                of(
                    untouched(family),
                    one.clean,
                    lambda logits, _, one=one: one.metric(
                        logits[:, -1].gather(1, one.answers) if one.metric.reads == "answers" else logits[:, -1], one
                    )[0],
                )
                for one in prompts
            ],
            -1,
        )

    found = gate_gradient(tiny(family), task, absolute=False, each=True, progress=False)
    assert close(numbers(found), literal(gates))
    assert found.unit == task.metric.unit
    assert close(numbers(fisher(tiny(family), task, normalise=False, each=True, progress=False)), literal(query_norms))


def test_is_the_slope_of_taking_a_head_out():
    model, small = tiny("llama"), 1e-2
    slope = gate_gradient(model, tiny_task(), absolute=False, progress=False)
    for head in ("0.1", "2.3"):
        more, less = (
            mk.metrics.logit_diff(model.run(tiny_task(), edits=[mk.scale(head, 1 + step)]).logits, tiny_task()).mean()
            for step in (small, -small)
        )
        found = slope.frame.set_index("site").score[head]
        assert found == pytest.approx(float(more - less) / (2 * small), rel=0.02, abs=1e-3)


def test_in_a_linear_model_the_slope_is_all():
    planted = mk.planted.linear()
    slope = gate_gradient(planted.model, planted.task, absolute=False, progress=False)
    out = leave_one_out(planted.model, planted.task, heads="1.0", progress=False)
    found = slope.frame.set_index("site").score["1.0"]
    assert found == pytest.approx(-float(out.frame.score[0]), rel=1e-3)


def test_padding_is_not_counted():
    from mechkit.head_scores.gradient import _measured

    model, task = tiny("gemma2"), mk.Task.join([tiny_task(2, 9, seed=1), tiny_task(2, 8, seed=2)])
    for what, score in (("gate", gate_gradient), ("query", fisher)):
        options = {"absolute": False} if what == "gate" else {"normalise": False}
        together = _measured(model, task.clean, task.lengths, None, what, False)
        for i in range(4):
            alone = score(model, task.clean[i, : task.lengths[i]], progress=False, **options)
            assert close(numbers(alone), together[..., i])


@pytest.mark.parametrize("family", elsewhere.FAMILIES)
def test_the_same_elsewhere(tmp_path, family):
    place = elsewhere.folder(tmp_path, family)
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    for call in (gate_gradient, fisher):
        for data in (ids(), elsewhere.TASK()):
            elsewhere.same(call(far, data, progress=False), call(own, data, progress=False))


def test_nothing_is_left_behind():
    model = tiny("llama")
    parameters = list(model.hf.parameters())
    asking = [p.requires_grad for p in parameters]
    fisher(model, ids(), progress=False)
    assert [p.requires_grad for p in parameters] == asking
    assert all(p.grad is None for p in parameters)


def test_bad_input():
    model = tiny("llama")
    with pytest.raises(errors.MetricError, match="kl"):
        gate_gradient(model, tiny_task().with_metric("kl"))
    with pytest.raises(errors.MetricError, match="no gradient"):
        gate_gradient(model, tiny_task().with_metric(lambda logits, task: logits.argmax(-1).float()), progress=False)
    with pytest.raises(errors.MetricError, match="layer 0"):
        fisher(model, tiny_task().with_metric(lambda logits, task: 0 * logits[:, 0]), progress=False)
    with pytest.raises(errors.PromptError, match="single token"):
        fisher(model, ids(length=1))
