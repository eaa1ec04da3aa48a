"""Edge attribution at work: precision, modes, batches, what is left behind, long work and bad input."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from families import plain, tiny, tiny_task

import mechkit as mk
from mechkit.backends import products
from mechkit.errors import Interrupted, MetricError, OptionError, StorageError
from mechkit.patching import attribution
from mechkit.patching.edges import edges

# -- precision, modes, what is left behind ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "phi", "llama", "gemma2", "gpt-oss"])
def test_an_mlps_own_backward_pass_is_what_is_left_of_the_streams(family, monkeypatch):
    model, task = tiny(family), tiny_task(n=2)
    difference = edges(model, task, progress=False).matrix()
    monkeypatch.setattr(products, "_HALF", (torch.float32,))
    np.testing.assert_allclose(edges(model, task, progress=False).matrix(), difference, atol=1e-5 * 10)


def test_half_precision_is_near():
    task = tiny_task(n=4)
    half = mk.load((plain("llama", dtype=torch.bfloat16), None), device="cpu")
    single = mk.load((plain("llama", dtype=torch.bfloat16).float(), None), device="cpu")
    here, there = (np.nan_to_num(edges(m, task, progress=False).matrix()) for m in (half, single))
    assert np.corrcoef(here.ravel(), there.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_callers_mode_does_not_matter_and_nothing_is_left_behind(mode):
    model, task = tiny("gemma2"), tiny_task(n=2)
    parameter = next(model.hf.parameters())
    parameter.requires_grad_(False)
    before = [p.requires_grad for p in model.hf.parameters()], model.run(task.clean).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.bridge.modules())
    every = {"ungroup": True, "correction": "atp*", "gradients": "relp", "progress": False}
    expected = edges(model, task, **every).matrix()
    with mode():
        np.testing.assert_array_equal(edges(model, task, **every).matrix(), expected)
    assert [p.requires_grad for p in model.hf.parameters()] == before[0]
    assert all(p.grad is None for p in model.hf.parameters())
    torch.testing.assert_close(model.run(task.clean).logits, before[1], atol=0, rtol=0)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.bridge.modules()) == hooks
    parameter.requires_grad_(True)


def test_no_tensor_is_kept():
    model, task = tiny("llama"), tiny_task(n=2)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())

    edges(model, task, ungroup=True, correction="atp*", progress=False)
    before = tensors()
    edges(model, task, ungroup=True, correction="atp*", progress=False)
    assert tensors() == before


def test_batches_do_not_matter(monkeypatch):
    model, task = tiny("llama"), tiny_task(n=5)
    whole = edges(model, task, "eap-ig", steps=3, ungroup=True, progress=False)
    monkeypatch.setattr(attribution, "fitting", lambda each, device, at_most: min(2, at_most))
    monkeypatch.setattr(products, "fitting", lambda each, device, at_most: min(4, at_most))
    parts = edges(model, task, "eap-ig", steps=3, ungroup=True, progress=False)
    np.testing.assert_allclose(parts.matrix(), whole.matrix(), atol=1e-5)
    np.testing.assert_allclose(parts.matrix("se"), whole.matrix("se"), atol=1e-5)


# -- long work and bad input ------------------------------------------------------------------------------------------


def stopping_after(batches: int, monkeypatch) -> None:
    own, count = attribution.products, [0]

    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] > batches:
            raise KeyboardInterrupt
        return own(*args, **kwargs)

    monkeypatch.setattr(attribution, "products", counted)


def test_stopped_work_goes_on_bit_for_bit(tmp_path, monkeypatch):
    model, tasks = tiny("llama"), [tiny_task(n=2, first=first, seed=first) for first in (1, 3, 5)]
    monkeypatch.setattr(attribution._Work, "tokens", lambda *_: 36)
    whole = edges(model, tasks, "eap-ig", steps=2, progress=False)
    path = tmp_path / "edges.npz"
    with monkeypatch.context() as patch:
        stopping_after(2, patch)
        with pytest.raises(Interrupted, match="Stopped after") as stopped:
            edges(model, tasks, "eap-ig", steps=2, checkpoint=path, progress=False)
    part = stopped.value.scores
    assert 0 < part.frame["n"].max() < 6
    again = edges(model, tasks, "eap-ig", steps=2, checkpoint=path, progress=False)
    assert again.frame.equals(whole.frame)
    with pytest.raises(StorageError, match="method differ"):
        edges(model, tasks, "eap-ig", steps=3, checkpoint=path, progress=False)
    with monkeypatch.context() as patch:
        stopping_after(0, patch)
        with pytest.raises(Interrupted, match="before the first prompts"):
            edges(model, tasks, progress=False)


def test_bad_input_is_told():
    model, task = tiny("gpt2"), tiny_task()
    for options, words in (
        ({"method": "acdc"}, "eap-ig"),
        ({"direction": "up"}, "denoise"),
        ({"steps": 0}, "whole number"),
        ({"steps": 2.5}, "whole number"),
        ({"correction": "atp"}, "atp"),
        ({"gradients": "lrp"}, "relp"),
        ({"method": "eap-ig", "correction": "atp*"}, '"eap"'),
    ):
        with pytest.raises(OptionError, match=words):
            edges(model, task, **options, progress=False)
    with pytest.raises(MetricError, match="no gradient"):
        edges(model, task.with_metric(lambda logits, task: (logits.argmax(-1) == 3).float()), progress=False)
    with pytest.raises(MetricError, match="alike"):
        edges(model, task.with_metric(lambda logits, task: logits.sum(-1) * 0), progress=False)


@pytest.mark.real_model
def test_on_the_real_model(smollm2, ioi):
    found = edges(smollm2, ioi[:8], "eap-ig", steps=3, progress=False)
    assert len(found) == len(smollm2.graph())
    heads = {str(head) for head in found.heads(12)}
    assert {"23.3", "29.1"} & heads
