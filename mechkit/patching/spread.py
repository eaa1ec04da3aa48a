"""A sweep's batches, spread over the workers of a Ray cluster, one model each.

1. The cluster is the one that the user has initialised (``ray.init``); where there is none, one is started on this
   machine, on loopback alone, and ended afterwards.
2. Workers get the model (``workers``), and say what they have; anything else than what is here is an error.
3. Batches are those of the sweep run here: the same groups, and as many variants at once, which is decided here. What
   comes back is the same to the last bit, in whatever order it comes.
4. A worker has one batch at a time, and keeps the base run of its group. When it is lost, another takes its place, and
   the batch is given to whoever is free. A batch that costs three workers is an error.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..backends.elsewhere import elsewhere
from ..errors import OptionError, UnsupportedError, WorkerLostError, first_line
from .variants import Bases, Outcome, Todo
from .workers import check, cluster, how_many, maker, state

if TYPE_CHECKING:
    from ..model import Model

Engine: TypeAlias = Literal["local", "ray"]

_TRIES = 3  # of a batch, or of a worker before it has a model


def check_engine(model: Model, engine: str, workers: int | None) -> None:
    """Whether a sweep of a model can be run in that way.

    Raises:
        OptionError: an engine that there is not, or is not installed; a number of workers that cannot be.
        UnsupportedError: a model that runs elsewhere, or on several devices.
    """
    if engine not in ("local", "ray"):
        raise OptionError(f"engine = {engine!r}", expected='"local" or "ray"')
    if workers is not None and (engine == "local" or not isinstance(workers, int) or workers < 1):
        raise OptionError(f"workers = {workers!r} with engine={engine!r}", expected='engine="ray" and 1 or more')
    if engine == "local":
        return
    if elsewhere(model) is not None:
        raise UnsupportedError(
            f'engine="ray" with {model.name}, which runs elsewhere', expected="a model that was loaded here"
        )
    if len({parameter.device for parameter in model.hf.parameters()}) > 1:
        raise UnsupportedError(f'engine="ray" with {model.name} on several devices', expected="a model on one device")
    if importlib.util.find_spec("ray") is None:
        raise OptionError('engine="ray", and Ray is not installed', fix='pip install "mechkit-interp[ray]"')


def spread(bases: Bases, todo: Sequence[Todo], workers: int | None = None) -> Generator[Outcome, None, None]:
    """What comes of all variants, batch by batch, as the workers give it.

    Args:
        bases: what runs here.
        todo: which variants.
        workers: how many; None: as many as the cluster has GPUs, where the model is on one, else half as many as it
            has CPUs.

    Raises:
        WorkerLostError: the workers were lost again and again, on one batch or before they had one.
        VersionError: a worker's weights or versions are not those of this process.
        OptionError: the model is on a GPU, and the cluster has none.
        UnsupportedError: a model that has no name, and cannot be sent.
        MechkitError: what a worker raised.
    """
    jobs, left = _batches(bases, todo), sum(len(one.pairs) for one in todo)
    if not left:
        return
    with cluster(workers) as ray:
        count = min(how_many(ray, bases.model, workers), left)
        make = maker(ray, bases, count)
        here, lost = state(bases.model), Counter[Any]()
        crew: list[Any] = []
        running: dict[Any, tuple[Any, Any]] = {}  # what a worker was asked for, and which batch that is
        idle: list[Any] = []
        back: list[Any] = []  # batches whose workers were lost

        def hire() -> None:
            worker, ready = make()
            crew.append(worker)
            running[ready] = worker, None

        try:
            for _ in range(count):
                hire()
            while left:
                for asked in ray.wait(list(running))[0]:
                    worker, job = running.pop(asked)
                    try:
                        found = ray.get(asked)
                    except ray.exceptions.RayTaskError as error:
                        raise (error.cause or error) from None  # as if it had been raised here
                    except ray.exceptions.RayError as error:  # the worker, its machine, or what it gave is no more
                        ray.kill(worker)
                        lost[job] += 1
                        if lost[job] >= _TRIES * (count if job is None else 1):
                            raise _lost(bases, job, error) from error
                        back += [] if job is None else [job]
                        hire()
                        continue
                    idle.append(worker)
                    if job is None:
                        check(here, found)
                        lost.pop(None, None)
                        continue
                    for pairs, values, rows in found:
                        left -= len(pairs)
                        yield job.number, pairs, values, rows
                while idle and (job := back.pop() if back else next(jobs, None)) is not None:
                    worker = idle.pop()
                    running[worker.run.remote(job.number, job.pairs, job.rows)] = worker, job
        finally:
            for worker in crew:
                with suppress(ray.exceptions.RayError):
                    ray.kill(worker)


def _batches(bases: Bases, todo: Sequence[Todo]) -> Iterator[Todo]:
    """The batches of the sweep run here; how many variants are in one is found out when its group's turn comes."""
    for one in todo:
        rows = one.rows or bases.at_once(one.number)
        for pairs in one.pairs.split(rows):
            yield Todo(one.number, pairs, rows)


def _lost(bases: Bases, job: Todo | None, error: Exception) -> WorkerLostError:
    why = first_line(error)
    if job is None:
        return WorkerLostError(f"Workers were lost again and again before they had a model: {why}")
    sites = list(dict.fromkeys(str(bases.work.cells[i].site) for i in job.pairs[:, 0].tolist()))
    some = " ".join(sites[:8]) + (f" and {len(sites) - 8} more" if len(sites) > 8 else "")
    prompts = ", ".join(map(str, job.pairs[:, 1].unique().tolist()[:8]))
    return WorkerLostError(
        f"{_TRIES} workers were lost while they patched {some} (prompts {prompts}): {why}",
        fix="Most often memory ran out: take shorter prompts, or fewer workers. With checkpoint=path all else is kept",
    )
