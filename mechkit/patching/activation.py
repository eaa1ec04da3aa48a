"""Activation patching: how much of the behaviour does one site carry?

1. Denoising: run the corrupt prompt with one site set to its value on the clean prompt. Noising is the reverse.
2. The effect is (patched - base) / (source - base), means over prompts: the fraction of the metric gap between the
   two prompts that this one site moves. 1 is all of it; negative sites work against the behaviour.
3. The standard error is that of the mean over prompts, the gap taken as known.

Meng et al. 2022 (arXiv 2202.05262), causal tracing; Wang et al. 2022 (arXiv 2211.00593), section 3.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ..errors import MetricError, OptionError, SiteError, UnsupportedError
from ..results import Scores, provenance
from ..sites import Site, SitesLike
from ..sites import sites as read_sites
from .sweep import WRITABLE, Cell, sweep

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task

_KINDS = ("heads", "mlps", "resid")


def patch(
    model: Model,
    task: Task,
    sites: SitesLike = "heads",
    positions: Literal["all", "each"] | str | int | Sequence[int] = "all",
    direction: Literal["denoise", "noise"] = "denoise",
    progress: bool = True,
) -> Scores:
    """Patch each site by itself, on every prompt of the task.

    Args:
        model: any loaded model.
        task: pairs of prompts, and the metric.
        sites: ``"heads"``, ``"mlps"``, ``"resid"`` (the stream entering each block, and leaving the last), or
            addresses such as ``"9.9 m10 resid.4"``.
        positions: ``"all"`` at once; ``"each"`` by itself; a span of the task, such as ``"END"``; a position; or
            several, each by itself.
        direction: ``"denoise"``: clean into corrupt; ``"noise"``: corrupt into clean.
        progress: show a bar.

    Returns:
        Scores in fractions of the metric gap, one row a site (and position).

    Raises:
        SiteError, TaskError, OptionError: see each kind.
        MetricError: the metric is the same on clean and corrupt prompts, so that no fraction is defined.
    """
    started = time.perf_counter()
    if direction not in ("denoise", "noise"):
        raise OptionError(f"direction = {direction!r}", expected='"denoise" or "noise"')
    places = _places(task, positions)
    cells = [Cell(one, where) for one in _sites(model, sites) for where in places]
    pair = (task.corrupt, task.clean) if direction == "denoise" else (task.clean, task.corrupt)
    done = sweep(model, task, cells, base=pair[0], source=pair[1], metric=task.metric, progress=progress)
    gap = float((done.source - done.base).mean())
    if abs(gap) < 1e-6:
        raise MetricError(
            f'{task.metric.name} is {float(done.base.mean()):.4g} on clean and corrupt prompts of "{task.name}" alike',
            expected="a metric that tells them apart",
        )
    effects = ((done.patched - done.base) / gap).double().numpy()
    rows = [
        {
            "site": str(cell.site),
            "layer": cell.site.layer,
            "head": cell.site.head,
            "kind": cell.site.kind,
            **({} if positions == "all" else {"position": cell.positions}),
        }
        for cell in cells
    ]
    frame = pd.DataFrame(rows).assign(
        score=effects.mean(1),
        metric=done.patched.double().mean(1).numpy(),
        se=_standard_error(effects),
        n=len(task),
    )
    frame["head"] = frame["head"].astype("Int64")
    options: dict[str, Any] = {
        "sites": sites if isinstance(sites, str) else str(sites),
        "positions": positions if isinstance(positions, str | int) else list(positions),
        "direction": direction,
        "base_metric": float(done.base.mean()),
        "source_metric": float(done.source.mean()),
    }
    meta = provenance(model, task, "patch", time.perf_counter() - started, **options)
    return Scores(frame, "fraction of the metric gap", meta)


def _sites(model: Model, wanted: SitesLike) -> list[Site]:
    if isinstance(wanted, str) and wanted in _KINDS:
        if wanted == "heads":
            return list(model.heads())
        kind, count = ("mlp", model.n_layers) if wanted == "mlps" else ("resid", model.n_layers + 1)
        return [Site(layer, None, kind) for layer in range(count)]
    chosen = [model.info.check(one) for one in read_sites(wanted)]
    if not chosen:
        raise SiteError("No sites to patch", expected="heads, mlps, resid, or addresses")
    for one in chosen:
        if one.kind not in WRITABLE:
            raise UnsupportedError(f'Patching "{one}"', expected="a head's output, an MLP or the residual stream")
    return chosen


def _places(task: Task, positions: str | int | Iterable[int]) -> list[str | int | None]:
    if isinstance(positions, str):
        if positions == "all":
            return [None]
        if positions == "each":
            return list(range(task.clean.shape[1]))
        task.span(positions)
        return [positions]
    chosen = [positions] if isinstance(positions, int) else list(positions)
    width = task.clean.shape[1]
    if not chosen or not all(isinstance(p, int) and 0 <= p < width for p in chosen):
        raise OptionError(
            f"positions = {positions!r}",
            expected=f'"all", "each", a span, or positions from 0 to {width - 1}',
        )
    return list(chosen)


def _standard_error(effects: np.ndarray) -> np.ndarray:
    n = effects.shape[1]
    return effects.std(1, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(effects), np.nan)
