"""Singular directions of heads are those of the dense matrices, which are never made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import words
from families import FAMILIES, plain, tiny
from reference import weights as dense
from torch.testing import assert_close

import mechkit as mk
from mechkit.errors import OptionError, SiteError, UnsupportedError
from mechkit.weights.head_weights import HeadWeights
from mechkit.weights.rotation import rotations

every_family = pytest.mark.parametrize("family", FAMILIES)
each_matrix = pytest.mark.parametrize("matrix", ["ov", "qk"])
ROTATED = ["llama", "gpt-j", "gemma3", "olmo2", "smollm3"]


def literal(family: str, head: mk.Site, matrix: str, offset: int = 0) -> torch.Tensor:
    weights, at = HeadWeights.of(tiny(family)), (head.layer, head.head)
    if matrix == "ov":
        return dense.ov(weights, at)
    return dense.qk(weights, at, rotations(tiny(family), [offset]))


@every_family
@each_matrix
def test_components_make_the_matrix_and_are_its_own(family, matrix):
    found = mk.svd(tiny(family), matrix=matrix)
    assert len(found.heads) == 12
    whole = found.reconstructed()
    for i, head in enumerate(found.heads):
        expected = literal(family, head, matrix)
        assert float((whole[i] - expected).norm() / expected.norm()) < 1e-5
        own = torch.linalg.svdvals(expected)[: found.values.shape[1]]
        assert_close(found.S[i].double(), own, atol=1e-5 * float(own[0]), rtol=0)
    eye = torch.eye(found.values.shape[1]).expand(12, -1, -1)
    assert_close(found.U.mT @ found.U, eye, atol=1e-5, rtol=0)
    assert_close(found.Vh @ found.Vh.mT, eye, atol=1e-5, rtol=0)
    assert (found.S.diff(dim=-1) <= 0).all()
    largest = found.Vh.gather(-1, found.Vh.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("family", ROTATED)
def test_of_queries_and_keys_at_a_distance(family):
    for offset in (1, 3):
        found = mk.svd(tiny(family), "1.2 2.0", "qk", offset=offset)
        for i, head in enumerate(found.heads):
            expected = literal(family, head, "qk", offset)
            assert float((found.reconstructed()[i] - expected).norm() / expected.norm()) < 1e-5
    near, far = (mk.svd(tiny(family), "2.0", "qk", offset=offset).reconstructed() for offset in (0, 3))
    both = mk.svd(tiny(family), "2.0", "qk", offset=[0, 3])
    assert_close(both.reconstructed(), (near + far) / 2, atol=1e-5, rtol=0)
    assert float((near - far).norm() / near.norm()) > 1e-2
    assert both.meta["offset"] == [0, 3]


@every_family
@each_matrix
def test_several_heads_are_each_alone(family, matrix):
    several = mk.svd(tiny(family), "2.3 0.1 1.0", matrix)
    assert str(several.heads) == "2.3 0.1 1.0"
    assert several.U.shape == (3, tiny(family).d_model, tiny(family).d_head)
    for i, head in enumerate(several.heads):
        alone, part = mk.svd(tiny(family), head, matrix), several[str(head)]
        for one in (alone, part):
            assert one.U.ndim == one.Vh.ndim == 2
            assert_close(one.S, several.S[i], atol=1e-5, rtol=1e-5)
            assert_close(one.reconstructed(), several.reconstructed()[i], atol=1e-4, rtol=0)
        assert torch.equal(part.Vh, several.Vh[i])
        assert torch.equal(part.U, several.U[i])
        pd.testing.assert_frame_equal(part.frame, several.frame.query("site == @name", local_dict={"name": str(head)})
                                      .reset_index(drop=True))  # fmt: skip


@each_matrix
def test_some_components_add_up_to_all(matrix):
    one = mk.svd(tiny("gpt2"), "1.2", matrix)
    parts = [one.reconstructed([i]) for i in range(8)]
    assert_close(sum(parts), one.reconstructed(), atol=1e-5, rtol=0)
    assert_close(one.reconstructed([1, 5]), parts[1] + parts[5], atol=1e-5, rtol=0)
    for i, part in enumerate(parts):
        assert float(part.norm()) == pytest.approx(float(one.S[i]), rel=1e-4)


@each_matrix
def test_the_table_has_a_row_a_component(matrix, tmp_path):
    found = mk.svd(tiny("qwen2"), "2.3 0.1", matrix)
    frame = found.frame
    assert list(frame.columns) == ["site", "layer", "head", "kind", "component", "score", "share"]
    assert frame["site"].tolist() == ["2.3"] * 8 + ["0.1"] * 8
    assert frame["component"].tolist() == [*range(8)] * 2
    assert set(frame["kind"]) == {matrix}
    assert (frame["layer"].tolist(), frame["head"].tolist()) == ([2] * 8 + [0] * 8, [3] * 8 + [1] * 8)
    assert np.allclose(frame["score"], found.S.flatten())
    for i, rows in enumerate(["2.3", "0.1"]):
        shares = frame["share"][frame["site"] == rows].to_numpy()
        size = found.reconstructed()[i].square().sum()
        assert np.allclose(shares, found.S[i].square() / size, rtol=1e-4)
        assert shares.sum() == pytest.approx(1, abs=1e-5)
    assert (found.meta["matrix"], found.meta["offset"], found.meta["fold_norm"]) == (matrix, 0, True)
    assert found.meta["weights"] == tiny("qwen2").weights_hash
    again = mk.HeadSVD.load(found.save(tmp_path / "svd.parquet"))
    pd.testing.assert_frame_equal(again.frame, frame)
    assert again.meta == found.meta
    with pytest.raises(OptionError, match="loaded table"):
        again.remove(0)


def literal_ends(values: torch.Tensor, k: int) -> list[int]:
    order = values.argsort(descending=True).tolist()
    return order[:k] + order[::-1][:k]


def test_tokens_are_those_that_the_models_own_readout_and_embeddings_have():
    model = words.model()
    hf, one = model.hf, mk.svd(model, "1.2")
    with torch.no_grad():
        unembed = hf.get_output_embeddings().weight * hf.model.norm.weight
        embed = hf.get_input_embeddings().weight[: model.info.d_vocab]
        written = unembed @ one.Vh[3]
        read = embed @ one.U[:, 3] / embed.norm(dim=-1)
    table = one.tokens(3, k=5)
    assert list(table.columns) == ["side", "end", "rank", "token", "id", "score"]
    assert table["side"].tolist() == ["read"] * 10 + ["write"] * 10
    assert table["end"].tolist() == (["+"] * 5 + ["-"] * 5) * 2
    assert table["rank"].tolist() == [*range(5)] * 4
    for side, values in (("read", read), ("write", written - written.mean())):
        rows = one.tokens(3, k=5, side=side)
        assert rows["id"].tolist() == literal_ends(values, 5)
        assert np.allclose(rows["score"], values[rows["id"].tolist()], atol=1e-5)
        assert rows["token"].tolist() == [model.to_text(i) for i in rows["id"]]
        pd.testing.assert_frame_equal(rows, table[table["side"] == side].reset_index(drop=True))


def test_tokens_behind_a_layer_norm_and_what_keys_read():
    model, one = tiny("gpt2"), mk.svd(tiny("gpt2"), "1.2", "qk")
    with torch.no_grad():
        final, embed = model.hf.transformer.ln_f.weight, model.hf.get_input_embeddings().weight
        key = embed @ one.Vh[0] / embed.norm(dim=-1)
        folded = model.hf.get_output_embeddings().weight * final
        write = (folded - folded.mean(-1, keepdim=True)) @ mk.svd(model, "1.2").Vh[0]
    assert one.tokens(side="write", k=4)["id"].tolist() == literal_ends(key, 4)
    rows = mk.svd(model, "1.2").tokens(side="write", k=4)
    assert rows["id"].tolist() == literal_ends(write, 4)
    assert rows["token"].tolist() == [str(i) for i in rows["id"]]  # no tokenizer


def test_a_subspace_has_coordinates_and_a_rest():
    one = mk.svd(tiny("llama"), "1.2")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for side, basis in (("write", one.Vh[[0, 4]]), ("read", one.U[:, [0, 4]].T)):
        space = one.subspace([0, 4], side)
        assert space.dimensions == 2
        assert_close(space.basis, basis, atol=1e-6, rtol=0)  # orthonormal ones stay as they are, signs too
        assert_close(space.coordinates(x), x @ basis.T, atol=1e-5, rtol=0)
        assert_close(space.projected(x) + space.without(x), x, atol=1e-6, rtol=0)
        assert_close(space.projected(space.projected(x)), space.projected(x), atol=1e-5, rtol=0)
        assert_close(space.without(space.without(x)), space.without(x), atol=1e-5, rtol=0)
        assert space.coordinates(space.without(x)).abs().max() < 1e-5
        assert f"1.2 ov {side} 0 4" in repr(space)
    assert one.subspace(3).dimensions == 1


def test_directions_are_made_orthonormal_one_after_the_other():
    given = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    space = mk.Subspace(given)
    assert_close(space.basis @ space.basis.T, torch.eye(4), atol=1e-5, rtol=0)
    for k in range(1, 5):  # the first k span what the first k span, and each points the way it was given
        assert mk.Subspace(given[:k]).without(given[:k]).norm() < 1e-4
        assert_close(mk.Subspace(given[:k]).basis, space.basis[:k], atol=1e-5, rtol=0)
    assert ((space.basis * given).sum(-1) > 0).all()


@pytest.mark.parametrize(
    "directions",
    [
        torch.ones(2, 32),
        torch.stack([torch.ones(32), torch.zeros(32)]),
        torch.eye(32)[[0, 1, 1]],
        torch.randn(9, 8),
        torch.ones(32),
        torch.empty(0, 32),
        torch.full((1, 32), torch.nan),
    ],
)
def test_directions_that_make_no_subspace_are_refused(directions):
    with pytest.raises(OptionError, match=r"Directions of shape|depend on each other"):
        mk.Subspace(directions)


def of_file(**_):
    return replace(mk.svd(tiny("llama"), "1.2"), weights=replace(HeadWeights.of(tiny("llama")), model=None))


@pytest.mark.parametrize(
    ("call", "kind", "names"),
    [
        (lambda m: mk.svd(m, "3.0"), SiteError, "3.0"),
        (lambda m: mk.svd(m, "0.4"), SiteError, "0.4"),
        (lambda m: mk.svd(m, "0.0.q"), SiteError, "0.0.q"),
        (lambda m: mk.svd(m, ""), SiteError, "No heads"),
        (lambda m: mk.svd(m, "0.0", "vo"), OptionError, "vo"),
        (lambda m: mk.svd(m, "0.0", offset=1), OptionError, "offset = 1 of OV"),
        (lambda m: mk.svd(m, "0.0", "qk", offset=-1), OptionError, "-1"),
        (lambda m: mk.svd(m, "0.0", "qk", offset=[]), OptionError, "Offsets"),
        (lambda m: mk.svd(m, "0.0", "qk", offset=64), OptionError, "64"),
        (lambda m: mk.svd("nowhere.safetensors", n_heads=4), OSError, "no file"),
        (lambda m: mk.svd(m, "0.0 0.1")["1.0"], SiteError, "not among"),
        (lambda m: mk.svd(m, "0.0 0.1").subspace(), SiteError, "2 heads"),
        (lambda m: mk.svd(m, "0.0 0.1").tokens(), SiteError, "2 heads"),
        (lambda m: mk.svd(m, "0.0 0.1").remove(0), SiteError, "2 heads"),
        (lambda m: mk.svd(m, "0.0").subspace(8), OptionError, "8"),
        (lambda m: mk.svd(m, "0.0").subspace(-1), OptionError, "-1"),
        (lambda m: mk.svd(m, "0.0").subspace([]), OptionError, "Components"),
        (lambda m: mk.svd(m, "0.0").remove([0, 0]), OptionError, "different numbers"),
        (lambda m: mk.svd(m, "0.0").remove(0.5), OptionError, "0.5"),
        (lambda m: mk.svd(m, "0.0").remove("0"), OptionError, "Components 0"),
        (lambda m: mk.svd(m, "0.0").set({}), OptionError, "Components"),
        (lambda m: mk.svd(m, "0.0").subspace(0, "both"), OptionError, "both"),
        (lambda m: mk.svd(m, "0.0").tokens(0, side="both"), OptionError, "both"),
        (lambda m: mk.svd(m, "0.0").tokens(0, k=0), OptionError, "k = 0"),
        (lambda m: mk.svd(m, "0.0").tokens(0, k=98), OptionError, "k = 98"),
        (lambda m: of_file().tokens(), UnsupportedError, "file of attention weights"),
        (lambda m: mk.svd(m, "0.0").subspace().coordinates(torch.ones(31)), OptionError, "width 31"),
    ],
)
def test_bad_input_is_named(call, kind, names):
    with pytest.raises(kind, match=names):
        call(tiny("llama"))


def test_numbers_of_a_table_are_components_too():
    one = mk.svd(tiny("llama"), "1.2")
    number = one.frame["component"].iloc[3]
    assert torch.equal(one.subspace(number).basis, one.subspace(3).basis)
    assert torch.equal(one.remove(one.frame["component"].iloc[:2]).matrix, one.remove([0, 1]).matrix)


def test_options_go_to_the_weights():
    plainly = mk.svd(tiny("gpt2"), "1.2", fold_norm=False, centre=False)
    block = plain("gpt2").transformer.h[1].attn
    with torch.no_grad():
        expected = block.c_attn.weight[:, 80:88] @ block.c_proj.weight[16:24]
    assert_close(plainly.reconstructed(), expected, atol=1e-5, rtol=0)
    assert plainly.meta["centre"] is False


@pytest.mark.parametrize("offset", [1.5, "2", None, [0, 0.5]])
def test_offsets_are_whole_numbers(offset):
    with pytest.raises(OptionError, match="offset"):
        mk.svd(tiny("llama"), "1.2", "qk", offset=offset)
    with pytest.raises(OptionError, match="offset"):
        mk.composition(tiny("llama"), kind="q", offset=offset)


def test_offsets_of_numpy_and_ranges():
    one, same = (mk.svd(tiny("llama"), "1.2", "qk", offset=offset).S for offset in (np.int64(2), [2]))
    assert torch.equal(one, same)
    assert mk.svd(tiny("llama"), "1.2", "qk", offset=range(3)).meta["offset"] == [0, 1, 2]
