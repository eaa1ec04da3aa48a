"""Token circuits: against whole matrices on every family, and on heads whose job is planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, plain, tiny
from reference.token_circuits import ov_circuit, qk_circuit

import mechkit as mk
from mechkit import errors
from mechkit.planted.draft import VOCAB as ROOMY
from mechkit.planted.draft import Draft, content, position, same, value
from mechkit.weights import token_circuits as module
from mechkit.weights.vocabulary import Vocabulary

NORM_BEHIND = ("gemma2", "gemma3", "olmo2")
QK_NORM = ("qwen3", "gemma3", "olmo2")
EVERY = torch.arange(VOCAB)


def _correlation(a, b):
    """Row by row: the scale of a row is a convention."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_whole_matrix(family, monkeypatch):
    model = tiny(family)
    monkeypatch.setattr(module, "_NUMBERS", 7 * VOCAB)  # strips of seven rows, the last one shorter
    found = mk.token_circuits(model, "1.2", query="effective", pairs=5, progress=False)
    sources = Vocabulary.of(model).directions("effective", EVERY)
    assert found.frame["id"].tolist() == list(range(VOCAB))
    if family not in NORM_BEHIND:
        ov = ov_circuit(model, 1, 2, sources)
        own = ov.diagonal() - ov.mean(1)
        torch.testing.assert_close(
            torch.tensor(found.frame["score"]).float(), own, rtol=2e-3, atol=2e-3 * float(own.std())
        )
        for column, ranks in (("promoted", ov > ov.diagonal()[:, None]), ("suppressed", ov < ov.diagonal()[:, None])):
            assert np.abs(found.frame[column] - ranks.sum(1).numpy()).max() <= 1  # two logits that all but tie
        largest = ov.flatten().sort(descending=True).values
        top = found.pairs.query("circuit == 'ov' and end == '+'")
        assert np.allclose(top["score"], largest[:5], rtol=2e-3)
        for row in top.itertuples():
            assert ov[int(row.source), int(row.destination)] == pytest.approx(row.score, rel=2e-3)
        # The eigenvalues of the whole matrix without what the bias of values adds to every row.
        linear = ov_circuit(model, 1, 2, sources) - _of_bias(model, sources)
        values = torch.linalg.eigvals((linear - linear.mean(1, keepdim=True)).double())
        assert found.eigenvalues == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=5e-3)
    if family not in QK_NORM:
        qk = qk_circuit(model, 1, 2, sources, sources)
        ranks = (qk > qk.diagonal()[:, None]).sum(1).numpy()
        assert np.abs(found.frame["attended"] - ranks).max() <= 1
        lowest = found.pairs.query("circuit == 'qk' and end == '-'")
        assert np.allclose(lowest["score"], qk.flatten().sort().values[:5], rtol=2e-3)
        for row in lowest.itertuples():
            assert qk[int(row.destination), int(row.source)] == pytest.approx(row.score, rel=2e-3)


def _of_bias(model, sources):
    """What biases add to each row: of values, and of the norm in front."""
    weights = mk.HeadWeights.load(model)
    bias = weights.of_bias("v", mk.site("1.2"))
    if bias is None:
        return torch.zeros(1)
    return Vocabulary.of(model).logits(bias @ weights.W_O[1, 2])


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "neox", "mixtral", "falcon", "cohere", "qwen3"])
def test_embeddings_are_what_the_model_has(family):
    """Of families without learned positions and without b_O, whose first block can be run with heads at zero."""
    model = tiny(family)
    run = model.run(EVERY[:, None], record=["resid.0", "resid.1"], edits=[mk.ablate(f"0.{i}") for i in range(4)])
    vocabulary = Vocabulary.of(model)
    torch.testing.assert_close(vocabulary.directions("embed", EVERY), run["resid.0"][:, 0])
    if model.backend.branches.bias("o", 0) is None:
        effective = vocabulary.directions("effective", EVERY)
        torch.testing.assert_close(effective, run["resid.1"][:, 0], rtol=1e-4, atol=1e-4)


def test_learned_positions_are_left_out():
    model = tiny("gpt2")
    rows = Vocabulary.of(model).directions("embed", EVERY)
    torch.testing.assert_close(rows, model.hf.transformer.wte.weight.detach())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "cohere", "phi"])
