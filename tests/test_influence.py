"""What a text's tokens cost without some heads: whole runs of the Hub's own model."""

from __future__ import annotations

import elsewhere
import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, tiny, tiny_task, untouched
from reference.ablations import mean_loss, without

import mechkit as mk
from mechkit import errors
from mechkit.head_scores.influence import Influence, attention_influence, token_loss

OUT = [(0, 1), (1, 2), (1, 3)]


def ids(n: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", [one for one in FAMILIES if one != "gpt-oss"])
def test_is_that_of_whole_runs(family):
    model = untouched(family)
    base, masked = (mean_loss(without(model, ids(), heads, "uniform"), ids()) for heads in ([], OUT))
    found = attention_influence(tiny(family), ids(), heads=OUT, controls=2, seed=3, progress=False)
    assert found.frame.base_loss.to_numpy() == pytest.approx(base.numpy(), abs=1e-4)
    assert found.frame.masked_loss.to_numpy() == pytest.approx(masked.numpy(), abs=1e-4)
    assert found.frame.score.to_numpy() == pytest.approx(((masked - base) / base).numpy(), abs=1e-4)
    random = []
    for drawn in found.meta["random_heads"]:
        heads = [(one.layer, one.head) for one in mk.heads(drawn)]
        assert mk.heads(drawn).per_layer() == {0: 1, 1: 2}
        random.append(mean_loss(without(model, ids(), heads, "uniform"), ids()) / base - 1)
    assert found.frame.random_mean.to_numpy() == pytest.approx(torch.stack(random).mean(0).numpy(), abs=1e-4)
    assert found.frame.random_max.to_numpy() == pytest.approx(torch.stack(random).amax(0).numpy(), abs=1e-4)
    assert found.frame.random_min.to_numpy() == pytest.approx(torch.stack(random).amin(0).numpy(), abs=1e-4)
    assert set(found.frame.n) == {8}


def test_tokens_of_a_text_make_up_its_loss():
    model = tiny("llama")
    task = mk.Task.join([tiny_task(2, 9, seed=1), tiny_task(2, 5, seed=2)])
    found = attention_influence(model, task, heads=OUT, controls=0, ablation="zero", progress=False)
    assert found.frame.random_mean.isna().all()
    for i, length in enumerate(task.lengths.tolist()):
        tokens = found.tokens(i).frame
        assert len(tokens) == length
        row = found.frame.iloc[i]
        assert tokens.rest.sum() / (length - 1) == pytest.approx(row.base_loss, abs=1e-5)
        assert (tokens.score + tokens.rest).sum() / (length - 1) == pytest.approx(row.masked_loss, abs=1e-5)
        alone = token_loss(model, task.clean[i, :length], heads=OUT, ablation="zero").frame
        assert alone.score.to_numpy() == pytest.approx(tokens.score.to_numpy(), abs=1e-4)
        assert (alone.score[0], alone.n[0]) == (0, 0)
        assert np.abs(alone.score[1:]).max() > 1e-2


def test_tokens_are_pieces_of_the_text(tmp_path):
    model = mk.load(elsewhere.folder(tmp_path, "llama"), device="cpu")
    text = "w5 w9 w12 w9"
    found = attention_influence(model, [text, "w7 w8"], heads="0.1", progress=False).tokens()
    assert "".join(found.frame.token) == found.meta["text"] == text
    assert "w12" in found._repr_html_()
    assert token_loss(model, text, heads="0.1").frame.equals(found.frame)


def test_saved_and_loaded(tmp_path):
    found = attention_influence(tiny("gpt2"), ids(), heads=OUT, controls=1, progress=False)
    loaded = Influence.load(found.save(tmp_path / "found.csv"))
    assert np.allclose(loaded.frame, found.frame)
    assert loaded.meta["heads"] == ["0.1", "1.2", "1.3"]
    with pytest.raises(errors.OptionError, match="just measured"):
        loaded.tokens()
    with pytest.raises(errors.OptionError, match="0 to 2"):
        found.tokens(3)


@pytest.mark.parametrize("family", elsewhere.FAMILIES)
def test_the_same_elsewhere(tmp_path, family):
    place = elsewhere.folder(tmp_path, family)
    far, own = (
        attention_influence(mk.load(place, **where), ids(), heads=OUT, progress=False)
        for where in ({"remote": "local"}, {"device": "cpu"})
    )
    assert np.allclose(far.frame, own.frame, atol=1e-4)
    assert np.allclose(far.tokens(1).frame.score, own.tokens(1).frame.score, atol=1e-4)


def test_bad_input():
    model = tiny("llama")
    with pytest.raises(errors.SiteError, match="No heads"):
        attention_influence(model, ids(), heads=[])
    with pytest.raises(errors.OptionError, match="controls"):
        attention_influence(model, ids(), heads=OUT, controls=-1)
    with pytest.raises(errors.OptionError, match="ablation"):
        attention_influence(model, ids(), heads=OUT, ablation="mean")  # type: ignore[arg-type]
    with pytest.raises(errors.PromptError, match="single token"):
        token_loss(model, ids()[0, :1], heads=OUT)
    with pytest.raises(errors.PromptError, match="one text"):
        token_loss(model, ids(), heads=OUT)
