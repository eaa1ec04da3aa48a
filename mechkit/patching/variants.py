"""Base runs of a sweep, and the variants that begin from them.

1. A group's prompts run once as they are patched, and once as they are patched from, side by side: what is patched in
   is taken from the second half.
2. Some variants of a group at a time are put in the engine's order, layer by layer, with what each of them gets.
3. The metric is taken where the logits are; what leaves is one number a variant.

Nothing here knows which variants are asked for, or where: a sweep asks for all of them in turn, or has several
processes ask for some each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ..backends.memory import in_batches
from ..backends.protocol import Paths, Read, Replay, Write
from ..metrics import Metric
from .cells import Cell, Place
from .groups import Group, written_at

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task


_ORDER = {"resid": 0, "mlp": 2}  # in which parts of a block write to the stream; heads between


@dataclass(frozen=True, eq=False)
class Work:
    """What is swept; see ``sweep``.

    Attributes:
        masks: by place, the positions of each prompt that can change ``[n, pos]``.
        columns: the logits that the metric reads ``[n, k]``; None for all.
        clean: the clean run's logits ``[n, vocab]``, where the metric reads them.
        paths: what a patch may reach; None: everything.
    """

    task: Task
    cells: Sequence[Cell]
    base: Tensor
    source: Tensor
    masks: Mapping[Place, Tensor]
    metric: Metric
    columns: Tensor | None
    clean: Tensor | None
    paths: Paths | None = None

    def measure(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The metric of some prompts ``[rows]``, or ``[rows, receivers]``."""
        if logits.ndim == 3:  # [rows, receivers, k]
            return torch.stack([self.measure(one, rows) for one in logits.unbind(1)], 1)
        clean = None if self.clean is None else self.clean[rows.to(self.clean.device)].to(logits.device)
        return self.metric(logits, self.task[rows], clean).cpu()


@dataclass(frozen=True, eq=False)
class Todo:
    """Variants of a group that have not run yet.

    Attributes:
        number: of the group.
        pairs: cell and prompt of each ``[variants, 2]``.
        rows: how many run at once; None: not known yet.
    """

    number: int
    pairs: Tensor
    rows: int | None


# Of variants that ran: their group's number, cell and prompt [rows, 2], the metric, and how many go on at once.
Outcome: TypeAlias = "tuple[int, Tensor, Tensor, int]"


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


class Bases:
    """The base runs of all groups, the last one kept.

    Args:
        model: what runs.
        work: what is swept.
        groups: its variants.
    """

    def __init__(self, model: Model, work: Work, groups: Sequence[Group]):
        self.model, self.work, self.groups = model, work, groups
        self._last: tuple[int, _Base] | None = None

    def ends(self) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
        """Every prompt's logits in both runs ``[prompts, k]``, some prompts at a time."""
        task, columns = self.work.task, self.work.columns
        left = torch.ones(len(task), dtype=torch.bool)
        for number, group in enumerate(self.groups):
            if bool(left[group.pairs[:, 1]].any()):
                base = self._start(number)
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
                    read(self.model, ids[rest], task.answer_positions[rest], some)
                    for ids in (self.work.base, self.work.source)
                ],
            )

    def at_once(self, number: int) -> int:
        """How many variants of a group fit in memory side by side."""
        columns, paths = self.work.columns, self.work.paths
        # On a path to the logits, one position of each variant is run.
        alone = paths is not None and all(one.kind == "logits" for one in paths.receivers)
        return self._start(number).replay.rows(columns is None, 1 if alone else None)

    def run(self, number: int, todo: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Variants of a group ``[rows, 2]``, the metric of each, and how many go on at once, batch by batch.

        Args:
            number: of the group.
            todo: which of its variants.
            rows: how many at once.
        """
        base = self._start(number)
        for pairs, logits, fitted in in_batches(todo, rows, lambda pairs: self._logits(base, pairs)):
            yield pairs, self.work.measure(logits, pairs[:, 1]), fitted

    def _start(self, number: int) -> _Base:
        """The base run of a group."""
        if self._last is None or self._last[0] != number:
            self._last = None  # its memory first
            self._last = number, self._started(self.groups[number])
        return self._last[1]

    def _started(self, group: Group) -> _Base:
        work, cells = self.work, self.work.cells
        prompts = group.pairs[:, 1].unique()
        length = int(work.task.lengths[prompts].max())
        found = {written_at(cells[i].site) for i in group.pairs[:, 0].unique().tolist()}
        keys = sorted(found, key=lambda key: (key[1], _ORDER.get(key[0], 1)))
        # One run of both: the variants are of the first half, what is patched in is from the second.
        both = torch.cat([work.base[prompts, :length], work.source[prompts, :length]])
        record = [*keys, *_kept_by(self.model, work.paths, keys)]
        return _Base(group.first, prompts, keys, self.model.backend.start(both, group.first, record=record))

    def _logits(self, base: _Base, pairs: Tensor) -> Tensor:
        """Of variants ``[rows, 2]``: ``[rows, k]``, or ``[rows, outcomes, k]``."""
        work, task, cells = self.work, self.work.task, self.work.cells
        prompts, keys, replay = base.prompts, base.keys, base.replay
        window = slice(base.first, int(task.lengths[prompts].max()))
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
        read = Read(task.answer_positions[prompt], None if work.columns is None else work.columns[prompt])
        logits = replay.resume(writes, read) if work.paths is None else replay.via(writes, work.paths, read)
        return logits[order.argsort().to(logits.device)]


def read(model: Model, ids: Tensor, positions: Tensor, columns: Tensor | None) -> Tensor:
    """Logits at one position a prompt ``[n, k]``, some prompts at a time."""
    parts = torch.arange(len(ids)).split(max(1, model.backend.base_tokens() // ids.shape[1]))
    found = [model.read(ids[rows], positions[rows], None if columns is None else columns[rows]) for rows in parts]
    return torch.cat(found)


def _kept_by(model: Model, paths: Paths | None, keys: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """What the base run must record beside what is patched: other heads' z, and the MLPs that are receivers."""
    if paths is None:
        return []
    wanted = [("z", layer) for layer in range(model.n_layers)]
    wanted += [("mlp", one.layer) for one in paths.receivers if one.kind == "mlp"]
    return [key for key in wanted if key not in keys]


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
