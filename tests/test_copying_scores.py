"""Copying by all heads over a sample of tokens is what the circuits of one head say of these tokens."""

from __future__ import annotations

import elsewhere
import pytest
import torch
from families import VOCAB, tiny, tiny_task

import mechkit as mk
from mechkit import errors, planted
from mechkit.head_scores.copying import copying, drawn


@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox", "granite"])
def test_it_is_the_token_circuits(family, effective):
    model = tiny(family)
    some = drawn(model, None, 40, seed=1)
    found = copying(model, tokens=40, k=7, seed=1, effective=effective, progress=False).frame.set_index("site")
    for head in ("0.0", "1.2", "2.3"):
        own = mk.token_circuits(
            model, head, tokens=some, embedding="effective" if effective else "embed", pairs=0, progress=False
        )
        assert found["score"][head] == pytest.approx(own.copying(7))
        assert found["suppression"][head] == pytest.approx(own.suppression(10))
        assert found["own"][head] == pytest.approx(own.frame["score"].mean(), rel=1e-3, abs=1e-4)
        assert found["n"][head] == 40
    assert 0 < found["score"].max() < 1
    assert 0 < found["suppression"].max() < 1


def test_planted_copiers_copy():
    circuit = planted.backup()
    found = copying(circuit.model, k=1, suppressed=1, effective=False, progress=False).frame.set_index("site")
    items = 8 / 12  # they copy the items alone; of other tokens they write nothing
    assert found.loc[["1.0", "2.0"], "score"].to_numpy() == pytest.approx(items)
    assert found["score"].drop(["1.0", "2.0"]).max() < items


def test_some_heads_and_tokens():
    model = tiny("llama")
    every = copying(model, progress=False)
    assert every.meta["options"]["tokens"] == VOCAB
    some = copying(model, heads="2.1 0.3", progress=False)
    assert some.frame["site"].tolist() == ["2.1", "0.3"]
    for row in some.frame.itertuples():
        assert row.score == every.frame.set_index("site")["score"][row.site]
    task = tiny_task()
    assert drawn(model, task, 999, 0).tolist() == task.clean.unique().tolist()
    assert drawn(model, torch.tensor([5, 5, 9]), 999, 0).tolist() == [5, 9]
    assert len(drawn(model, None, 10, 0).unique()) == 10
    assert copying(model, task, tokens=5, progress=False).frame["n"].eq(5).all()


def test_the_same_elsewhere(tmp_path):
    place = elsewhere.folder(tmp_path, "gemma2")
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    ours, theirs = (copying(one, progress=False) for one in (far, own))
    elsewhere.same(ours, theirs)
    elsewhere.same(ours, theirs, "suppression")


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ({"tokens": 0}, errors.OptionError, "tokens = 0"),
        ({"k": 0}, errors.OptionError, "k = 0"),
        ({"suppressed": 1.5}, errors.OptionError, "suppressed = 1.5"),
        ({"heads": "9.9"}, errors.SiteError, "9.9"),
    ],
)
def test_bad_options(how, kind, told):
    with pytest.raises(kind, match=told):
        copying(tiny("llama"), progress=False, **how)
