"""The sweep engine: many patches of one task, each in as little arithmetic as it takes.

A cell is one site of one prompt at some positions, taken from the source run into the base run.

1. Prompts that first differ from their twin at the same position run together; before that position nothing can
   differ, so those positions run once and are never run again.
2. A cell in layer l begins at block l, from the base run's residual there.
3. Cells stand side by side on the batch axis, those of later layers joining as the batch passes their block.
4. Only the answer position of the last residual is normalised, and only the columns the metric reads are
   multiplied.
5. A cell whose positions all lie before the first difference is the base run; it is not run at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..backends.protocol import Read, Replay, Write
from ..metrics import Metric
from ..sites import Site

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task

# Tokens on the batch axis at once: enough to keep matrix products at full speed, and little memory (about
# 40 kB a token for SmolLM2-135M).
TOKENS_AT_ONCE = 2048
WRITABLE = ("z", "mlp", "resid")


@dataclass(frozen=True)
class Cell:
    """A site to patch and where.

    Attributes:
        site: of kind ``z``, ``mlp`` or ``resid``.
        positions: None for all; a span's name; or one position from 0.
    """

    site: Site
    positions: str | int | None = None


@dataclass(frozen=True, eq=False)
class Sweep:
    """Metric values, one a prompt.

    Attributes:
        patched: ``[cells, n]``.
        base: of the run that is patched ``[n]``.
        source: of the run that is patched from ``[n]``.
    """

    patched: Tensor
    base: Tensor
    source: Tensor


def sweep(
    model: Model,
    task: Task,
    cells: Sequence[Cell],
    *,
    base: Tensor,
    source: Tensor,
    metric: Metric,
    progress: bool = True,
) -> Sweep:
    """Patch every cell, one at a time, on every prompt.

    Args:
        model: local or remote.
        task: the prompts' answers, spans and lengths.
        cells: what to patch.
        base, source: token ids ``[n, pos]``, the task's clean and corrupt prompts in either order.
        metric: one number a prompt.
        progress: show a bar.
    """
    columns = task.answers if metric.reads == "answers" else None
    clean = model.read(task.clean, task.answer_positions, None) if metric.reads == "clean" else None

    def measure(logits: Tensor, rows: Tensor) -> Tensor:
        return metric(logits, task[rows], None if clean is None else clean[rows.to(clean.device)]).cpu()

    every = torch.arange(len(task))
    ends = [measure(model.read(ids, task.answer_positions, columns), every) for ids in (base, source)]
    patched = ends[0].repeat(len(cells), 1)
    starts = task.first_difference
    with tqdm(total=len(cells) * len(task), desc="patching", unit="patch", disable=not progress) as bar:
        for first in starts.unique().tolist():
            rows = (starts == first).nonzero()[:, 0]
            for cell, row, logits in _group(model, task[rows], cells, base[rows], source[rows], first, columns, bar):
                patched[cell, rows[row]] = measure(logits, rows[row])
    return Sweep(patched, *ends)


def _group(
    model: Model,
    task: Task,
    cells: Sequence[Cell],
    base: Tensor,
    source: Tensor,
    first: int,
    columns: Tensor | None,
    bar: tqdm,
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Cell numbers, prompt numbers and logits ``[rows, k]``, batch by batch, for prompts that split at ``first``."""
    width = task.clean.shape[1]
    keys = sorted({(cell.site.kind, cell.site.layer) for cell in cells}, key=lambda key: key[1])
    given = model.backend.start(source[:, :width], first, record=keys)
    replay = model.backend.start(base[:, :width], first)
    columns = None if columns is None else task.answers
    masks = {where: _mask(task, where, first) for where in {cell.positions for cell in cells}}
    here = torch.stack([masks[cell.positions] for cell in cells])  # [cells, n, pos]
    active = here.any(-1).nonzero()
    bar.update(len(cells) * len(task) - len(active))
    depth = torch.tensor([keys.index((cell.site.kind, cell.site.layer)) for cell in cells])
    active = active[(active[:, 1] * len(keys) + depth[active[:, 0]]).argsort(stable=True)]  # prompt by prompt
    for batch in active.split(max(1, TOKENS_AT_ONCE // (width - first))) if len(active) else ():
        batch = batch[depth[batch[:, 0]].argsort(stable=True)]
        cell, row = batch.T
        writes = []
        for key in depth[cell].unique().tolist():
            these = depth[cell] == key
            sites = [cells[i].site for i in cell[these].tolist()]
            writes.append(_write(keys[key], sites, given, row[these], here[cell[these], row[these]]))
        read = Read(task.answer_positions[row], None if columns is None else columns[row])
        yield cell, row, replay.resume(writes, read)
        bar.update(len(batch))


def _mask(task: Task, where: str | int | None, first: int) -> Tensor:
    """Which replayed positions a cell covers ``[n, pos]``."""
    positions = torch.arange(first, task.clean.shape[1])
    if where is None:
        return (positions[None] < task.lengths[:, None]).expand(len(task), -1)
    if isinstance(where, int):
        return (positions[None] == where) & (positions[None] < task.lengths[:, None])
    span = task.span(where)
    return (positions[None] >= span[:, :1]) & (positions[None] < span[:, 1:])


def _write(key: tuple[str, int], sites: list[Site], given: Replay, row: Tensor, where: Tensor) -> Write:
    values = given.recorded(*key)
    row, where = row.to(values.device), where.to(values.device)
    if key[0] != "z":
        return Write(*key, row, values[row], where)
    heads = torch.tensor([site.head for site in sites], device=values.device)
    return Write(*key, row, values[row, :, heads], where, heads)
