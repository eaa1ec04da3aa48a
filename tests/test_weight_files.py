"""Weights of heads straight from safetensors files are those of the model that the files hold."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES, plain, tiny
from safetensors.torch import save_file
from torch.testing import assert_close

import mechkit as mk
from mechkit.errors import LoadError, OptionError, UnsupportedError
from mechkit.weights.head_weights import HeadWeights

# Of these a file does not tell enough: gains less one, a LayerNorm without a bias, a multiplier.
NOT_TOLD = {"gemma", "cohere", "granite"}
OWN_NAMES = {"neox", "bloom", "falcon", "falcon-alibi", "phi3"}  # one map to q, k and v, each in its own way
REFUSED = {"qwen3", "gemma2", "gemma3", "olmo2"}  # more norms than the one in front


def state(family: str) -> dict[str, torch.Tensor]:
    own = plain(family).state_dict()
    return {name: tensor.clone().contiguous() for name, tensor in own.items() if not name.startswith("lm_head")}


def written(folder, tensors: dict[str, torch.Tensor], name: str = "model.safetensors"):
    save_file(tensors, folder / name)
    return folder / name


def assert_same(read: HeadWeights, weights: HeadWeights) -> None:
    for kind in "QKVO":
        assert_close(getattr(read, f"W_{kind}"), getattr(weights, f"W_{kind}"), atol=1e-6, rtol=0)
    assert set(read.biases) == set(weights.biases)
    for kind, bias in read.biases.items():
        assert_close(bias, weights.biases[kind], atol=1e-6, rtol=0)
    assert (read.folded, read.centred) == (weights.folded, weights.centred)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fold", [True, False])
def test_a_file_gives_what_the_model_gives_or_says_why_not(family, fold, tmp_path):
    file = written(tmp_path, state(family))
    options = {"fold_norm": fold, **({} if fold else {"centre": False})}
    if family in OWN_NAMES:
        with pytest.raises(LoadError, match="No attention weights"):
            HeadWeights.load(file, 4, **options)
    elif fold and family in REFUSED:
        with pytest.raises(UnsupportedError, match=r"_norm|feedforward_layernorm"):
            HeadWeights.load(file, 4)
    elif not (fold and family in NOT_TOLD):
        read = HeadWeights.load(file, 4, **options)
        assert_same(read, HeadWeights.load(tiny(family), **options))
        assert read.model is None
        assert read.meta["path"] == str(file)


def test_whatever_stands_before_the_layer(tmp_path):
    names = {name.removeprefix("transformer."): tensor for name, tensor in state("gpt2").items()}
    assert_same(HeadWeights.load(str(written(tmp_path, names)), 4), HeadWeights.of(tiny("gpt2")))


def test_several_files_of_a_folder_are_one_model(tmp_path):
    tensors = state("llama")
    shards: list[dict] = [{}, {}, {}]
    for i, (name, tensor) in enumerate(sorted(tensors.items())):  # q, k and v of a layer in different files
        shards[i % 3][name] = tensor
    for i, shard in enumerate(shards):
        written(tmp_path, shard, f"model-0000{i + 1}-of-00003.safetensors")
    assert_same(HeadWeights.load(tmp_path, 4), HeadWeights.of(tiny("llama")))


def test_half_precision_is_read_as_float32(tmp_path):
    halves = {name: tensor.half() for name, tensor in state("gpt2").items()}
    read, weights = HeadWeights.load(written(tmp_path, halves), 4), HeadWeights.of(tiny("gpt2"))
    assert read.W_O.dtype == torch.float32
    assert_close(read.W_O, weights.W_O, atol=1e-3, rtol=0)


def test_analyses_take_a_file_as_they_take_a_model(tmp_path):
    file = written(tmp_path, state("gpt2"))
    assert_close(mk.svd(file, "1.2", n_heads=4).S, mk.svd(tiny("gpt2"), "1.2").S, atol=1e-5, rtol=0)
    ours, theirs = mk.composition(file, n_heads=4).frame, mk.composition(tiny("gpt2")).frame
    assert_close(torch.tensor(ours.score), torch.tensor(theirs.score), atol=1e-5, rtol=0)
    with pytest.raises(OptionError, match="offset = 1 of weights from a file"):
        mk.svd(file, "1.2", "qk", offset=1, n_heads=4)


def without(*parts: str):
    return lambda tensors: {n: tensor for n, tensor in tensors.items() if not any(part in n for part in parts)}


@pytest.mark.parametrize(
    ("n_heads", "change", "options", "kind", "names"),
    [
        (None, None, {}, OptionError, "n_heads left out"),
        (5, None, {}, OptionError, "n_heads = 5 for queries of width 32"),
        (0, None, {}, OptionError, "n_heads = 0"),
        (-4, None, {}, OptionError, "n_heads = -4"),
        (1, None, {}, OptionError, "n_heads = 1"),  # a head wider than the keys
        (4, without("attn"), {}, LoadError, "No attention weights"),
        (4, without("layers.0"), {}, LoadError, r"layers \[1, 2\]"),
        (4, without("layers.1.self_attn.q_proj"), {}, LoadError, r"layers \[0, 2\]"),
        (4, without("k_proj"), {}, LoadError, "without k_proj"),
        (4, without("layers.2.self_attn.o_proj"), {}, LoadError, "without o_proj"),
        (4, without("input_layernorm"), {}, LoadError, "no norm in front of attention"),
    ],
)
def test_files_that_do_not_fit_are_named(n_heads, change, options, kind, names, tmp_path):
    tensors = state("llama")
    file = written(tmp_path, tensors if change is None else change(tensors))
    with pytest.raises(kind, match=names):
        HeadWeights.load(file, n_heads, **options)


def test_without_norms_they_are_read_as_they_are(tmp_path):
    file = written(tmp_path, without("norm")(state("llama")))
    weights = HeadWeights.of(tiny("llama"), fold_norm=False)
    assert_same(HeadWeights.load(file, 4, fold_norm=False), weights)


def test_what_is_no_such_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none.safetensors", tmp_path / "folder"):
        with pytest.raises(LoadError, match="There is no file"):
            HeadWeights.load(path, 4)
    text = tmp_path / "text.safetensors"
    text.write_text("not a tensor in sight")
    with pytest.raises(LoadError, match="could not be read"):
        HeadWeights.load(text, 4)


@pytest.mark.parametrize("family", ["gemma", "cohere", "granite"])
def test_a_config_beside_a_file_tells_of_families_that_files_do_not(family, tmp_path):
    written(tmp_path, state(family))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UnsupportedError, match=family):
        HeadWeights.load(tmp_path, 4)
    assert_same(
        HeadWeights.load(tmp_path, 4, fold_norm=False, centre=False),
        HeadWeights.of(tiny(family), fold_norm=False, centre=False),
    )
