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
6. What is done is kept, batch by batch: when memory runs out the batch is halved, when the user stops it the rest is
   left out, and with a checkpoint another process goes on from there, with the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.memory import in_batches
from ..backends.protocol import Paths, Read, Replay, Write
from ..errors import MetricError
from ..metrics import Metric
from ..progress import bar as progress_bar
from .cells import Cell, Place, covered
from .checkpoint import Checkpoint, fingerprint
from .groups import Group, grouped, written_at

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task


_ORDER = {"resid": 0, "mlp": 2}  # in which parts of a block write to the stream; heads between


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


@dataclass(frozen=True, eq=False)
class _Work:
    """What is swept; see ``sweep``.

    Attributes:
        masks: by place, the positions of each prompt that can change ``[n, pos]``.
        columns: the logits that the metric reads ``[n, k]``; None for all.
        paths: what a patch may reach; None: everything.
    """

    model: Model
    task: Task
    cells: Sequence[Cell]
    base: Tensor
    source: Tensor
    masks: Mapping[Place, Tensor]
    columns: Tensor | None
    paths: Paths | None = None


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

    Raises:
        MetricError: the metric is the same on both runs, so that no fraction of its gap is defined.
        StorageError: the checkpoint is another sweep's, or cannot be read or written.
        CapacityError: a single variant does not fit in memory.
    """
    columns = task.answers if metric.reads == "answers" else None
    clean = _read(model, task.clean, task.answer_positions, None) if metric.reads == "clean" else None

    def measure(logits: Tensor, rows: Tensor) -> Tensor:
        if logits.ndim == 3:  # [rows, receivers, k]
            return torch.stack([measure(one, rows) for one in logits.unbind(1)], 1)
        return metric(logits, task[rows], None if clean is None else clean[rows.to(clean.device)]).cpu()

    masks = {where: covered(task, where) & _may_differ(task) for where in {cell.positions for cell in cells}}
    work = _Work(model, task, cells, base, source, masks, columns, paths)
    done = ~torch.stack([masks[cell.positions].any(1) for cell in cells])
    unchanged = done.clone()
    outcomes = (len(paths.receivers),) if paths is not None and paths.each else ()
    patched, ends = torch.zeros(*done.shape, *outcomes), torch.full((2, len(task)), torch.nan)
    identity = fingerprint(model, task, cells, base, source, metric, paths)
    tensors = {"patched": patched, "done": done, "ends": ends}
    kept = Checkpoint(checkpoint, identity, tensors, model.backend.base_tokens())
    bases = _Bases(work, grouped(task, cells, masks, kept.base_tokens))
    if bool(ends.isnan().any()):
        for prompts, logits in bases.ends():
            ends[:, prompts] = torch.stack([measure(one, prompts) for one in logits])
    if abs(float((ends[1] - ends[0]).mean())) < 1e-6:
        raise MetricError(
            f'{metric.name} is {float(ends[0].mean()):.4g} on clean and corrupt prompts of "{task.name}" alike',
            expected="a metric that tells them apart",
        )
    patched[unchanged] = ends[0].expand_as(done)[unchanged].view(-1, *[1] * len(outcomes))
    with progress_bar(done.numel(), "patching", "patch", int(done.sum()), progress) as bar:
        try:
            for number, group in enumerate(bases.groups):
                todo = group.pairs[~done[tuple(group.pairs.T)]]
                variants = _variants(work, bases.start(number), todo, kept.rows.get(number)) if len(todo) else ()
                for pairs, logits, rows in variants:
                    cell, prompt = pairs.unbind(1)
                    patched[cell, prompt] = measure(logits, prompt).view(len(pairs), *patched.shape[2:])
                    done[cell, prompt] = True
                    kept.rows[number] = rows
                    kept.save_now_and_then()
                    bar.update(len(pairs))
        except KeyboardInterrupt:
            pass  # what is done is returned
        finally:
            kept.save()
    return Sweep(patched, done, *ends)


@dataclass(frozen=True, eq=False)
class _Base:
    """A base run of a group's prompts.

    Attributes:
        first: first position that runs.
        prompts: which of the task's; the run has them as they are patched, then as they are patched from.
        keys: kinds and layers of what is patched, by layer.
        replay: the run.
    """

    first: int
    prompts: Tensor
    keys: Sequence[tuple[str, int]]
    replay: Replay


class _Bases:
    """The base runs of all groups, the last one kept."""

    def __init__(self, work: _Work, groups: Sequence[Group]):
        self._work, self.groups = work, groups
        self._last: tuple[int, _Base] | None = None

    def start(self, number: int) -> _Base:
        """The base run of a group."""
        if self._last is None or self._last[0] != number:
            self._last = None  # its memory first
            self._last = number, self._started(self.groups[number])
        return self._last[1]

    def ends(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        """Every prompt's logits in both runs ``[prompts, k]``, some prompts at a time."""
        task, columns = self._work.task, self._work.columns
        left = torch.ones(len(task), dtype=torch.bool)
        for number, group in enumerate(self.groups):
            if bool(left[group.pairs[:, 1]].any()):
                base = self.start(number)
                twice = None if columns is None else columns[base.prompts].repeat(2, 1)
                logits = base.replay.ends(Read(task.answer_positions[base.prompts].repeat(2), twice))
                left[base.prompts] = False
                yield base.prompts, logits.chunk(2)
        if bool(left.any()):  # prompts that nothing is patched in
            rest = left.nonzero()[:, 0]
            some = None if columns is None else columns[rest]
            yield (
                rest,
                [
                    _read(self._work.model, ids[rest], task.answer_positions[rest], some)
                    for ids in (self._work.base, self._work.source)
                ],
            )

    def _started(self, group: Group) -> _Base:
        work, cells = self._work, self._work.cells
        prompts = group.pairs[:, 1].unique()
        length = int(work.task.lengths[prompts].max())
        found = {written_at(cells[i].site) for i in group.pairs[:, 0].unique().tolist()}
        keys = sorted(found, key=lambda key: (key[1], _ORDER.get(key[0], 1)))
        # One run of both: the variants are of the first half, what is patched in is from the second.
        both = torch.cat([work.base[prompts, :length], work.source[prompts, :length]])
        record = [*keys, *_kept_by(work.model, work.paths, keys)]
        return _Base(group.first, prompts, keys, work.model.backend.start(both, group.first, record=record))