def test_logits_of_a_write_are_the_readout_s(family):
    """What a vector does to the logits is, up to one number, what the last norm and the unembedding do to it."""
    model = tiny(family)
    vocabulary = Vocabulary.of(model)
    draw = torch.Generator().manual_seed(0)
    x, small = (torch.randn(model.d_model, generator=draw) for _ in "xy")
    matrix = model.hf.get_output_embeddings().weight.detach()
    with torch.no_grad():
        norm = model.bridge.ln_final
        unscaled = (norm(x) - norm(torch.zeros_like(x))) @ matrix.T
    assert float(_correlation(vocabulary.logits(x), unscaled)) > 1 - 1e-5
    unembed = vocabulary.directions("unembed", EVERY)
    raised = vocabulary.logits(small)
    torch.testing.assert_close(unembed @ small, raised - raised.mean(), rtol=1e-3, atol=1e-3)


def _looks_for_what_is_predicted(draft, sign):
    """Give head 1.2 a query that asks for what the logits have so far, and have it write what it finds, with a sign."""
    tokens = same(range(ROOMY))
    draft.head(
        1,
        2,
        q={"out": content(tokens, "out")},
        k={"tok": content(tokens, "tok")},
        v={"tok": value(tokens, "tok")},
        o={"out": value(tokens, "out", sign).T},
    )


def _planted(sign):
    draft = Draft(seed=3, grouped=False)
    _looks_for_what_is_predicted(draft, sign)
    return draft.finished("planted-copying")


def _own_logits(found):
    """Over the last norm's gain, whose scale, one over it on every stream of a planted model, is not in the scores."""
    return found.frame["score"].to_numpy() / 2.0**13


def test_planted_copying():
    found = mk.token_circuits(_planted(1.0), "1.2", progress=False)
    assert found.copying(1) == 1.0
    assert found.suppression(5) == 0.0
    assert found.attends_itself(1) == 1.0
    assert found.eigenvalues == pytest.approx(1.0, abs=1e-5)
    assert _own_logits(found) == pytest.approx(1 - 1 / ROOMY, abs=1e-5)


def test_planted_suppression():
    found = mk.token_circuits(_planted(-1.0), "1.2", progress=False)
    assert found.suppression(1) == 1.0
    assert found.copying(5) == 0.0
    assert found.eigenvalues == pytest.approx(-1.0, abs=1e-5)
    assert _own_logits(found) == pytest.approx(1 / ROOMY - 1, abs=1e-5)


def _silent():
    """A head that writes nothing."""
    model = _planted(1.0)
    model.hf.model.layers[2].self_attn.o_proj.weight.data[:, 48:] = 0
    return model


def test_distractors_do_neither():
    found = mk.token_circuits(_planted(1.0), "2.0", progress=False)
    assert np.abs(_own_logits(found)).max() < 1e-5  # what it writes, all logits get alike
    silent = mk.token_circuits(_silent(), "2.3", progress=False)  # ties are no promotion
    assert silent.copying(5) == silent.suppression(5) == 0.0
    assert silent.eigenvalues == 0.0


def test_some_tokens_are_those_rows():
    model = tiny("llama")
    whole = mk.token_circuits(model, "2.1", progress=False).frame
    some = mk.token_circuits(model, "2.1", tokens=[5, 3, 90], pairs=0, progress=False)
    for row in some.frame.itertuples():
        assert whole.loc[row.id, "promoted"] == row.promoted
        assert whole.loc[row.id, "attended"] == row.attended
    assert some.pairs.empty
    assert some.summary.keys() == mk.token_circuits(model, "2.1", progress=False).summary.keys()


def test_distance_turns_the_query():
    model = tiny("llama")
    here, there = (mk.token_circuits(model, "1.2", offset=n, progress=False).frame["attended"] for n in (0, 3))
    assert (here != there).any()


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_saved_and_loaded_is_the_same(suffix, tmp_path):
    found = mk.token_circuits(tiny("llama"), "1.2", pairs=3, progress=False)
    again = mk.TokenCircuits.load(found.save(tmp_path / f"circuits{suffix}"))
    assert again.summary == pytest.approx(found.summary, rel=1e-5)
    assert again.pairs.astype(str).equals(found.pairs.astype(str))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_half_precision(family, dtype):
    """Of half-precision weights, what full precision makes of the same."""
    half = mk.load((plain(family, dtype=dtype), None), device="cpu")
    full = mk.load((plain(family, dtype=dtype).float(), None), device="cpu")
    own, same = (mk.token_circuits(one, "1.2", progress=False) for one in (half, full))
    assert np.corrcoef(own.frame["score"], same.frame["score"])[0, 1] > 0.99
    assert own.eigenvalues == pytest.approx(same.eigenvalues, abs=0.05)
    assert torch.allclose(mk.svd(half, "1.2").S, mk.svd(full, "1.2").S, rtol=1e-4)
    first, second = (mk.svd(one, "1.2", "qk", offset=2).S for one in (half, full))
    assert torch.allclose(first, second, rtol=0.05, atol=0.02 * float(second[0]))
    edit, tokens = mk.svd(half, "1.2").remove(0), torch.arange(1, 7)[None]
    with mk.edit_weights(half, edit):
        in_weights = half.run(tokens).logits.float()
    assert torch.allclose(half.run(tokens, edits=[edit]).logits.float(), in_weights, atol=0.15)


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ({"head": "9.0"}, errors.SiteError, '"9.0"'),
        ({"embedding": "unembed"}, errors.OptionError, "unembed"),
        ({"query": "logits"}, errors.OptionError, "logits"),
        ({"tokens": [VOCAB]}, errors.OptionError, f"0 to {VOCAB - 1}"),
        ({"tokens": []}, errors.OptionError, "at least one"),
        ({"pairs": -1}, errors.OptionError, "-1"),
        ({"offset": 1000}, errors.OptionError, "1000"),
    ],
)
def test_bad_input(how, kind, told):
    with pytest.raises(kind, match=told):
        mk.token_circuits(tiny("llama"), **{"head": "1.2", "progress": False, **how})


