"""Activation patching: how much of the behaviour does one site carry?

1. Denoising: run the corrupt prompt with one site set to its value on the clean prompt. Noising is the reverse.
2. The effect is (patched - base) / (source - base), means over prompts: the fraction of the metric gap between the
   two prompts that this one site moves. 1 is all of it; negative sites work against the behaviour.
3. The standard error is that of the mean over prompts, the gap taken as known.

Meng et al. 2022 (arXiv 2202.05262), causal tracing; Wang et al. 2022 (arXiv 2211.00593), section 3.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import OptionError
from ..prompts import check_task
from ..results import Scores
from ..sites import SitesLike
from ..tasks.task import Task
from .cells import Cell, PositionsLike, read_patchable, read_places
from .effects import effects, finished
from .spread import Engine, check_engine
from .sweep import sweep

if TYPE_CHECKING:
    from ..model import Model


def patch(
    model: Model,
    task: Task | Sequence[Task],
    sites: SitesLike = "heads",
    positions: PositionsLike = "all",
    direction: Literal["denoise", "noise"] = "denoise",
    checkpoint: str | Path | None = None,
    progress: bool = True,
    engine: Engine = "local",
    workers: int | None = None,
) -> Scores:
    """Patch each site by itself, on every prompt of the task.

    Args:
        model: any loaded model.
        task: pairs of prompts, and the metric; or several tasks with one metric, whose prompts are taken together.
        sites: ``"heads"``, ``"q"``, ``"k"``, ``"v"``, ``"patterns"``, ``"scores"``, ``"mlps"``, ``"resid"`` (the
            stream entering each block, and leaving the last), ``"embed"``, addresses such as ``"9.9 m10 9.kv2.k"``,
            or several of these. On a grouped-query model keys and values are those of the groups.
        positions: ``"all"`` at once; ``"each"`` by itself; a span of the task, such as ``"END"``; a position; or
            several, each by itself. Of patterns and scores they are the queries.
        direction: ``"denoise"``: clean into corrupt; ``"noise"``: corrupt into clean.
        checkpoint: a file that keeps what is done. The same call with the same file goes on from there, and gives
            the same table as if it had never stopped.
        progress: show a bar.
        engine: ``"ray"`` spreads the work over the workers of a Ray cluster, one model each: the one that was
            initialised with ``ray.init``, or else one of this machine's own. The table is the same.
        workers: how many; None: one a GPU of the cluster, for a model on a GPU, else one for every two CPUs.

    Returns:
        Scores in fractions of the metric gap, one row a site (and position).

    Raises:
        SiteError, TaskError, PromptError, OptionError, UnsupportedError: see each kind.
        MetricError: the metric is the same on clean and corrupt prompts, so that no fraction is defined.
        StorageError: a checkpoint of another sweep, or one that cannot be read or written.
        VersionError, WorkerLostError: workers that have another model, or that are lost again and again.
        Interrupted: it was stopped; ``error.scores`` has the sites measured so far, ``n`` saying on how many prompts.
    """
    started = time.perf_counter()
    check_engine(model, engine, workers)
    if direction not in ("denoise", "noise"):
        raise OptionError(f"direction = {direction!r}", expected='"denoise" or "noise"')
    task = task if isinstance(task, Task) else Task.join(task)
    check_task(model, task)
    places = read_places(task, positions)
    cells = [Cell(one, where) for one in read_patchable(model, sites) for where in places]
    pair = (task.corrupt, task.clean) if direction == "denoise" else (task.clean, task.corrupt)
    done = sweep(
        model,
        task,
        cells,
        base=pair[0],
        source=pair[1],
        metric=task.metric,
        checkpoint=checkpoint,
        progress=progress,
        engine=engine,
        workers=workers,
    )
    options: dict[str, Any] = {
        "sites": sites if isinstance(sites, str) else " ".join(dict.fromkeys(str(cell.site) for cell in cells)),
        "positions": positions if isinstance(positions, str | int) else list(positions),
        "direction": direction,
    }
    tables = [effects(cells, done.patched, done, positions != "all")]
    return finished(model, task, tables, done, "patch", started, bool(checkpoint), options)
