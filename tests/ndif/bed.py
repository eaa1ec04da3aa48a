"""NDIF, all of it, on this machine's loopback; runs with the server's Python (tests/ndif/requirements.txt).

    python tests/ndif/bed.py --folder runs/ndif [-- command ...]

1. Redis, an S3 store, Ray's head, NDIF's controller and its API are started in this order, each as a child process with
   its log in the folder; the next one starts when the one before answers.
2. The command runs with ``MECHKIT_NDIF_HOST`` set; without one, the bed stays until it is interrupted.
3. All children are ended by their process ids, Ray's by those of its session.

NDIF places models by GPU memory. Ray is told of a GPU that is not there, and models go to the CPU (cpu_actor.py). So
configured, NDIF asks nobody who they are, and whoever reaches the API can run code here: hence loopback only, and
``tests/ndif/apart.py``, which runs the bed in a network namespace that has nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Ray's workers take ports from 10002 to 19999.
PORTS = {"redis": 20379, "store": 20900, "ray": 20378, "client": 20001, "dashboard": 20265, "api": 20081}
PATIENCE = 180  # seconds for each part to answer


def environment(folder: Path) -> dict[str, str]:
    """What every part is told."""
    token = folder / "ray-token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    bin_ = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": bin_ + os.pathsep + os.environ["PATH"],
        "PYTHONPATH": str(HERE),
        "NDIF_HOME": str(folder / "home"),
        "NDIF_REDIS_URL": f"redis://127.0.0.1:{PORTS['redis']}",
        "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{PORTS['store']}",
        "NDIF_API_URL": f"http://127.0.0.1:{PORTS['api']}",
        "NDIF_API_PORT": str(PORTS["api"]),
        "NDIF_RAY_ADDRESS": f"ray://127.0.0.1:{PORTS['client']}",
        "NDIF_RAY_HEAD_PORT": str(PORTS["ray"]),
        "NDIF_DEFAULT_DTYPE": "float32",
        "NDIF_DEFAULT_PADDING_BIAS": "1000000",
        "NDIF_DEFAULT_MODEL_ACTOR_CLASS": "cpu_actor.CPUModelActor",
        "NDIF_INFLUX_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(os.cpu_count() or 1),  # Ray would give a model one thread
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray listens on every address, not on 127.0.0.1
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def parts(folder: Path, short: Path) -> Iterator[tuple[str, list[str], Callable[[], bool]]]:
    """Name, command and test of each part, in order; sockets have short names, so Ray has a ``short`` folder."""
    python, loopback = sys.executable, "127.0.0.1"
    port = {name: str(number) for name, number in PORTS.items()}
    redis = ["redis-server", "--bind", loopback, "--port", port["redis"], "--save", "", "--dir", str(folder)]
    yield "redis", redis, lambda: answers(PORTS["redis"])
    yield "store", ["moto_server", "-H", loopback, "-p", port["store"]], lambda: answers(PORTS["store"])
    head = ["ray", "start", "--head", "--block", f"--node-ip-address={loopback}", f"--port={port['ray']}"]
    head += [f"--ray-client-server-port={port['client']}", f"--dashboard-port={port['dashboard']}"]
    head += ["--dashboard-host=127.0.0.1", "--num-gpus=1", "--num-cpus=4", f"--temp-dir={short}"]
    resources = {"head": 10, "cuda_memory_bytes": 4_000_000_000, "cpu_memory_bytes": 8_000_000_000}
    yield "ray", [*head, f"--resources={json.dumps(resources)}"], lambda: answers(PORTS["client"])
    controller = "ndif.services.ray.deployments.controller.controller"
    yield "controller", [python, "-m", controller], lambda: False
    api = ["gunicorn", "--config", "python:ndif.services.api.gunicorn_conf", "--bind", f"{loopback}:{port['api']}"]
    yield "api", [*api, "ndif.services.api.app:app"], lambda: status() is not None


def answers(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def status() -> dict | None:
    """What NDIF says of its models, or None."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORTS['api']}/status", timeout=30) as reply:
            return json.loads(reply.read())
    except (OSError, ValueError):
        return None


@contextmanager
def running(folder: Path) -> Iterator[Mapping[str, str]]:
    """The bed; gives the environment that its parts have.

    Raises:
        RuntimeError: a part ended, or did not answer in time; the message has the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = environment(folder)
    started: list[subprocess.Popen] = []
    short = Path(tempfile.mkdtemp(prefix="ray-"))
    try:
        for name, command, ready in parts(folder, short):
            log = folder / f"{name}.log"
            with log.open("w") as out:
                one = subprocess.Popen(
                    command, env=told, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
            started.append(one)
            if name == "controller":  # launches an actor that stays, and ends
                if one.wait(PATIENCE):
                    raise RuntimeError(f"{name} failed:\n{log.read_text()[-3000:]}")
                continue
            _wait(name, one, ready, log)
        yield told
    finally:
        for one in reversed(started):
            _end(one)
        shutil.rmtree(short, ignore_errors=True)


def _wait(name: str, process: subprocess.Popen, ready: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            how = "ended" if process.poll() is not None else f"has not answered for {PATIENCE} s"
            raise RuntimeError(f"{name} {how}:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)


def _end(process: subprocess.Popen) -> None:
    """End a process and those that it started: each part leads a session of its own, Ray's daemons among them."""
    for way in (signal.SIGTERM, signal.SIGKILL):
        for pid in _session(process.pid):
            try:
                os.kill(pid, way)
            except ProcessLookupError:
                continue
        end = time.monotonic() + 15
        while _session(process.pid) and time.monotonic() < end:
            process.poll()
            time.sleep(0.2)


def _session(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's exit status."""
    parser = argparse.ArgumentParser(description="NDIF on loopback")
    parser.add_argument("--folder", type=Path, required=True, help="logs, and what the parts keep")
    parser.add_argument("command", nargs="*", help="what runs beside it")
    given = parser.parse_args(arguments)
    with running(given.folder.resolve()) as told:
        print(f"NDIF answers on http://127.0.0.1:{PORTS['api']}", flush=True)
        if not given.command:
            signal.pause()
        own = {"MECHKIT_NDIF_HOST": told["NDIF_API_URL"], "MECHKIT_NDIF_FOLDER": str(given.folder.resolve())}
        return subprocess.call(given.command, env={**os.environ, **own})


if __name__ == "__main__":
    sys.exit(main())
