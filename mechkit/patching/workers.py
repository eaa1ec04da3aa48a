"""Workers of a Ray cluster that have a model, and the cluster itself.

1. A worker gets the model by its name, where it has one that means the same elsewhere: it is loaded there once more.
   One that was made here is sent as it stands, once, with whatever was done to it.
2. Workers on CPUs share the threads among them. The precision of matrix products is that of this process.
3. A worker says what it has, weights and versions, to be compared with what is here.
4. Ray listens on the network unless it takes itself to be on Windows or a Mac. A cluster that is started here is told
   so; that its address is the loopback's is looked at before it is used.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OptionError, UnsupportedError, VersionError, first_line
from ..results import versions
from .groups import Group
from .variants import Bases, Work

if TYPE_CHECKING:
    from ..model import Model

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class _Worker:
    """A model, and what is swept, in a process of its own."""

    def start(self, source: Any, work: Work, groups: Sequence[Group], threads: int, precision: str) -> dict[str, Any]:
        """Load the model; gives what it is and runs on."""
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        model = _received(source)
        self._bases = Bases(model, work, groups)
        return state(model)

    def run(self, number: int, pairs: Tensor, rows: int) -> list[tuple[Tensor, Tensor, int]]:
        """The metric of some variants; see ``Bases.run``."""
        return list(self._bases.run(number, pairs, rows))


def how_many(ray: Any, model: Model, workers: int | None) -> int:
    """Workers of a model: as asked for; or one a GPU, or one for every two CPUs.

    Raises:
        OptionError: the model is on a GPU, and the cluster has none.
    """
    there = ray.cluster_resources()
    if not _on_gpu(model):
        return workers or max(1, int(there.get("CPU", 0)) // 2)
    if not there.get("GPU"):
        raise OptionError('engine="ray" with a model on a GPU, on a cluster that has none', fix='Load it on "cpu"')
    return workers or int(there["GPU"])


def maker(ray: Any, bases: Bases, count: int) -> Callable[[], tuple[Any, Any]]:
    """A function that makes a worker, and gives it and what will say that it is ready.

    Args:
        ray: the module, connected.
        bases: what runs here.
        count: how many workers there will be.

    Raises:
        UnsupportedError: the model cannot be sent.
    """
    model, work = bases.model, bases.work
    at_each = -(-count // max(1, int(ray.cluster_resources().get("GPU", 0))))  # GPU
    # Of one CPU each, however many threads it runs: what holds all CPUs of a cluster starves the rest of it.
    kind = ray.remote(
        num_cpus=1, num_gpus=1 / at_each if _on_gpu(model) else 0, max_restarts=0, scheduling_strategy="SPREAD"
    )(_Worker)
    work = work if work.clean is None else replace(work, clean=work.clean.cpu())
    given = [ray.put(one) for one in (_sent(model), work, bases.groups)]
    there = int(ray.cluster_resources().get("CPU", 1)) // count
    threads, precision = max(1, min(torch.get_num_threads(), there)), torch.get_float32_matmul_precision()

    def make() -> tuple[Any, Any]:
        worker = kind.remote()
        return worker, worker.start.remote(*given, threads, precision)

    return make


def _on_gpu(model: Model) -> bool:
    return model.info.device.startswith("cuda")


def _sent(model: Model) -> tuple[str, Any]:
    """What a worker needs to have the same model.

    Raises:
        UnsupportedError: it has no name, and something in it cannot be pickled.
    """
    kind, info = model.source.get("kind"), model.info
    if kind in ("packaged", "hub", "folder", "gguf"):
        named = model.name
        if "path" in model.source:  # a worker has another working directory
            named = str(Path(model.source["path"]).expanduser().resolve())
        how = {"dtype": info.dtype, "device": info.device.split(":")[0]}
        return "named", (named, {**how, "revision": model.source.get("revision")})
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        """Takes tensors off their device (a worker's may have another number), and values of this context for unset.

        Once a model of the Hub was asked for `output_hidden_states`, it holds hooks that refer to a ContextVar.
        """

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, ContextVar):
                return _unset, (obj.name,)
            if type(obj) is Tensor and obj.device.type not in ("cpu", "meta"):
                return obj.cpu().__reduce_ex__(self.proto)
            return super().reducer_override(obj)

    backend: Any = model.backend
    file = io.BytesIO()
    try:
        Pickler(file).dump((backend.bridge, info.name, type(backend.sites), backend.parameters))
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise UnsupportedError(
            f"{model.name} cannot be sent to workers: {first_line(error)}",
            fix="Save it with save_pretrained where the workers see it, and load it from that folder",
        ) from error
    return "pickled", (file.getvalue(), info.device.split(":")[0])


def _unset(name: str) -> ContextVar[None]:
    return ContextVar(name, default=None)


def _received(source: tuple[str, Any]) -> Model:
    how, given = source
    if how == "named":
        from ..sources import load

        return load(given[0], **given[1])
    from ..backends.lens import LensBackend
    from ..model import Model

    bridge, name, hooks, parameters = pickle.loads(given[0])
    bridge.original_model.to(given[1])
    return Model(LensBackend(bridge, name, hooks, parameters))


def state(model: Model) -> dict[str, str]:
    """What must be alike here and there for numbers to be alike."""
    return {"weights": model.weights_hash, "dtype": model.info.dtype, **versions()}


def check(here: dict[str, str], there: dict[str, str]) -> None:
    """Whether a worker has what this process has.

    Raises:
        VersionError: it has not.
    """
    if differing := [name for name, value in here.items() if there.get(name) != value]:
        name = differing[0]
        raise VersionError(
            f"A worker has {name} {there.get(name)}, and this process {here[name]}",
            fix="Weights that were edited after loading are not sent; save them, and load them from the folder"
            if name == "weights"
            else "Install the same versions where the workers run",
        )


@contextmanager
def cluster(workers: int | None) -> Iterator[Any]:
    """Ray, connected to the user's cluster, or to one of this machine's own for as long as it is needed.

    Raises:
        UnsupportedError: it cannot be kept off the network.
    """
    import ray

    if ray.is_initialized():
        yield ray
        return
    from ray._private import ray_constants as constants

    # Ray reads the first when it is imported; what it starts, when that is started. Left to itself it would make a
    # token for all clusters to come, and keep it in the user's home.
    own = {_LOOPBACK: "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before, enabled = {name: os.environ.get(name) for name in (*own, "RAY_AUTH_MODE")}, constants.ENABLE_RAY_CLUSTER
    os.environ.update(own)
    constants.ENABLE_RAY_CLUSTER = False
    try:
        cpus = max(os.cpu_count() or 1, workers or 1)
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        if ray.util.get_node_ip_address() != "127.0.0.1":
            raise UnsupportedError(
                f"Ray {ray.__version__} would listen on the network", fix="Start a cluster of your own: ray.init(...)"
            )
        yield ray
    finally:
        ray.shutdown()
        constants.ENABLE_RAY_CLUSTER = enabled
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        with suppress(AttributeError):  # in versions without tokens
            inside: Any = ray
            inside._raylet.Config.initialize("")
            inside._raylet.AuthenticationTokenLoader.instance().reset_cache()
