"""mk.load: the same model whatever it comes from, its dimensions, and a clear error for everything else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import mechkit as mk
from mechkit.errors import LoadError, OptionError, PromptError, UnsupportedError

N_VOCAB, N_CTX = 100, 16
IDS = torch.tensor([[1, 7, 3, 99, 0], [42, 2, 5, 8, 13]])

_SIZES = {"vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_LLAMA_LIKE = {
    **_SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
}
# (config, n_layers, n_heads, n_kv_heads, d_model, d_head)
FAMILIES = {
    "gpt2": (GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=N_CTX, **_SIZES), 2, 4, 4, 32, 8),
    "llama": (LlamaConfig(**_LLAMA_LIKE), 3, 4, 2, 32, 8),
    "neox": (GPTNeoXConfig(**{**_LLAMA_LIKE, "num_key_value_heads": None}), 3, 4, 4, 32, 8),
    # Heads wider together than the residual stream.
    "qwen3": (Qwen3Config(**_LLAMA_LIKE, head_dim=16), 3, 4, 2, 32, 16),
    "gemma2": (Gemma2Config(**_LLAMA_LIKE, head_dim=16, query_pre_attn_scalar=16), 3, 4, 2, 32, 16),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test here may need a network, and none may wait for one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def random_model(family: str = "gpt2") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family][0])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms at one and biases at zero would hide mistakes
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = ["<start>", "<end>", "<unknown>", "Mary", "John", "gave", "milk", "to"]
    vocabulary = {word: i for i, word in enumerate(words + [f"w{i}" for i in range(len(words), N_VOCAB)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unknown>", eos_token="<end>", **special)


def own_logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The Hub's logits, from a copy that mechkit never touches."""
    untouched = copy.deepcopy(model)
    untouched.set_attn_implementation("eager")
    with torch.inference_mode():
        return untouched(input_ids=ids, use_cache=False).logits


def assert_same_logits(model: mk.Model, expected: torch.Tensor, ids: torch.Tensor = IDS) -> None:
    torch.testing.assert_close(model.run(ids).logits, expected, atol=1e-5, rtol=0)


# -- sources that work ----------------------------------------------------------------------------------------------


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


# -- sources that do not --------------------------------------------------------------------------------------------


def _empty_folder(at: Path) -> Path:
    (at / "empty").mkdir()
    return at / "empty"


def _folder(config: str) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        (at / "folder").mkdir()
        (at / "folder" / "config.json").write_text(config)
        return at / "folder"

    return make


def _folder_with_cut_weights(at: Path) -> Path:
    random_model().save_pretrained(at / "cut")
    weights = at / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return at / "cut"


def _folder_with_a_layer_too_few(at: Path) -> Path:
    random_model().save_pretrained(at / "short")
    config = at / "short" / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    return at / "short"


def _folder_of_another_width(at: Path) -> Path:
    random_model().save_pretrained(at / "wide")
    config = at / "wide" / "config.json"
    config.write_text(config.read_text().replace('"n_embd": 32', '"n_embd": 64'))
    return at / "wide"


def _gguf(content: bytes) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        (at / "bad.gguf").write_bytes(content)
        return at / "bad.gguf"

    return make


def _cut_gguf(length: int) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        file = tiny_gguf.write_gguf(at / "cut.gguf")
        file.write_bytes(file.read_bytes()[:length])
        return file

    return make


