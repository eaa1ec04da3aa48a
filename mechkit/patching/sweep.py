"""The sweep engine: many patches of one task, each in as little arithmetic as it takes.

A cell is one site of one prompt at some positions, taken from the source run into the base run.

1. Nothing before the first patched position can differ from the base run, nor anything before the first token in which
   a prompt differs from its twin. Prompts and cells that begin at the same position, in prompts of the same length,
   run together from there on; what comes before runs once.
2. A cell in layer l begins at block l, from the base run's residual there.
3. Cells stand side by side on the batch axis, as many as fit in memory, those of later layers joining as the batch
   passes their block.
4. Only the answer position of the last residual is normalised, and only the columns the metric reads are
   multiplied.
5. A cell whose positions all lie before the first difference is the base run; it is not run at all.
6. Batches run here one after the other, or on the workers of a Ray cluster (``spread``); they are the same batches.
7. What is done is kept, batch by batch: when memory runs out the batch is halved, when the user stops it the rest is
   left out, and with a checkpoint another process goes on from there, with the same batches.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.protocol import Paths
from ..errors import MetricError
from ..metrics import Metric
from ..progress import bar as progress_bar
from .cells import Cell, covered
from .checkpoint import Checkpoint, fingerprint
from .groups import grouped
from .spread import Engine, spread
from .variants import Bases, Outcome, Todo, Work, read

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task


@dataclass(frozen=True, eq=False)
class Sweep:
    """Metric values, one a prompt.

    Attributes:
        patched: ``[cells, n]``; of paths to several receivers, each by itself, ``[cells, n, receivers]``.
        done: which of them were measured; all of them, unless the user stopped it.
        base: of the run that is patched ``[n]``.
        source: of the run that is patched from ``[n]``.
    """

    patched: Tensor
    done: Tensor
    base: Tensor
    source: Tensor


@where_the_model_is
def sweep(
    model: Model,
    task: Task,
    cells: Sequence[Cell],
    *,
    base: Tensor,
    source: Tensor,
    metric: Metric,
    paths: Paths | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    engine: Engine = "local",
    workers: int | None = None,
) -> Sweep:
    """Patch every cell, one at a time, on every prompt.

    Args:
        model: local or remote.
        task: the prompts' answers, spans and lengths.
        cells: what to patch.
        base, source: token ids ``[n, pos]``, the task's clean and corrupt prompts in either order.
        metric: one number a prompt.
        paths: let the patches reach these receivers only (path patching); None: everything.
        checkpoint: a file to keep what is done in, and to go on from.
        progress: show a bar.
        engine, workers: where the variants run; see ``spread``.

    Raises:
        MetricError: the metric is the same on both runs, so that no fraction of its gap is defined.
        StorageError: the checkpoint is another sweep's, or cannot be read or written.
        CapacityError: a single variant does not fit in memory.
        LoadError, VersionError, WorkerLostError: see ``spread``.
    """
    columns = task.answers if metric.reads == "answers" else None
    clean = read(model, task.clean, task.answer_positions, None) if metric.reads == "clean" else None
    masks = {where: covered(task, where) & _may_differ(task) for where in {cell.positions for cell in cells}}
    work = Work(task, cells, base, source, masks, metric, columns, clean, paths)
    done = ~torch.stack([masks[cell.positions].any(1) for cell in cells])
    unchanged = done.clone()
    several = (len(paths.receivers),) if paths is not None and paths.each else ()
    patched, ends = torch.zeros(*done.shape, *several), torch.full((2, len(task)), torch.nan)
    identity = fingerprint(model, task, cells, base, source, metric, paths)
    tensors = {"patched": patched, "done": done, "ends": ends}
    kept = Checkpoint(checkpoint, identity, tensors, model.backend.base_tokens())
    bases = Bases(model, work, grouped(task, cells, masks, kept.base_tokens))
    if bool(ends.isnan().any()):
        for prompts, logits in bases.ends():
            ends[:, prompts] = torch.stack([work.measure(one, prompts) for one in logits])
    if abs(float((ends[1] - ends[0]).mean())) < 1e-6:
        raise MetricError(
            f'{metric.name} is {float(ends[0].mean()):.4g} on clean and corrupt prompts of "{task.name}" alike',
            expected="a metric that tells them apart",
        )
    patched[unchanged] = ends[0].expand_as(done)[unchanged].view(-1, *[1] * len(several))
    left = [(number, group.pairs[~done[tuple(group.pairs.T)]]) for number, group in enumerate(bases.groups)]
    todo = [Todo(number, pairs, kept.rows.get(number)) for number, pairs in left if len(pairs)]
    with progress_bar(done.numel(), "patching", "patch", int(done.sum()), progress) as bar:
        try:
            with closing(spread(bases, todo, workers) if engine == "ray" else _in_turn(bases, todo)) as outcomes:
                for number, pairs, values, rows in outcomes:
                    cell, prompt = pairs.unbind(1)
                    patched[cell, prompt] = values.view(len(pairs), *patched.shape[2:])
                    done[cell, prompt] = True
                    kept.rows[number] = rows
                    kept.save_now_and_then()
                    bar.update(len(pairs))
        except KeyboardInterrupt:
            pass  # what is done is returned
        finally:
            kept.save()
    return Sweep(patched, done, *ends)


def _in_turn(bases: Bases, todo: Sequence[Todo]) -> Generator[Outcome, None, None]:
    """What comes of all variants, run here."""
    for one in todo:
        for pairs, values, rows in bases.run(one.number, one.pairs, one.rows or bases.at_once(one.number)):
            yield one.number, pairs, values, rows


def metric_of(model: Model, task: Task, ids: Tensor) -> Tensor:
    """The task's metric on token ids ``[n, pos]``, its clean or its corrupt prompts: ``[n]``."""
    metric = task.metric
    columns = task.answers if metric.reads == "answers" else None
    clean = read(model, task.clean, task.answer_positions, None) if metric.reads == "clean" else None
    return metric(read(model, ids, task.answer_positions, columns), task, clean).cpu()


def _may_differ(task: Task) -> Tensor:
    """Positions from a prompt's first difference on ``[n, pos]``."""
    return torch.arange(task.clean.shape[1])[None] >= task.first_difference[:, None]
