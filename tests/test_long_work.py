"""Work that takes long: memory that runs out, a user who stops it, a process that is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny, tiny_task

import mechkit as mk
from mechkit.backends import memory
from mechkit.backends.lens import LensReplay
from mechkit.errors import CapacityError, Interrupted, StorageError
from mechkit.patching import checkpoint as checkpoints

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """Many batches, each written down."""
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", 32)
    monkeypatch.setattr(checkpoints, "_SECONDS", 0.0)


def patch(model=None, task=None, **options) -> mk.Scores:
    return mk.patch(model or tiny("llama"), task or tiny_task(n=6), "heads", progress=False, **options)


def stopping_after(monkeypatch, batches: int, error: BaseException) -> list[int]:
    """Let the engine run so many batches, then raise."""
    own, sizes = LensReplay.resume, []

    def resume(self, writes, read):
        if len(sizes) == batches:
            raise error
        sizes.append(len(read.positions))
        return own(self, writes, read)

    monkeypatch.setattr(LensReplay, "resume", resume)
    return sizes


@pytest.mark.parametrize("batches", [1, 3, 7])
def test_a_stopped_sweep_goes_on_from_its_checkpoint_bit_for_bit(monkeypatch, tmp_path, batches):
    whole, path = patch().frame, tmp_path / "sweep"
    with monkeypatch.context() as patched:
        stopping_after(patched, batches, KeyboardInterrupt())
        with pytest.raises(Interrupted, match="the same call goes on from there"):
            patch(checkpoint=path)
    done = stopping_after(monkeypatch, 10**6, KeyboardInterrupt())
    pd.testing.assert_frame_equal(whole, patch(checkpoint=path).frame, check_exact=True)
    total = sum(done)
    done.clear()
    pd.testing.assert_frame_equal(whole, patch(checkpoint=path).frame, check_exact=True)
    assert done == []
    assert 0 < total < 12 * 6


def test_what_was_done_before_a_stop_is_handed_over(monkeypatch):
    whole = patch().frame
    stopping_after(monkeypatch, 8, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        patch()
    some = caught.value.scores.frame
    assert 0 < len(some) < len(whole)
    finished = some[some.n == 6]
    assert len(finished)
    expected = whole[whole.site.isin(finished.site)].reset_index(drop=True)
    pd.testing.assert_frame_equal(finished.reset_index(drop=True), expected, check_exact=True)
    assert not any(point.has_hooks() for point in tiny("llama").bridge.hook_dict.values())


def test_an_error_on_the_way_leaves_what_was_done_in_the_checkpoint(monkeypatch, tmp_path):
    with monkeypatch.context() as patched:
        stopping_after(patched, 4, RuntimeError("a cable came loose"))
        with pytest.raises(RuntimeError, match="cable"):
            patch(checkpoint=tmp_path / "sweep")
    pd.testing.assert_frame_equal(patch().frame, patch(checkpoint=tmp_path / "sweep").frame, check_exact=True)


_CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import mechkit as mk
from families import tiny, tiny_task
from mechkit.backends import memory
from mechkit.backends.lens import LensReplay
from mechkit.patching import checkpoint
memory.TOKENS_AT_ONCE["cpu"], checkpoint._SECONDS = 32, 0.0
own = LensReplay.resume
def slow(self, writes, read):
    print("batch", flush=True)
    time.sleep(0.05)
    return own(self, writes, read)
LensReplay.resume = slow
mk.patch(tiny("llama"), tiny_task(n=6), "heads", progress=False, checkpoint={path!r})
"""


def test_a_killed_process_leaves_a_checkpoint_that_goes_on_bit_for_bit(tmp_path):
    path, batches = tmp_path / "sweep", random.randint(2, 8)
    print("killed after", batches, "batches")
    code = _CHILD.format(tests=str(TESTS), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(batches):
            assert child.stdout.readline() == "batch\n"
        time.sleep(random.random() * 0.05)
        os.kill(child.pid, signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    with np.load(path) as file:
        assert 0 < int(file["done"].sum()) < file["done"].size
    pd.testing.assert_frame_equal(patch().frame, patch(checkpoint=path).frame, check_exact=True)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda: {"task": tiny_task(n=6, seed=5)}, "prompts"),
        (lambda: {"task": tiny_task(n=6).with_metric("prob")}, "metric"),
        (lambda: {"direction": "noise"}, "prompts"),
        (lambda: {"positions": "END"}, "sites and positions"),
        (lambda: {"model": tiny("qwen2")}, "model"),
    ],
)
def test_a_checkpoint_of_another_sweep_is_refused_and_left_alone(tmp_path, change, names):
    path = tmp_path / "sweep"
    patch(checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match=f"another sweep: its .*{names}"):
        patch(checkpoint=path, **change())
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half"])
def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"notes\.txt could not be read as a checkpoint"):
        patch(checkpoint=path)
    assert path.read_bytes() == content


