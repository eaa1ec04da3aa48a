"""Path patching: how much of the behaviour goes from one part to another, and by no other way?

1. Run both prompts of a pair. The base is the clean one when noising, the corrupt one when denoising.
2. Run the base with the sender set to its value on the other prompt and every other head kept at its base value, at all
   positions. Note what reaches the receivers.
3. Run the base again, the receivers alone set to what reached them.
4. The effect is (patched - base) / (source - base), means over prompts: 0, nothing goes along these paths; 1, all of
   the gap between the two prompts does.

MLPs between run anew on what has changed, so that a path may go through them; with ``through_mlps=False`` they too keep
their base values, and what is left is the direct path from the sender to the receivers. Neither step is run as a whole
forward pass; see ``backends.paths`` for what is run instead.

Wang et al. 2022 (arXiv 2211.00593), section 3.1 and appendix B; Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..backends.protocol import Paths
from ..errors import OptionError, SiteError
from ..prompts import check_task
from ..results import Scores
from ..sites import Site, SitesLike
from ..sites import sites as read_sites
from ..tasks.task import Task
from .cells import Cell, PositionsLike, read_patchable, read_places
from .effects import effects, finished
from .spread import Engine, check_engine
from .sweep import sweep

if TYPE_CHECKING:
    from ..model import Model

_SENDERS = ("z", "mlp", "embed")
_RECEIVERS = ("q", "k", "v", "pattern", "z", "mlp")


def path_patch(
    model: Model,
    task: Task | Sequence[Task],
    receivers: SitesLike = "logits",
    senders: SitesLike = "heads",
    through_mlps: bool = True,
    positions: PositionsLike = "all",
    direction: Literal["denoise", "noise"] = "noise",
    each: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    engine: Engine = "local",
    workers: int | None = None,
) -> Scores:
    """Patch the paths from each sender to the receivers.

    Args:
        model: any loaded model.
        task: pairs of prompts, and the metric; or several tasks with one metric, whose prompts are taken together.
        receivers: ``"logits"``; or addresses: ``"9.9.q"``, ``.k``, ``.v``, ``.pattern``, a head's output ``"9.9"``, or
            an MLP ``"m9"``. On a grouped-query model ``"9.9.k"`` is read as the group's, ``"9.kv2.k"``.
        senders: ``"heads"``, ``"mlps"``, ``"embed"``, several of these words, or addresses. Of words, those that come
            before a receiver.
        through_mlps: paths may run through the MLPs between; False: direct paths only.
        positions: at which the sender is patched: ``"all"`` at once; ``"each"`` by itself; a span of the task, such as
            ``"END"``; a position; or several, each by itself.
        direction: ``"noise"``: corrupt into clean; ``"denoise"``: clean into corrupt.
        each: every receiver by itself, a row a sender and receiver; otherwise all of them are patched together.
        checkpoint: a file that keeps what is done; the same call with the same file goes on from there.
        progress: show a bar.
        engine: ``"ray"`` spreads the work over the workers of a Ray cluster, one model each: the one that was
            initialised with ``ray.init``, or else one of this machine's own. The table is the same.
        workers: how many; None: one a GPU of the cluster, for a model on a GPU, else one for every two CPUs.

    Returns:
        Scores in fractions of the metric gap, one row a sender (and position, and receiver): columns ``sender``,
        ``receiver`` and those of every ``Scores``; ``site`` is the sender.

    Raises:
        SiteError: an address that this model does not have, or that cannot send or receive; a named sender that comes
            before no receiver.
        OptionError: an unknown direction, or the logits patched together with other receivers.
        MetricError: the metric is the same on clean and corrupt prompts.
        TaskError, PromptError, UnsupportedError, StorageError, Interrupted: as of ``mk.patch``.
    """
    started = time.perf_counter()
    check_engine(model, engine, workers)
    if direction not in ("denoise", "noise"):
        raise OptionError(f"direction = {direction!r}", expected='"denoise" or "noise"')
    task = task if isinstance(task, Task) else Task.join(task)
    check_task(model, task)
    targets = _receivers(model, receivers, each)
    chosen = _senders(model, senders, targets)
    places = read_places(task, positions)
    cells = [Cell(one, where) for one in chosen for where in places]
    base, source = (task.corrupt, task.clean) if direction == "denoise" else (task.clean, task.corrupt)
    done = sweep(
        model,
        task,
        cells,
        base=base,
        source=source,
        metric=task.metric,
        paths=Paths(targets, through_mlps, each),
        checkpoint=checkpoint,
        progress=progress,
        engine=engine,
        workers=workers,
    )
    columns = [(one,) for one in targets] if each else [targets]
    tables = []
    for i, some in enumerate(columns):
        values = done.patched[..., i] if each else done.patched
        table = effects(cells, values, done, positions != "all")
        table.insert(0, "sender", table["site"])
        table.insert(1, "receiver", " ".join(map(str, some)))
        reaching = {str(one) for one in chosen if any(comes_before(model, one, target) for target in some)}
        tables.append(table[table["sender"].isin(reaching)])
    options = {
        "receivers": " ".join(map(str, targets)),
        "senders": senders if isinstance(senders, str) else " ".join(map(str, chosen)),
        "through_mlps": through_mlps,
        "positions": positions if isinstance(positions, str | int) else list(positions),
        "direction": direction,
        "each": each,
    }
    return finished(model, task, tables, done, "path_patch", started, bool(checkpoint), options)


def comes_before(model: Model, sender: Site, receiver: Site) -> bool:
    """Whether what a sender writes to the stream is there when a receiver reads it."""
    if receiver.kind == "logits" or sender.kind == "embed":
        return True
    if receiver.kind == "mlp" and sender.kind == "z":
        return sender.layer < receiver.layer + (not model.backend.parallel)
    return sender.layer < receiver.layer


def _receivers(model: Model, wanted: SitesLike, each: bool) -> tuple[Site, ...]:
    found = list(dict.fromkeys(model.info.shared(model.info.check(one)) for one in read_sites(wanted)))
    if not found:
        raise SiteError("No receivers", expected='"logits", or addresses such as "9.9.q"')
    for one in found:
        if one.kind not in (*_RECEIVERS, "logits"):
            raise SiteError(
                f'"{one}" as a receiver',
                expected='"logits", "9.9.q", "9.9.k", "9.9.v", "9.9.pattern", "9.9" or "m9"',
            )
    if not each and len(found) > 1 and any(one.kind == "logits" for one in found):
        raise OptionError(
            "The logits together with other receivers",
            expected="one or the other, since setting the logits undoes all else",
            fix="Pass each=True, which patches every receiver by itself",
        )
    return tuple(found)


def _senders(model: Model, wanted: SitesLike, receivers: Iterable[Site]) -> list[Site]:
    found = read_patchable(model, wanted)
    if odd := [str(one) for one in found if one.kind not in _SENDERS]:
        raise SiteError(f"{', '.join(odd)} as senders", expected='heads such as "9.9", MLPs such as "m9", or "embed"')
    reaching = [one for one in found if any(comes_before(model, one, target) for target in receivers)]
    words = isinstance(wanted, str) and all(
        word in ("heads", "mlps", "embed") for word in wanted.replace(",", " ").split()
    )
    if not reaching or (len(reaching) < len(found) and not words):
        late = next(one for one in found if one not in reaching)
        raise SiteError(
            f'The sender "{late}" comes before none of the receivers',
            expected=f"a part before {' '.join(map(str, receivers))}",
        )
    return reaching
