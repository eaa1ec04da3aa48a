"""What goes wrong between here and a running NDIF, each by its own error, with nothing lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import elsewhere
import pytest
import torch
from service import FOLDER, HOST, running, smollm2, tiny, workers

import mechkit as mk
from mechkit.errors import (
    ConnectionCutError,
    NoSuchJobError,
    NoSuchModelError,
    ParcelError,
    RefusedError,
    ServerError,
    TooLongError,
    UnreachableError,
    VersionError,
    WorkerLostError,
)

pytestmark = running


@pytest.fixture
def once(monkeypatch):
    """Nothing is sent twice."""
    monkeypatch.setattr("mechkit.remote.line._WAITS", ())


@contextmanager
def _relay(say: bytes = b"", cut_after: float | None = None):
    """A server that answers every request with some bytes, or hands on to NDIF and cuts the line after a while."""
    listener = socket.create_server(("127.0.0.1", 0))
    target = HOST.removeprefix("http://").split(":")

    def hand_on(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            pass

    def cut(*ends: socket.socket) -> None:
        for one in ends:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            if cut_after is None:
                client.recv(1 << 16)
                client.sendall(say)
                client.close()
                continue
            other = socket.create_connection((target[0], int(target[1])))
            for pair in ((client, other), (other, client)):
                threading.Thread(target=hand_on, args=pair, daemon=True).start()
            threading.Timer(cut_after, cut, (client, other)).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def _reply(status: str, detail: str) -> bytes:
    body = f'{{"detail": "{detail}"}}'
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return (head + f"Connection: close\r\n\r\n{body}").encode()


def _sent_to(host: str, family: str = "llama") -> mk.Model:
    return mk.load(elsewhere.folder(FOLDER / "models", family), remote=host)


def _slow(logits: torch.Tensor, task: mk.Task) -> torch.Tensor:
    import time

    time.sleep(1.0)
    return logits[:, 0] - logits[:, 1]


def test_nobody_is_there(once):
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9 does not answer"):
        _sent_to("http://127.0.0.1:9").run(elsewhere.TASK().clean)


@pytest.mark.parametrize(
    ("status", "said", "kind", "match"),
    [
        ("503 Service Unavailable", "Service temporarily unavailable: reconnecting.", UnreachableError, "not answer"),
        ("403 Forbidden", "Invalid API key.", RefusedError, "NDIF_API_KEY"),
        ("400 Bad Request", "Client nnsight version 0.8.1 is below the minimum supported 0.9.", VersionError, "these"),
    ],
)
def test_what_the_service_says_before_any_work(once, status, said, kind, match):
    with _relay(_reply(status, said)) as host:
        far = _sent_to(host)
        with pytest.raises(kind, match=match) as caught:
            far.run(elsewhere.TASK().clean)
    assert said in caught.value.server


def test_a_model_that_is_not_there(tmp_path, once):
    place = elsewhere.folder(tmp_path, "llama")
    far = mk.load(place, remote=HOST)
    for one in place.iterdir():
        one.unlink()
    with pytest.raises(NoSuchModelError, match="cannot bring up tiny-llama") as caught:
        far.run(elsewhere.TASK().clean)
    assert caught.value.server


def test_a_mistake_in_ones_own_metric():
    def broken(logits: torch.Tensor, task: mk.Task) -> torch.Tensor:
        return logits @ torch.zeros(3, 3)

    with pytest.raises(ServerError, match="in broken") as caught:
        mk.patch(tiny("llama")[0], elsewhere.TASK().with_metric(broken), "mlps", progress=False)
    assert "RuntimeError" in caught.value.server


def test_a_metric_that_cannot_be_sent():
    lock = threading.Lock()
    task = elsewhere.TASK().with_metric(lambda logits, task: (logits[:, 0], lock)[0])
    with pytest.raises(ParcelError, match="cannot pickle"):
        mk.patch(tiny("llama")[0], task, "mlps", progress=False)


def test_nothing_is_heard_for_too_long(once, monkeypatch):
    far = _sent_to(HOST)
    far.backend.line.patience = 1.0
    with pytest.raises(TooLongError, match="Nothing was heard"):
        mk.patch(far, elsewhere.TASK().with_metric(lambda logits, task: _slow(logits, task)), "heads", progress=False)


def test_the_line_is_cut(once):
    with _relay(cut_after=1.5) as host:
        task = elsewhere.TASK().with_metric(lambda logits, task: _slow(logits, task))
        with pytest.raises(ConnectionCutError, match="ended while work was under way"):
            mk.patch(_sent_to(host), task, "heads", progress=False)


def test_the_worker_is_killed(once, tmp_path):
    far, _ = tiny("llama")
    begun, failed = tmp_path / "begun", []
    place = str(begun)

    def slow(logits: torch.Tensor, task: mk.Task) -> torch.Tensor:
        import pathlib
        import time

        pathlib.Path(place).touch()  # the server is this machine
        time.sleep(1.0)
        return logits[:, 0] - logits[:, 1]

    def work() -> None:
        try:
            mk.patch(far, elsewhere.TASK().with_metric(slow), "heads", progress=False)
        except WorkerLostError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    end = time.monotonic() + 120
    while not begun.exists() and time.monotonic() < end:
        time.sleep(0.1)
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    thread.join(120)
    assert failed
    assert "ended" in str(failed[0])


def test_no_such_job():
    with pytest.raises(NoSuchJobError, match="knows no job 'nothing'"):
        mk.remote.job("nothing", tiny("llama")[0]).result()


@pytest.mark.real_model
def test_a_sweep_survives_its_worker(tmp_path, monkeypatch):
    """The worker is killed in the middle of a checkpointed sweep; the table is the same."""
    far, own = smollm2()
    monkeypatch.setitem(sys.modules["mechkit.backends.remote"]._SECONDS, True, 1.0)
    task = mk.tasks.ioi(own, n=4, seed=5)
    kept = tmp_path / "kept.npz"

    def kill() -> None:
        while not kept.exists():
            time.sleep(0.1)
        for pid in workers():
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    ours = mk.patch(far, task, "heads", checkpoint=kept, progress=False)
    thread.join()
    elsewhere.same(ours, mk.patch(own, task, "heads", progress=False))


@pytest.mark.real_model
def test_a_sweep_survives_its_client(tmp_path):
    """The client is killed in the middle of a checkpointed sweep; started again, it gives the same table."""
    far, own = smollm2()
    kept = tmp_path / "kept.npz"
    text = f"""
import mechkit as mk
from mechkit.backends import remote
remote._SECONDS[True] = 1.0
far = mk.load("smollm2-135m", remote={HOST!r})
mk.patch(far, mk.tasks.ioi(far, n=4, seed=5), "heads", checkpoint={str(kept)!r}, progress=False)
"""
    client = subprocess.Popen([sys.executable, "-c", text])
    while not kept.exists():
        assert client.poll() is None
        time.sleep(0.1)
    client.kill()
    client.wait()
    task = mk.tasks.ioi(own, n=4, seed=5)
    ours = mk.patch(far, task, "heads", checkpoint=kept, progress=False)
    elsewhere.same(ours, mk.patch(own, task, "heads", progress=False))