def test_a_checkpoint_that_cannot_be_written_is_found_out_before_the_work(monkeypatch, tmp_path):
    sizes = stopping_after(monkeypatch, 10**6, KeyboardInterrupt())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        patch(checkpoint=tmp_path / "file" / "sweep")
    assert sizes == []


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: tried 8 GB")],
)
def test_when_memory_runs_out_batches_are_halved_and_the_table_is_the_same(monkeypatch, error):
    whole, own, sizes = patch().frame, LensReplay.resume, []

    def resume(self, writes, read):
        if len(read.positions) > 2:
            raise error
        sizes.append(len(read.positions))
        return own(self, writes, read)

    monkeypatch.setattr(LensReplay, "resume", resume)
    pd.testing.assert_frame_equal(whole, patch().frame, atol=1e-5)
    assert set(sizes) == {2}


def test_a_single_variant_that_does_not_fit_says_so(monkeypatch):
    stopping_after(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(CapacityError, match="single variant"):
        patch()


def test_a_base_run_that_does_not_fit_says_so(monkeypatch):
    def body(self, tokens, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    patch()  # the readout is checked already
    monkeypatch.setattr("mechkit.backends.lens.LensBackend.body", body)
    monkeypatch.setattr("mechkit.patching.variants.read", lambda model, ids, at, columns: torch.randn(len(ids), 2))
    with pytest.raises(CapacityError, match=r"base run of \d+ prompts of 9 tokens"):
        patch()


def test_evaluating_a_circuit_halves_its_batches_too(monkeypatch):
    model, task = tiny("llama"), tiny_task(n=4)
    circuit = mk.discover(model, task, size=3, progress=False)
    whole = circuit.evaluate(model, task, progress=False).control
    own = LensReplay.vary

    def vary(self, layer, rows, changes, read):
        if len(rows) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, layer, rows, changes, read)

    monkeypatch.setattr(LensReplay, "vary", vary)
    pd.testing.assert_frame_equal(whole, circuit.evaluate(model, task, progress=False).control, atol=1e-5)


def test_batches_follow_free_memory(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", 4096)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    assert memory.rows_at_once(100, 1, cpu) == 32  # half of it, rounded down to a power of two
    assert memory.rows_at_once(10**9, 1, cpu) == 1
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**15)
    assert memory.rows_at_once(100, 10, cpu) == 256


def test_free_memory_is_what_the_container_allows(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "current").write_text("400\n")
    (tmp_path / "unlimited").write_text("max\n")
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_CGROUPS", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert memory.free_bytes(cpu) == 600
    monkeypatch.setattr(memory, "_CGROUPS", ((str(tmp_path / "unlimited"), str(tmp_path / "current")),))
    assert memory.free_bytes(cpu) > 10**6


def test_the_measured_bytes_of_a_block_cover_what_it_holds():
    """Of a block whose outputs are known: 2 linears and an addition; views are not counted."""
    given, first, second = torch.randn(3, 5), torch.nn.Linear(5, 8), torch.nn.Linear(8, 5)
    with torch.inference_mode(), memory.OutputBytes() as spent:
        given + second(first(given)).view(3, 5)
    assert spent.total == 4 * 3 * (8 + 5 + 5)


def test_the_checkpoint_says_what_it_is_of(tmp_path):
    patch(checkpoint=tmp_path / "sweep")
    with np.load(tmp_path / "sweep") as file:
        assert set(json.loads(str(file["identity"]))) == {
            "mechkit",
            "model",
            "prompts",
            "metric",
            "sites and positions",
        }
    assert [one.name for one in tmp_path.iterdir()] == ["sweep"]