# What makes the source, the error, and what its message must hold; "{}" stands for the source itself.
BAD = {
    "folder without config.json": (_empty_folder, LoadError, ["{}", "config.json"]),
    "folder of an empty config": (_folder("{}"), LoadError, ["{}", "model_type"]),
    "folder of a broken config": (_folder("nonsense"), LoadError, ["{}", "JSON"]),
    "folder of an unknown family": (_folder('{"model_type": "no_such"}'), LoadError, ["{}", "no_such"]),
    "folder without weights": (_folder('{"model_type": "gpt2"}'), LoadError, ["{}", "safetensors"]),
    "folder of cut weights": (_folder_with_cut_weights, LoadError, ["{}"]),
    "folder of too few weights": (_folder_with_a_layer_too_few, LoadError, ["{}"]),
    "folder of weights of another width": (_folder_of_another_width, LoadError, ["{}"]),
    "path that is not there": (lambda at: "./nowhere", LoadError, ["nowhere", "not a folder"]),
    "absolute path that is not there": (lambda at: at / "nowhere", LoadError, ["{}", "not a folder"]),
    "file that is no folder": (lambda at: Path(__file__), LoadError, ["{}", "not a folder"]),
    "gguf that is not there": (lambda at: at / "nowhere.gguf", LoadError, ["{}", "no file"]),
    "gguf of garbage": (_gguf(bytes(range(256)) * 8), LoadError, ["{}", "GGUF"]),
    "gguf of nothing": (_gguf(b""), LoadError, ["{}", "GGUF"]),
    "gguf cut in its header": (_cut_gguf(100), LoadError, ["{}", "GGUF"]),
    "gguf cut in its vocabulary": (_cut_gguf(2000), LoadError, ["{}", "GGUF"]),
    "gguf cut in its weights": (_cut_gguf(20_000), LoadError, ["{}", "GGUF"]),
    "empty tuple": (lambda at: (), LoadError, ["[]", "(hf_model, tokenizer or None)"]),
    "tuple of names": (lambda at: ("gpt2", "gpt2"), LoadError, ["['str', 'str']", "(hf_model, tokenizer or None)"]),
    "tuple of three": (lambda at: (random_model(), None, None), LoadError, ["GPT2LMHeadModel", "NoneType"]),
    "tuple the wrong way round": (lambda at: (None, random_model()), LoadError, ["NoneType", "GPT2LMHeadModel"]),
    "module that is no language model": (lambda at: (torch.nn.Linear(2, 2), None), LoadError, ["Linear"]),
    "tuple of no tokenizer": (lambda at: (random_model(), 42), LoadError, ["GPT2LMHeadModel", "int"]),
    "int": (lambda at: 42, LoadError, ["int"]),
    "None": (lambda at: None, LoadError, ["NoneType"]),
    "bare model": (lambda at: random_model(), LoadError, ["GPT2LMHeadModel", "(hf_model, tokenizer or None)"]),
    "hub id without a network": (lambda at: "nobody/nothing", LoadError, ["{}", "smollm2-135m", "needs no hub"]),
    "misspelt packaged name": (lambda at: "smollm2", LoadError, ["{}", "smollm2-135m", "needs no hub"]),
    "model without attention": (
        lambda at: (AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=2, **_SIZES)), None),
        UnsupportedError,
        ["MambaForCausalLM", "attention"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_refused_with_what_was_given(case, tmp_path):
    make, kind, fragments = BAD[case]
    source = make(tmp_path)

    with pytest.raises(kind) as caught:
        mk.load(source, device="cpu")

    message = str(caught.value)
    for fragment in fragments:
        assert fragment.replace("{}", str(source)) in message
    assert message.endswith(".")


@pytest.mark.parametrize("dtype", ["float8", "", torch.float32, None])
def test_unknown_dtype_is_refused(dtype):
    with pytest.raises(OptionError) as caught:
        mk.load((random_model(), None), dtype=dtype)

    assert repr(dtype) in str(caught.value)
    assert "bfloat16" in str(caught.value)


def test_unknown_device_is_refused(tmp_path):
    random_model().save_pretrained(tmp_path)

    with pytest.raises(OptionError, match="nosuch"):
        mk.load(tmp_path, device="nosuch")


def test_errors_are_also_the_standard_librarys_kinds():
    with pytest.raises(OSError):
        mk.load("./nowhere")
    with pytest.raises(ValueError):
        mk.load("./nowhere", dtype="float8")


@pytest.mark.parametrize("bars", [True, False])
def test_library_speaks_as_before_when_a_load_is_over(bars, tmp_path):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()

        with pytest.raises(LoadError):
            mk.load(_folder("{}")(tmp_path))
        mk.load(tiny_gguf.write_gguf(tmp_path / "tiny.gguf"), device="cpu")

        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, bars)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


# -- prompts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def silent() -> mk.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return mk.load((random_model(), None))


@pytest.fixture(scope="module")
def reading() -> mk.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return mk.load((random_model(), word_tokenizer(bos_token="<start>")))


def test_text_without_a_tokenizer_is_refused(silent):
    with pytest.raises(PromptError, match=r"GPT2LMHeadModel was loaded without a tokenizer.*mk\.load"):
        silent.run("Mary gave milk")


@pytest.mark.parametrize(
    ("ids", "given"),
    [
        (torch.tensor([[1, 100]]), "1 to 100"),
        (torch.tensor([[-1, 5]]), "-1 to 5"),
        (torch.tensor([[0.0, 1.0]]), "torch.float32"),
        (torch.tensor([[True, False]]), "torch.bool"),
        (torch.zeros(1, 0, dtype=torch.long), "[1, 0]"),
        (torch.zeros(0, 4, dtype=torch.long), "[0, 4]"),
        (torch.zeros(1, 2, 2, dtype=torch.long), "[1, 2, 2]"),
        (torch.tensor(3), "[]"),
        (torch.zeros(1, N_CTX + 1, dtype=torch.long), "17 tokens"),
    ],
    ids=["too-high", "negative", "float", "bool", "no-positions", "no-prompts", "three-axes", "no-axes", "too-long"],
)
def test_ids_that_cannot_run_are_refused(ids, given, silent):
    with pytest.raises(PromptError) as caught:
        silent.run(ids)

    assert given in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "given"),
    [
        ("", "empty prompt"),
        (["Mary", ""], "empty prompt"),
        ([], "[]"),
        (["Mary", 3], "['Mary', 3]"),
        ([1, 2, 3], "[1, 2, 3]"),
        (None, "None"),
        (42, "42"),
        ("Mary " * N_CTX, "17 tokens"),
        (["Mary", "Mary " * N_CTX], "17 tokens"),
    ],
    ids=["empty", "one-empty", "none", "mixed", "ids-in-a-list", "None", "int", "too-long", "one-too-long"],
)
def test_prompts_that_cannot_run_are_refused(prompts, given, reading):
    with pytest.raises(PromptError) as caught:
        reading.run(prompts)

    assert given in str(caught.value)


def test_text_of_no_tokens_is_an_empty_prompt():
    model = mk.load((random_model(), word_tokenizer()))

    with pytest.raises(PromptError, match=r"(?i)empty|no token"):
        model.run("   ")


def test_prompt_as_long_as_the_context_runs(reading, silent):
    assert reading.run("Mary " * (N_CTX - 1)).logits.shape == (1, N_CTX, N_VOCAB)
    assert silent.run(torch.zeros(N_CTX, dtype=torch.long)).logits.shape == (1, N_CTX, N_VOCAB)