def metric_of(model: Model, task: Task, ids: Tensor) -> Tensor:
    """The task's metric on token ids ``[n, pos]``, its clean or its corrupt prompts: ``[n]``."""
    metric = task.metric
    columns = task.answers if metric.reads == "answers" else None
    clean = _read(model, task.clean, task.answer_positions, None) if metric.reads == "clean" else None
    return metric(_read(model, ids, task.answer_positions, columns), task, clean).cpu()


def _variants(work: _Work, base: _Base, todo: Tensor, rows: int | None) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Variants ``[rows, 2]``, their logits ``[rows, k]``, and how many go on at once, batch by batch.

    Args:
        work: what is swept.
        base: the run that they begin from.
        todo: which variants.
        rows: how many at once; None: as many as fit.
    """
    model, task, cells, columns, paths = work.model, work.task, work.cells, work.columns, work.paths
    prompts, keys, replay = base.prompts, base.keys, base.replay
    window = slice(base.first, int(task.lengths[prompts].max()))

    def run(pairs: Tensor) -> Tensor:
        depth = torch.tensor([keys.index(written_at(cells[i].site)) for i in pairs[:, 0].tolist()])
        order = depth.argsort(stable=True)  # the engine takes layers in order
        chosen, prompt = [cells[i] for i in pairs[order, 0].tolist()], pairs[order, 1]
        row = torch.searchsorted(prompts, prompt.contiguous())
        where = torch.stack(
            [work.masks[one.positions][i, window] for one, i in zip(chosen, prompt.tolist(), strict=True)]
        )
        writes, begin = [], 0
        for at, count in zip(*(found.tolist() for found in depth.unique(return_counts=True)), strict=True):
            part = slice(begin, begin + count)
            writes.append(_write(keys[at], chosen[part], replay, row[part], len(prompts), where[part]))
            begin += count
        read = Read(task.answer_positions[prompt], None if columns is None else columns[prompt])
        logits = replay.resume(writes, read) if paths is None else replay.via(writes, paths, read)
        return logits[order.argsort().to(model.info.device)]

    # On a path to the logits, one position of each variant is run.
    alone = paths is not None and all(one.kind == "logits" for one in paths.receivers)
    yield from in_batches(todo, rows or replay.rows(columns is None, 1 if alone else None), run)


def _kept_by(model: Model, paths: Paths | None, keys: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """What the base run must record beside what is patched: other heads' z, and the MLPs that are receivers."""
    if paths is None:
        return []
    wanted = [("z", layer) for layer in range(model.n_layers)]
    wanted += [("mlp", one.layer) for one in paths.receivers if one.kind == "mlp"]
    return [key for key in wanted if key not in keys]


def _read(model: Model, ids: Tensor, positions: Tensor, columns: Tensor | None) -> Tensor:
    """Logits at one position a prompt ``[n, k]``, some prompts at a time."""
    parts = torch.arange(len(ids)).split(max(1, model.backend.base_tokens() // ids.shape[1]))
    read = [model.read(ids[rows], positions[rows], None if columns is None else columns[rows]) for rows in parts]
    return torch.cat(read)


def _may_differ(task: Task) -> Tensor:
    """Positions from a prompt's first difference on ``[n, pos]``."""
    return torch.arange(task.clean.shape[1])[None] >= task.first_difference[:, None]


def _write(
    key: tuple[str, int], cells: Sequence[Cell], replay: Replay, row: Tensor, source: int, where: Tensor
) -> Write:
    """What variants of the base prompts ``row`` get from their twins, which stand ``source`` rows below."""
    values = replay.recorded(*key)[source:]
    row, where = row.to(values.device), where.to(values.device)
    if cells[0].site.head is None:
        return Write(*key, row, values[row], where)
    heads = torch.tensor([cell.site.head for cell in cells], device=values.device)
    by_head = key[0] in ("pattern", "scores")
    return Write(*key, row, values[row, heads] if by_head else values[row, :, heads], where, heads)
