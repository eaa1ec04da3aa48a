"""mk.load: the same model whatever it comes from, and its dimensions."""

from __future__ import annotations

import pytest
import tiny_gguf
import torch
from own_models import FAMILIES, IDS, N_CTX, N_VOCAB, assert_same_logits, own_logits, random_model, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

import mechkit as mk
from mechkit.errors import PromptError

pytestmark = pytest.mark.usefixtures("hub_offline")


@pytest.mark.parametrize("family", FAMILIES)
def test_model_without_tokenizer_gives_its_own_logits(family):
    hf = random_model(family)
    expected = own_logits(hf)

    model = mk.load((hf, None))

    assert_same_logits(model, expected)
    assert model.hf is hf
    assert model.tokenizer is None
    assert model.source == {"kind": "object"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_model_with_tokenizer_gives_its_own_logits(family):
    hf, tokenizer = random_model(family), word_tokenizer(bos_token="<start>")
    expected = own_logits(hf, torch.tensor([[0, 3, 5, 6, 7, 4]]))

    model = mk.load((hf, tokenizer))
    run = model.run("Mary gave milk to John")

    assert run.tokens.tolist() == [[0, 3, 5, 6, 7, 4]]  # the tokenizer's <start> comes first
    torch.testing.assert_close(run.logits, expected, atol=1e-5, rtol=0)
    assert run.next_tokens(3)["token"].tolist() == [tokenizer.decode(i) for i in expected[0, -1].topk(3).indices]


@pytest.mark.parametrize("special", [{}, {"bos_token": "<start>"}, {"bos_token": "<start>", "pad_token": "<end>"}])
def test_tokenizer_is_left_as_it_was(special):
    tokenizer = word_tokenizer(**special)
    before = dict(tokenizer.special_tokens_map), len(tokenizer), tokenizer("Mary")["input_ids"]

    model = mk.load((random_model(), tokenizer))

    assert model.tokenizer is tokenizer
    assert (dict(tokenizer.special_tokens_map), len(tokenizer), tokenizer("Mary")["input_ids"]) == before


def test_nothing_is_put_first_where_the_tokenizer_has_no_beginning_token():
    model = mk.load((random_model(), word_tokenizer()))

    assert model.tokens(["Mary gave", "John"]).tolist() == [[3, 5], [4, 1]]
    assert model.run(["Mary gave", "John"]).lengths.tolist() == [2, 1]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_folder_gives_the_same_logits_and_text(family, tmp_path):
    hf, tokenizer = random_model(family), word_tokenizer(bos_token="<start>")
    hf.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")

    for source in (tmp_path / "saved", str(tmp_path / "saved")):
        model = mk.load(source, device="cpu")
        assert_same_logits(model, own_logits(hf))
        assert model.tokens("Mary gave").tolist() == [[0, 3, 5]]
        assert model.name == "saved"
        assert model.source == {"kind": "folder", "path": str(source)}


def test_folder_in_the_working_directory_needs_no_dot(tmp_path, monkeypatch):
    hf = random_model()
    hf.save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)

    assert_same_logits(mk.load("mine", device="cpu"), own_logits(hf))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folder_without_tokenizer_runs_ids_and_refuses_text(family, tmp_path):
    hf = random_model(family)
    hf.save_pretrained(tmp_path)

    model = mk.load(tmp_path, device="cpu")

    assert_same_logits(model, own_logits(hf))
    assert model.tokenizer is None
    with pytest.raises(PromptError, match="without a tokenizer"):
        model.run("Mary gave milk")


@pytest.mark.parametrize("weights", ["Q4_1", "F32"])
def test_gguf_file_gives_the_logits_that_transformers_gives(weights, tmp_path):
    file = tiny_gguf.write_gguf(tmp_path / "tiny.gguf", weights=weights)
    hf = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name)

    for source in (file, str(file)):
        model = mk.load(source, device="cpu")
        assert_same_logits(model, own_logits(hf))
        assert model.encode("the hand") == tokenizer("the hand", add_special_tokens=False)["input_ids"]
        assert model.run("the hand").logits.isfinite().all()
        assert model.name == "tiny"
        assert model.source == {"kind": "gguf", "path": str(source)}
    shape = (model.n_layers, model.n_heads, model.n_kv_heads, model.d_model, model.d_head, model.info.n_ctx)
    assert shape == (2, 4, 2, 32, 8, tiny_gguf.N_CTX)


@pytest.mark.parametrize("family", FAMILIES)
def test_dimensions_are_the_models_own(family):
    _, *expected = FAMILIES[family]
    model = mk.load((random_model(family), None))

    assert [model.n_layers, model.n_heads, model.n_kv_heads, model.d_model, model.d_head] == expected
    assert (model.info.d_vocab, model.info.n_ctx) == (N_VOCAB, N_CTX)
    assert model.info.grouped == (model.n_kv_heads < model.n_heads)
    assert (model.info.dtype, model.info.device) == ("float32", "cpu")
    assert len(model.heads()) == model.n_layers * model.n_heads


def test_recorded_heads_have_the_shape_of_the_dimensions():
    model = mk.load((random_model("qwen3"), None))
    run = model.run(IDS, record=["1.2.z", "1.2.pattern"])

    assert run["1.2.z"].shape == (2, 5, 16)
    assert run["1.2.pattern"].shape == (2, 5, 5)
    torch.testing.assert_close(run["1.2.pattern"].sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_the_one_asked_for(dtype, tmp_path):
    hf = random_model()
    hf.save_pretrained(tmp_path)
    word_tokenizer(bos_token="<start>").save_pretrained(tmp_path)

    model = mk.load(tmp_path, dtype=dtype, device="cpu")

    assert model.info.dtype == dtype
    logits = model.run(IDS).logits
    assert logits.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits.float(), own_logits(hf), atol=0.1, rtol=0.05)


def test_gguf_file_loads_in_the_dtype_asked_for(tmp_path):
    model = mk.load(tiny_gguf.write_gguf(tmp_path / "tiny.gguf"), dtype="float16", device="cpu")

    assert model.info.dtype == "float16"
    assert model.run(IDS).logits.dtype == torch.float16


def test_model_you_made_keeps_its_dtype():
    assert mk.load((random_model().to(torch.bfloat16), None)).info.dtype == "bfloat16"
