"""Sweeps spread over the workers of a Ray cluster: the same table, whatever happens to the workers."""

from __future__ import annotations

import ipaddress
import os
import signal
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from families import plain, tiny, tiny_task

import mechkit as mk
from mechkit.backends import memory
from mechkit.errors import Interrupted, OptionError, UnsupportedError, VersionError, WorkerLostError
from mechkit.patching import checkpoint as checkpoints
from mechkit.patching import spread
from mechkit.patching.sweep import Sweep
from mechkit.patching.workers import cluster

ray = pytest.importorskip("ray", reason='needs Ray: pip install "mechkit-interp[ray]"')


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    """Many batches."""
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", 64)
    monkeypatch.setattr(checkpoints, "_SECONDS", 0.0)


@pytest.fixture(scope="module")
def initialised():
    """A cluster that is there before the sweep, and stays when it is done."""
    with cluster(4):
        yield


def both(monkeypatch, function, *args, **options) -> tuple[mk.Scores, mk.Scores]:
    """A sweep run here, and spread; what they measured is the same to the last bit."""
    seen: list[Sweep] = []
    own = Sweep.__init__

    def init(self, *values):
        own(self, *values)
        seen.append(self)

    monkeypatch.setattr(Sweep, "__init__", init)
    scores = [function(*args, progress=False, **options, **how) for how in ({}, {"engine": "ray", "workers": 2})]
    here, there = seen
    for name in ("patched", "done", "base", "source"):
        assert torch.equal(getattr(here, name), getattr(there, name)), name
    pd.testing.assert_frame_equal(scores[0].frame, scores[1].frame, check_exact=True)
    return scores[0], scores[1]


