"""Edits made in the weights do what the same edits do while the model runs, and are taken back to the last bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, VOCAB, plain, tiny
from torch.testing import assert_close

import mechkit as mk
from mechkit.errors import EditError, SiteError, UnsupportedError
from mechkit.weights.head_weights import HeadWeights

TOKENS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
every_family = pytest.mark.parametrize("family", FAMILIES)


def bits(model: mk.Model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.hf.state_dict().items()}


def assert_same_bits(model: mk.Model, before: dict[str, torch.Tensor]) -> None:
    after = model.hf.state_dict()
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def matrix(width: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.eye(width) + 0.5 * torch.randn(width, width, generator=draw)


def keys_and_values(model: mk.Model) -> tuple[str, str]:
    return ("1.kv0.k", "0.kv1.v" if model.n_kv_heads > 1 else "0.kv0.v") if model.info.grouped else ("1.2.k", "0.3.v")


def edits_of(model: mk.Model) -> dict[str, list]:
    """Edits without a shift, which every family can carry."""
    key, value = keys_and_values(model)
    d = model.d_head
    return {
        "transform": [mk.transform("1.1 2.0.q", matrix(d, 0)), mk.transform(f"{key} {value}", matrix(d, 1))],
        "scale": [mk.scale(f"0.2 1.3.q {key} {value}", -0.7)],
        "ablate": [mk.ablate(f"0.1 2.2.q {value}")],
        # Not commuting, and of one site: order matters.
        "in order": [mk.transform(one, matrix(d, seed)) for one in ("1.1", "1.0.q", value) for seed in (2, 3, 4)],
        "mixed": [mk.scale("1.1", 2.0), mk.transform("1.1 1.2", matrix(d, 5)), mk.scale("1.1.q", 0.5)],
    }


@every_family
def test_in_the_weights_is_while_it_runs_and_undo_is_to_the_bit(family):
    model = tiny(family)
    plainly, before = model.run(TOKENS).logits, bits(model)
    for name, edits in edits_of(model).items():
        expected = model.run(TOKENS, edits=edits).logits
        with mk.edit_weights(model, edits) as done:
            off = model.run(TOKENS).logits - expected
        assert off.abs().max() < 1e-5 * max(1.0, float(expected.abs().max())), name
        assert (expected - plainly).abs().max() > 1e-3
        assert done.norm > 0
        assert_same_bits(model, before)
        assert torch.equal(model.run(TOKENS).logits, plainly)


@every_family
def test_what_is_added_goes_into_biases_where_there_are_any(family):
    model, d = tiny(family), tiny(family).d_head
    vector = torch.randn(d, generator=torch.Generator().manual_seed(3))
    before = bits(model)
    for one, kind in (("1.1", "o"), ("2.0.q", "q"), (keys_and_values(model)[1], "v")):
        # Two shifts of one site: the second matrix changes what the first shift has become.
        edits = [mk.transform(one, matrix(d, 0), vector), mk.transform(one, matrix(d, 1), 2 * vector)]
        expected = model.run(TOKENS, edits=edits).logits
        if model.backend.branches.bias(kind, mk.site(one).layer) is None:
            with pytest.raises(EditError, match=f'Adding to "{one}" of .* no b_{kind.upper()}'):
                mk.edit_weights(model, edits)
        else:
            with mk.edit_weights(model, edits) as done:
                assert_close(model.run(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
            assert done.frame["matrix"].tolist() == [f"W_{kind.upper()}", f"b_{kind.upper()}"]
        assert_same_bits(model, before)


def test_norms_of_the_changes_are_told():
    model = tiny("gpt2")
    block = plain("gpt2").transformer.h[1].attn
    vector, by = torch.ones(8), matrix(8, 0)
    with torch.no_grad():
        out, query = block.c_proj.weight[8:16], block.c_attn.weight[:, 16:24]
        changes = [by @ out - out, vector @ out, -0.5 * query, -0.5 * block.c_attn.bias[16:24]]
        was = [out, block.c_proj.bias, query, block.c_attn.bias[16:24]]
    with mk.edit_weights(model, [mk.transform("1.1", by, vector), mk.scale("1.2.q", 0.5)]) as done:
        pass
    assert done.frame["site"].tolist() == ["1.1", "1.1", "1.2.q", "1.2.q"]
    assert done.frame["matrix"].tolist() == ["W_O", "b_O", "W_Q", "b_Q"]
    assert done.frame["norm"].tolist() == pytest.approx([float(change.norm()) for change in changes], rel=1e-4)
    shares = [float(change.norm() / old.detach().norm()) for change, old in zip(changes, was, strict=True)]
    assert done.frame["share"].tolist() == pytest.approx(shares, rel=1e-4)
    assert done.norm == pytest.approx(sum(float(change.norm()) ** 2 for change in changes) ** 0.5, rel=1e-4)


@every_family
def test_only_the_named_head_changes(family):
    model = tiny(family)
    before = HeadWeights.of(model, fold_norm=False, centre=False)
    by = matrix(model.d_head, 0)
    with mk.edit_weights(model, [mk.transform("1.2", by), mk.transform("2.1.q", by)]):
        after = HeadWeights.of(model, fold_norm=False, centre=False)
    out, query = before.W_O.clone(), before.W_Q.clone()
    out[1, 2], query[2, 1] = by @ out[1, 2], query[2, 1] @ by
    assert_close(after.W_O, out, atol=1e-5, rtol=0)
    assert_close(after.W_Q, query, atol=1e-5, rtol=0)
    assert torch.equal(after.W_K, before.W_K)
    assert torch.equal(after.W_V, before.W_V)


def test_an_exception_inside_takes_it_back_too():
    model = tiny("llama")
    before, changed = bits(model), []

    def interrupted():
        with mk.edit_weights(model, mk.scale("1.1", 3.0)):
            changed.extend(name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert changed
    assert_same_bits(model, before)


def test_undo_is_once_and_in_turn():
    model = tiny("llama")
    before = bits(model)
    first = mk.edit_weights(model, mk.scale("1.1", 3.0))
    between = bits(model)
    second = mk.edit_weights(model, mk.ablate("1.1 1.2"))
    second.undo()
    assert_same_bits(model, between)
    second.undo()
    assert_same_bits(model, between)
    first.undo()
    assert_same_bits(model, before)


def test_the_fingerprint_of_the_weights_goes_with_them():
    model = mk.load((plain("gpt2"), None), device="cpu")
    before = model.weights_hash
    with mk.edit_weights(model, mk.scale("1.1", 3.0)):
        assert model.weights_hash != before
    assert model.weights_hash == before


@pytest.mark.parametrize(
    ("family", "last", "kind", "names"),
    [
        ("llama", mk.transform("2.0", torch.eye(8), torch.ones(8)), EditError, "no b_O"),
        ("llama", mk.transform("2.0", torch.eye(7)), EditError, "width 7"),
        ("llama", mk.scale("3.0", 0.0), SiteError, "3.0"),
        ("llama", mk.scale("1.0.k", 0.5), EditError, 'Name the group: "1.kv0.k"'),
        ("llama", mk.ablate("1.3.v"), EditError, 'Name the group: "1.kv1.v"'),
        ("llama", mk.scale("1.0", 0.5, positions=2), EditError, "some positions"),
        ("llama", mk.scale("1.0", 0.5, positions=[-1]), EditError, "some positions"),
        ("llama", mk.scale("1.0", 0.5, positions="END"), EditError, "some positions"),
        ("llama", mk.scale("m1", 0.5), EditError, '"m1" in the weights'),
        ("llama", mk.scale("resid.1", 0.5), EditError, "resid.1"),
        ("llama", mk.ablate("1.0", "uniform"), EditError, "1.0.pattern"),
        ("llama", mk.steer("1.0", torch.ones(8)), EditError, "Steer in the weights"),
        ("llama", mk.patch_in("1.0", torch.ones(8)), EditError, "PatchIn in the weights"),
        ("llama", mk.attend("1.0", sharpen=2.0), EditError, "1.0.pattern"),
    ],
)
def test_an_edit_that_cannot_be_made_leaves_everything_as_it_was(family, last, kind, names):
    model = tiny(family)
    before = bits(model)
    with pytest.raises(kind, match=names):
        mk.edit_weights(model, [mk.scale("0.1", 3.0), mk.ablate("1.2.q"), last])
    assert_same_bits(model, before)


def test_a_failure_while_writing_leaves_everything_as_it_was(monkeypatch):
    import mechkit.weights.edit_weights as module

    model = tiny("llama")
    before, own, calls = bits(model), module._written, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            assert any(not torch.equal(model.hf.state_dict()[name], tensor) for name, tensor in before.items())
            raise RuntimeError("out of luck")
        return own(*args)

    monkeypatch.setattr(module, "_written", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        mk.edit_weights(model, mk.scale("0.1 1.1 2.1", 0.5))
    assert_same_bits(model, before)


def test_matrices_that_are_copies_are_refused(monkeypatch):
    from mechkit.backends.branches import Branches

    model = tiny("llama")
    before, own = bits(model), Branches.weight
    monkeypatch.setattr(Branches, "weight", lambda *args: own(*args).clone())
    with pytest.raises(UnsupportedError, match="cannot be written to"):
        mk.edit_weights(model, mk.scale("1.1", 0.5))
    assert_same_bits(model, before)


def test_a_model_that_runs_elsewhere_is_refused():
    elsewhere = mk.Model(SimpleNamespace(info=tiny("gpt2").info))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="runs elsewhere"):
        mk.edit_weights(elsewhere, mk.scale("0.0", 0.5))


def test_undo_out_of_order_is_refused():
    model = tiny("llama")
    first = mk.edit_weights(model, mk.scale("1.2", 0.5))
    second = mk.edit_weights(model, mk.scale("1.2", 0.5))
    with pytest.raises(EditError, match="changed again"):
        first.undo()
    second.undo()
    first.undo()
    first.undo()  # a second time does nothing
    with pytest.raises(EditError, match="No edits"):
        mk.edit_weights(model, [])
