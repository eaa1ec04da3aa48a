"""Where code runs apart from the weights: whole passes over nnsight's envoys give what the engine gives."""

from __future__ import annotations

import functools

import elsewhere
import nnsight
import pytest
import torch
from families import FAMILIES, plain, tiny

import mechkit as mk
from mechkit.backends.anatomy import anatomy
from mechkit.backends.envoys import EnvoyBackend
from mechkit.errors import UnsupportedError
from mechkit.model import Model


@functools.cache
def apart(family: str) -> Model:
    hf = plain(family)
    return Model(EnvoyBackend(nnsight.NNsight(hf), anatomy(hf.config, family), family, hf.config))


@pytest.mark.parametrize("family", FAMILIES)
def test_runs(family):
    ours, theirs, task = apart(family), tiny(family), elsewhere.TASK()
    names = ["0.1", "0.2.q", "1.0.v", "m1", "resid.1", "resid.3", "embed"]
    edits = [mk.ablate("0.2", mode="mean", reference=task), mk.scale("m0", 0.5), mk.steer("resid.1", torch.ones(32), 1)]
    for more in ({}, {"edits": edits}):
        mine, its = ours.run(task, record=names, **more), theirs.run(task, record=names, **more)
        assert torch.allclose(mine.logits, its.logits, atol=1e-4)
        for name in names:
            assert torch.allclose(mine[name], its[name], atol=1e-4), name
    assert ours.backend.parallel == theirs.backend.parallel


@pytest.mark.parametrize("family", FAMILIES)
def test_patches(family):
    ours, theirs, task = apart(family), tiny(family), elsewhere.TASK()
    for what in ("heads mlps resid embed", "q k v"):
        elsewhere.same(*(mk.patch(one, task, what, progress=False) for one in (ours, theirs)))


@pytest.mark.parametrize("family", FAMILIES)
def test_paths(family):
    ours, theirs, task = apart(family), tiny(family), elsewhere.TASK()
    for receivers, more in (
        ("logits", {}),
        ("2.0.q 2.1.v 1.3.k", {"each": True}),
        ("2.0.q 2.1.v", {"through_mlps": False}),
        ("m2 2.2", {"senders": "heads mlps embed"}),
    ):
        elsewhere.same(*(mk.path_patch(one, task, receivers, progress=False, **more) for one in (ours, theirs)))


@pytest.mark.parametrize("family", FAMILIES)
def test_circuits_of_heads(family):
    ours, theirs, task = apart(family), tiny(family), elsewhere.TASK()
    mine, its = (mk.discover(one, task, method="patch", size=3) for one in (ours, theirs))
    assert list(map(str, mine.nodes)) == list(map(str, its.nodes))
    for ablation in ("mean", "resample"):
        found = [one.evaluate(model, task, ablation) for one, model in ((mine, ours), (its, theirs))]
        assert found[0].faithfulness == pytest.approx(found[1].faithfulness, abs=1e-3)


@pytest.mark.parametrize("family", elsewhere.FAMILIES)
def test_generation(family):
    elsewhere.generate(apart(family), tiny(family), elsewhere.TASK())


def test_what_cannot_be_had():
    model, task = apart("llama"), elsewhere.TASK()
    for ask in (
        lambda: mk.edges(model, task, progress=False),
        lambda: mk.decompose(model, task, progress=False),
        lambda: mk.HeadWeights.load(model),
        lambda: mk.patch(model, task, "patterns", progress=False),
        lambda: model.run(task, record="0.1.result"),
        lambda: model.generate(task.clean[:, :5], do_sample=True),
    ):
        with pytest.raises(UnsupportedError, match="apart from the model's weights"):
            ask()