def listening(process: psutil.Process) -> list[str]:
    """The addresses on which a process and those that it started listen."""
    found = []
    for one in [process, *process.children(recursive=True)]:
        inodes = set()
        for link in Path(f"/proc/{one.pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(link))
            except OSError:  # closed by now
                continue
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{one.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:  # it listens, and is this process's
                    words = bytes.fromhex(fields[1].split(":")[0])
                    groups = [words[at : at + 4][::-1] for at in range(0, len(words), 4)]
                    found.append(str(ipaddress.ip_address(b"".join(groups))))
    return found


def on_loopback(address: str) -> bool:
    one = ipaddress.ip_address(address)
    mapped = getattr(one, "ipv4_mapped", None)
    return (mapped or one).is_loopback


def test_a_stop_hands_over_what_is_done_and_a_cluster_of_its_own_is_on_loopback_alone(monkeypatch, tmp_path):
    """No cluster was initialised (this test comes first): one is started, looked at, and ended."""
    assert not ray.is_initialized()
    model, task, path = tiny("gpt2"), tiny_task(n=6), tmp_path / "sweep"
    saves, found, inside = checkpoints.Checkpoint.save_now_and_then, [], []

    def stop(self):
        saves(self)
        inside.append(ray.is_initialized())
        if len(inside) == 3:
            if Path("/proc/net/tcp").exists():
                found.extend(listening(psutil.Process()))
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.Checkpoint, "save_now_and_then", stop)
        with pytest.raises(Interrupted, match="the same call goes on from there") as caught:
            mk.patch(model, task, engine="ray", checkpoint=path, progress=False)
    assert inside == [True] * 3
    assert not ray.is_initialized()
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
    if Path("/proc/net/tcp").exists():
        assert len(found) > 3
        assert [one for one in found if not on_loopback(one)] == []
    whole = mk.patch(model, task, progress=False)
    assert 0 < len(caught.value.scores.frame) < len(whole.frame)
    # What was spread goes on here.
    rest = mk.patch(model, task, checkpoint=path, progress=False)
    pd.testing.assert_frame_equal(whole.frame, rest.frame, check_exact=True)


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # the second with grouped queries
def test_patching_is_the_same(initialised, monkeypatch, family):
    both(monkeypatch, mk.patch, tiny(family), tiny_task(n=6), "heads mlps resid", positions="each")
    assert ray.is_initialized()


def test_patching_paths_is_the_same(initialised, monkeypatch):
    tiny("llama").hf(
        torch.tensor([[1, 2]]), output_hidden_states=True
    )  # leaves hooks on its modules that refer to a ContextVar
    both(monkeypatch, mk.path_patch, tiny("llama"), tiny_task(n=6), ["2.1.q", "2.kv0.v"])


def test_metrics_of_the_clean_run_and_receivers_one_by_one(initialised, monkeypatch):
    monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", 3072)  # receivers are batched by what is free there
    task = tiny_task(n=40).with_metric("kl")
    both(monkeypatch, mk.path_patch, tiny("gpt2"), task, ["logits", "2.1.q"], each=True)


def test_a_model_in_a_folder_is_loaded_there(initialised, monkeypatch, tmp_path):
    plain("qwen2", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)  # the workers have another working directory
    model = mk.load("./model", device="cpu", dtype="bfloat16")
    both(monkeypatch, mk.patch, model, tiny_task(n=6))
    with torch.no_grad():
        next(model.hf.parameters()).mul_(2)  # here, and not in the folder
    vars(model).pop("weights_hash", None)
    with pytest.raises(VersionError, match=r"A worker has weights .* edited after loading"):
        mk.patch(model, tiny_task(), engine="ray", workers=1, progress=False)


def killer(flag: Path, always: bool = False):
    """A metric that kills its worker: once, or whenever it sees the last prompt."""
    here = os.getpid()

    def metric(logits, task):
        if os.getpid() != here and (task.correct == 90).any() and (always or not flag.exists()):
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return logits[:, 5] - logits[:, 7]

    return metric


def marked(metric) -> mk.Task:
    """A task whose last prompt has an answer of its own."""
    task = tiny_task(n=6)
    correct = task.correct.clone().clamp(max=80)
    correct[-1] = 90
    return mk.Task.from_tokens(task.clean, task.corrupt, correct, correct + 1, name="tiny", metric=metric)


@pytest.mark.skipif(os.name != "posix", reason="kills a worker by a signal that Windows does not have")
def test_a_worker_that_is_killed_is_replaced(initialised, monkeypatch, tmp_path):
    both(monkeypatch, mk.patch, tiny("llama"), marked(killer(tmp_path / "killed")))
    assert (tmp_path / "killed").exists()


@pytest.mark.skipif(os.name != "posix", reason="kills a worker by a signal that Windows does not have")
def test_work_that_kills_every_worker_is_named_and_the_rest_is_kept(initialised, tmp_path):
    task = marked(killer(tmp_path / "killed", always=True))
    with pytest.raises(WorkerLostError, match=r"3 workers were lost while they patched .*0\.\d.*prompts .*5"):
        mk.patch(tiny("llama"), task, engine="ray", workers=1, checkpoint=tmp_path / "sweep", progress=False)
    whole = mk.patch(tiny("llama"), task, progress=False)  # here it kills nobody
    again = mk.patch(tiny("llama"), task, checkpoint=tmp_path / "sweep", progress=False)
    pd.testing.assert_frame_equal(whole.frame, again.frame, check_exact=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "dask"}, 'Expected "local" or "ray"'),
        ({"workers": 2}, 'Expected engine="ray"'),
        ({"engine": "ray", "workers": 0}, "1 or more"),
        ({"engine": "ray", "workers": 1.5}, "1 or more"),
    ],
)
def test_odd_engines_are_refused(options, says):
    for function in (mk.patch, mk.path_patch):
        with pytest.raises(OptionError, match=says):
            function(tiny("gpt2"), tiny_task(), progress=False, **options)


def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(spread.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r'pip install "mechkit-interp\[ray\]"'):
        mk.patch(tiny("gpt2"), tiny_task(), engine="ray")


def test_a_model_that_runs_elsewhere_is_refused(monkeypatch):
    monkeypatch.setattr(spread, "elsewhere", lambda model: object())
    with pytest.raises(UnsupportedError, match="which runs elsewhere"):
        mk.path_patch(tiny("gpt2"), tiny_task(), engine="ray")