def test_bad_count():
    found = mk.token_circuits(tiny("llama"), "1.2", progress=False)
    with pytest.raises(errors.OptionError, match="k = 0"):
        found.copying(0)


# -- copy suppression as the whole of a head's job ------------------------------------------------------------


def _suppressor(sign=-1.0):
    """Layer 0 predicts the token before; layer 1 looks for what is predicted and takes it away."""
    draft = Draft(seed=4, grouped=False)
    tokens = same(range(ROOMY))
    draft.head(
        0,
        1,
        q={"one": position(1)},
        k={"one": position(0)},
        v={"tok": value(tokens, "tok")},
        o={"out": value(tokens, "out").T},
    )
    _looks_for_what_is_predicted(draft, sign)
    return draft.finished("planted-suppressor")


def _prompts(n=12, length=8):
    draw = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(ROOMY - 2, generator=draw)[:length] + 2 for _ in range(n)])


def test_a_suppressor_is_explained_whole():
    found = mk.copy_suppression(_suppressor(), "1.2", _prompts(), progress=False)
    later = found.frame[found.frame["position"] > 1]  # at 1 what is predicted is the first token, which is never kept
    assert later["ablated"].min() > 1e-4
    assert 1 - later["score"].sum() / later["ablated"].sum() > 0.999
    assert (later["kept"] == 1).all()
    low, high = found.interval
    assert low <= found.explained <= high


def test_a_copier_is_not_explained():
    found = mk.copy_suppression(_suppressor(1.0), "1.2", _prompts(), progress=False)
    assert found.explained < 0.1  # of what it adds to its own tokens nothing is kept


def test_similar_tokens_stand_for_a_token():
    model, prompts = _suppressor(), _prompts()
    one = mk.copy_suppression(model, "1.2", prompts, progress=False)
    three = mk.copy_suppression(model, "1.2", prompts, similar=3, progress=False)
    assert three.explained > 0.5
    assert not np.allclose(one.frame["score"], three.frame["score"], atol=1e-6)


def _all_but_first(n):
    kept = torch.ones(n, n, dtype=torch.bool)
    kept[:, 0] = False
    return kept


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_the_model(family, monkeypatch):
    """With all of every source kept nothing changes, whatever the family: the run is put together rightly."""
    from mechkit.weights import suppression

    def all_of_it(self, tokens, given, out, kept):
        return given[:, 1:].sum(1) @ out  # the first position is kept apart

    monkeypatch.setattr(suppression._Work, "_predicted", lambda self, tokens, stream: _all_but_first(len(tokens)))

    monkeypatch.setattr(suppression._Work, "_suppressed", all_of_it)
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCAB, (3, 6), generator=draw)
    found = mk.copy_suppression(tiny(family), "1.2", prompts, fraction=1.0, progress=False)
    assert found.frame["score"].max() < 1e-5
    assert found.frame["ablated"].max() > 1e-5


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ({"prompts": torch.ones(1, 5, dtype=torch.long)}, errors.PromptError, "at least two"),
        ({"prompts": torch.ones(2, 5, dtype=torch.long)}, errors.MetricError, "takes nothing"),
        ({"prompts": torch.ones(2, 1, dtype=torch.long)}, errors.MetricError, "at least two tokens"),
        ({"fraction": 0.0}, errors.OptionError, "fraction"),
        ({"similar": 0}, errors.OptionError, "similar"),
        ({"head": "7.0"}, errors.SiteError, "7"),
    ],
)
def test_bad_suppression(how, kind, told):
    given = {"head": "1.2", "prompts": torch.ones(2, 5, dtype=torch.long), **how}
    with pytest.raises(kind, match=told):
        mk.copy_suppression(tiny("llama"), **given, progress=False)
