"""A running NDIF that does not trust the key: code runs apart from the model's weights."""

from __future__ import annotations

import json

import elsewhere
import pytest
import torch
from service import running, tiny

import mechkit as mk
from mechkit.errors import UnsupportedError

pytestmark = running


@pytest.fixture(autouse=True)
def untrusted(monkeypatch):
    """As it would be for a key without the service's trust; one that asks nobody lets the client say so."""
    from nnsight.schema.request import RequestModel

    plain = RequestModel.metadata
    monkeypatch.setattr(
        RequestModel, "metadata", lambda self: json.dumps({**json.loads(plain(self)), "trusted": False})
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_same_there_and_here(family):
    far, own = tiny(family)
    task = elsewhere.TASK()
    edits = [mk.ablate("0.2", mode="mean", reference=task), mk.scale("m0", 0.5)]
    ours, theirs = (one.run(task, record="1.1.q m1", edits=edits) for one in (far, own))
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-4)
    assert torch.allclose(ours["1.1.q"], theirs["1.1.q"], atol=1e-4)
    elsewhere.same(*(mk.patch(one, task, "heads mlps", progress=False) for one in (far, own)))
    elsewhere.same(*(mk.path_patch(one, task, "2.0.q", progress=False) for one in (far, own)))


def test_what_cannot_be_had():
    far, _ = tiny("gpt2")
    with pytest.raises(UnsupportedError, match="apart from the model's weights"):
        mk.edges(far, elsewhere.TASK(), progress=False)
