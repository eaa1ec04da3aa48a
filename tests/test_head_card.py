"""The page about one head: what is on it is what the analyses say, and it is drawn for every family."""

from __future__ import annotations

import numpy as np
import pytest
from families import tiny

import mechkit as mk
from mechkit import errors


def test_says_what_the_analyses_say():
    model = tiny("llama")
    card = mk.head_card(model, "1.2", sample=97, partners=2)
    circuits = mk.token_circuits(model, "1.2", pairs=8, progress=False)
    assert card.scores["copying (top 5)"] == circuits.copying()
    assert card.scores["positive eigenvalues"] == pytest.approx(circuits.eigenvalues)
    assert card.pairs["score"].to_numpy() == pytest.approx(circuits.pairs["score"].to_numpy())
    run = model.run(np_ids(len(card.tokens)), record=["1.2.pattern"])
    assert np.allclose(card.pattern, run["1.2.pattern"][0])
    assert card.scores["looks at itself"] == pytest.approx(float(run["1.2.pattern"][0].diagonal()[1:].mean()))
    for direction, kind, there in (("hears", "k", "sender"), ("speaks to", "v", "receiver")):
        ends = (None, ["1.2"]) if direction == "hears" else (["1.2"], None)
        pairs = mk.composition(model, *ends, kind=kind).pairs().nlargest(2, "top_z")
        rows = card.partners.query("direction == @direction and kind == @kind")
        assert rows["head"].tolist() == pairs[there].astype(str).tolist()
        assert np.allclose(rows["z"], pairs["top_z"])
    tokens = mk.svd(model, "1.2").tokens(0, 5)
    assert card.directions.query("component == 0")["token"].tolist() == tokens["token"].tolist()
    assert "1.2" in repr(card)


def np_ids(n):
    import torch

    return torch.arange(1, n + 1)[None]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt-oss"])
def test_is_drawn(family, tmp_path):
    card = mk.head_card(tiny(family), "1.2", sample=20, components=2)
    figure = card.plot()
    figure.savefig(tmp_path / "card.png", dpi=40)
    words = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
    for claim in ("copying", "suppression", "speaks to", "component 1"):
        assert claim in words
    assert "Head 1.2" in figure.get_suptitle()
    assert card._repr_png_().startswith(b"\x89PNG")


def test_first_and_last_layer_have_one_side():
    first, last = (mk.head_card(tiny("gpt2"), head, sample=10) for head in ("0.0", "2.3"))
    assert set(first.partners["direction"]) == {"speaks to"}
    assert set(last.partners["direction"]) == {"hears"}
    assert any("no head" in text.get_text() for axes in first.plot().axes for text in axes.texts)


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ({"head": "5.0"}, errors.SiteError, "5.0"),
        ({"sample": 0}, errors.OptionError, "sample"),
        ({"components": -1}, errors.OptionError, "components"),
        ({"partners": 1.5}, errors.OptionError, "partners"),
        ({"prompt": "words"}, errors.PromptError, "tokenizer"),
    ],
)
def test_bad_input(how, kind, told):
    with pytest.raises(kind, match=told):
        mk.head_card(tiny("llama"), **{"head": "1.2", **how})
