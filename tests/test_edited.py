"""A task's metric under edits, the layers before the edit skipped, is that of whole runs."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny, tiny_task

import mechkit as mk
from mechkit import errors
from mechkit.patching.edited import EditedRuns


def _task(metric="logit_diff"):
    """Prompts of two lengths."""
    task = mk.Task.join([tiny_task(3, 9, seed=1), tiny_task(2, 7, seed=2)])
    return task.with_metric(metric)


def _whole(model, task, edits):
    return torch.stack([_one(model, task[[i]], edits) for i in range(len(task))])


def _one(model, task, edits):
    n = int(task.lengths[0])
    logits, own = (model.run(task.clean[:, :n], edits=some).logits[:, -1] for some in (edits, ()))
    if task.metric.reads == "answers":
        logits = logits.gather(1, task.answers)
    return task.metric(logits, task, own)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_whole_run(family):
    model, task = tiny(family), _task()
    runs = EditedRuns(model, task)
    turn = torch.linalg.qr(torch.randn(model.d_head, model.d_head, generator=torch.Generator().manual_seed(0))).Q
    assert torch.allclose(runs.clean, _whole(model, task, ()), atol=1e-4)
    for edits in (
        [mk.transform("1.2", turn)],
        [mk.ablate("2.0"), mk.scale("1.1.q", 0.3)],
        [mk.scale("m0", 0.5), mk.steer("resid.2", torch.ones(model.d_model), 0.2)],
        [mk.steer("resid.3", torch.arange(model.d_model) / 50)],
    ):
        assert torch.allclose(runs.metric(edits), _whole(model, task, edits), atol=1e-4)
    assert torch.allclose(runs.metric([mk.scale("0.0", 1.0)]), runs.clean, atol=1e-5)


@pytest.mark.parametrize("metric", ["prob", "loss", "kl"])
def test_every_metric(metric):
    model, task = tiny("llama"), _task(metric)
    runs, edits = EditedRuns(model, task), [mk.ablate("1.0")]
    assert torch.allclose(runs.metric(edits), _whole(model, task, edits), atol=1e-5)
    if metric == "kl":
        assert runs.clean.abs().max() < 1e-6 < float(runs.corrupt.mean())


def test_the_embedding_is_refused():
    with pytest.raises(errors.EditError, match=r"resid\.0"):
        EditedRuns(tiny("llama"), _task()).metric([mk.scale("embed", 0.0)])
