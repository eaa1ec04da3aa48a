"""mk.load: a clear error for everything that is no model, and nothing left changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_gguf
import torch
from own_models import SIZES, random_model
from transformers import (
    AutoModelForCausalLM,
    MambaConfig,
)

import mechkit as mk
from mechkit.errors import LoadError, OptionError, UnsupportedError

pytestmark = pytest.mark.usefixtures("hub_offline")


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
        lambda at: (AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=2, **SIZES)), None),
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
