"""Edge attribution: the first-order effect of every edge, from a few forward and backward passes.

1. Prompts of about the same length and first difference run together, base and source, from that position on.
2. Every point at which a gradient is wanted is a run of a base prompt with one group of parts between its base and its
   source values: none for EAP, the stream entering block 0 for EAP-IG, every group in turn for the form of it that goes
   by activations. Prompts and points stand on the batch axis, as many as fit.
3. What sources write times what targets feel gives a score for every edge and prompt (``backends.products``).
4. Kept are sums over prompts of the scores and of their squares, for means and standard errors; never a matrix a
   prompt. They are in the checkpoint, and grow by whole groups of prompts.

Syed et al. 2023 (arXiv 2310.10348); Hanna et al. 2024 (arXiv 2403.17806), section 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.gradients import Pair, by_query_head
from ..backends.lens import LensBackend, local_backend
from ..backends.memory import TOKENS_AT_ONCE, fitting, in_batches
from ..backends.patterns import PatternEffects
from ..backends.products import needed, products
from ..backends.protocol import Read
from ..backends.relevance import relevance
from ..backends.window import Change, Key
from ..edge_scores import EdgeScores
from ..errors import Interrupted, MetricError
from ..graph import EMBED
from ..progress import bar as progress_bar
from ..results import provenance
from .cells import Cell, Place, covered
from .checkpoint import Checkpoint, fingerprint
from .groups import Group, grouped

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task

METHODS = ("eap", "eap-ig", "eap-ig-activations")
_SHARE = 4  # of the tokens that a device runs at once, that a backward pass is of


@dataclass(frozen=True)
class Attribution:
    """How edges are attributed; see ``edges``."""

    steps: int
    direction: str
    ungroup: bool
    correction: str | None
    gradients: str


@dataclass(frozen=True)
class Point:
    """Where a gradient is taken.

    Attributes:
        part: what is changed, (kind, layer); None: nothing.
        base: its value is this share of the base's, the rest the source's.
    """

    part: Key | None = None
    base: float = 1.0


def points(method: str, m: int, n_layers: int) -> list[Point]:
    """The points of a method, each of the same weight."""
    if method == "eap":
        return [Point()]
    if method == "eap-ig":
        return [Point(("resid", 0), k / m) for k in range(m)]
    parts: list[Key] = [("resid", 0), *((kind, layer) for layer in range(n_layers) for kind in ("z", "mlp"))]
    return [Point(part, k / m) for part in parts for k in range(1, m + 1)]


def attribute(
    model: Model,
    task: Task,
    method: str,
    how: Attribution,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> EdgeScores:
    """Scores of every edge; see ``edges``, whose errors it raises."""
    started = time.perf_counter()
    shape = model.graph(how.ungroup).exists.shape
    sums = _Sums(len(task), shape, _summed(model, task, method, how, shape, checkpoint, progress))
    return _finished(model, task, method, how, sums, started, bool(checkpoint))


@where_the_model_is
@torch.inference_mode(False)
def _summed(
    model: Model,
    task: Task,
    method: str,
    how: Attribution,
    shape: tuple[int, ...],
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Tensor:
    """The numbers of ``_Sums`` over the prompts that were done: all, unless the user stopped it."""
    backend = local_backend(model, "Gradients of")
    work = _Work(backend, task, how, points(method, how.steps, model.n_layers))
    sums = _Sums(len(task), shape)
    identity = fingerprint(model, task, [], work.base, work.source, task.metric) | {"method": f"{method} {how}"}
    tokens = min(backend.base_tokens(), work.tokens(4 * sums.scores.numel()))
    kept = Checkpoint(checkpoint, identity, {"sums": sums.flat}, tokens)
    rules = relevance(backend) if how.gradients == "relp" else nullcontext()
    runs = len(work.points) * torch.tensor([len(task), int(sums.done.sum())])
    with rules, progress_bar(int(runs[0]), method, "run", int(runs[1]), progress) as bar:
        try:
            for number, group in enumerate(_groups(task, kept.base_tokens)):
                prompts = group.pairs[:, 1]
                if bool(sums.done[prompts].all()):
                    continue
                some = _Some(work, prompts, group.first)
                scores = torch.zeros(len(prompts), *sums.scores.shape, device=backend.info.device)
                for rows, found, at_once in some.run(kept.rows.get(number)):
                    scores.index_add_(0, rows, found / len(work.points))
                    kept.rows[number] = at_once
                    bar.update(len(rows))
                sums.add(prompts, some.ends, scores)
                kept.save_now_and_then()
        except KeyboardInterrupt:
            pass  # what is done is returned
        finally:
            kept.save()
    return sums.flat


class _Sums:
    """Sums over the prompts done, and the metric on both runs.

    Attributes:
        flat: all of them in one tensor, so that they grow together and a checkpoint never has half of a group.
        scores, squares: of the scores in the metric's unit, and of their squares ``[sources, targets]``.
        ends: the metric on the base and on the source run ``[2, n]``; 0 where it is not known yet.
    """

    def __init__(self, n: int, shape: tuple[int, ...], flat: Tensor | None = None):
        self._sizes, self._shape = [n, 2 * n, math.prod(shape), math.prod(shape)], shape
        self.flat = torch.zeros(sum(self._sizes), dtype=torch.float64) if flat is None else flat
        done, ends, scores, squares = self.flat.split(self._sizes)
        self._done, self.ends = done, ends.view(2, n)
        self.scores, self.squares = scores.view(shape), squares.view(shape)

    @property
    def done(self) -> Tensor:
        """Which prompts are ``[n]``, boolean."""
        return self._done > 0

    def add(self, prompts: Tensor, ends: Tensor, scores: Tensor) -> None:
        """Count some prompts: ``ends [2, prompts]``, ``scores [prompts, sources, targets]``."""
        more = _Sums(len(self._done), self._shape)
        more._done[prompts], more.ends[:, prompts] = 1.0, ends.double()
        for one in scores.cpu():
            more.scores += one
            more.squares += one.double().square()
        self.flat += more.flat


class _Work:
    """What is attributed, and how.

    Attributes:
        base, source: token ids ``[n, pos]``.
        also: what gradients are needed of, besides those of the streams, q, k and v.
    """

    def __init__(self, backend: LensBackend, task: Task, how: Attribution, where: Sequence[Point]):
        self.backend, self.task, self.how, self.points = backend, task, how, where
        self.base, self.source = (task.clean, task.corrupt)[:: 1 if how.direction == "noise" else -1]
        self.ungroup = how.ungroup and backend.info.grouped
        also = needed(backend)
        if self.ungroup or how.correction:
            also += [(kind, layer) for layer in range(backend.info.n_layers) for kind in ("pattern", "z")]
        self.also = list(dict.fromkeys(also))

    def tokens(self, bytes_each: int) -> int:
        """How many tokens a base run may be, as for each of its prompts so many bytes are kept as well."""
        prompts = fitting(bytes_each, torch.device(self.backend.info.device), len(self.task))
        return 2 * prompts * self.base.shape[1]


class _Some:
    """Prompts that run together.

    Attributes:
        ends: the metric on the base and on the source run ``[2, prompts]``.
    """

    def __init__(self, work: _Work, prompts: Tensor, first: int):
        self._work, self._prompts, task = work, prompts, work.task
        length = int(task.lengths[prompts].max())
        columns = task.answers[prompts] if task.metric.reads == "answers" else None
        read = Read(task.answer_positions[prompts], columns)
        self._pair = Pair(work.backend, work.base[prompts, :length], work.source[prompts, :length], first, read)
        self._patterns = PatternEffects(self._pair, work.ungroup) if work.how.correction else None
        self._clean = None
        if task.metric.reads == "clean":
            self._clean = self._pair.logits[0 if work.how.direction == "noise" else 1]
        every = torch.arange(len(prompts))
        self.ends = torch.stack([self._measure(logits, every).cpu() for logits in self._pair.logits])

    def run(self, at_once: int | None) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Which prompts, their scores ``[rows, sources, targets]`` at some points, and how many go on at once.

        Args:
            at_once: how many; None: as many as fit.
        """
        where = self._work.points
        items = torch.cartesian_prod(torch.arange(len(self._prompts)), torch.arange(len(where)))

        def scored(some: Tensor) -> Tensor:
            return self._scores(some[:, 0], [where[i] for i in some[:, 1].tolist()])

        for some, scores, fits in in_batches(items, at_once or self._rows(), scored):
            yield some[:, 0].to(scores.device), scores, fits

    def _scores(self, rows: Tensor, where: Sequence[Point]) -> Tensor:
        apart: dict[Key, Tensor] = {}

        def follow(kept: Mapping[Key, Tensor], at: Mapping[Key, Tensor]) -> None:
            apart.update(by_query_head(self._work.backend.info, kept, at))

        changes = {part: self._between(part, rows, where) for part in {p.part for p in where if p.part is not None}}
        found = self._pair.gradients(
            rows,
            lambda logits: self._measure(logits, rows),
            changes,
            self._work.also,
            follow if self._work.ungroup else None,
        )
        scores = products(self._pair, rows, found, apart)
        return scores if self._patterns is None else self._patterns.correct(scores, rows, found)

    def _between(self, part: Key, rows: Tensor, where: Sequence[Point]) -> Change:
        """What sets a part, in the rows of its points, between its base and its source values."""
        base, delta = self._pair.base[part], self._pair.delta[part]
        here = torch.tensor([i for i, point in enumerate(where) if point.part == part], device=base.device)
        share = torch.tensor([1 - where[i].base for i in here.tolist()], device=base.device, dtype=base.dtype)
        own = rows.to(base.device)[here]
        values = base[own] + delta[own] * share.view(-1, *[1] * (base.ndim - 1))
        return lambda tensor: tensor.index_put((here,), values.view(-1, *tensor.shape[1:]))

    def _measure(self, logits: Tensor, rows: Tensor) -> Tensor:
        clean = None if self._clean is None else self._clean[rows.to(self._clean.device)]
        return self._work.task.metric(logits, self._work.task[self._prompts[rows]], clean)

    def _rows(self) -> int:
        device = torch.device(self._work.backend.info.device)
        useful = TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE["cuda"]) // _SHARE
        return fitting(self._pair.row_bytes(), device, max(1, useful // self._pair.length))


def _groups(task: Task, base_tokens: int) -> list[Group]:
    masks: dict[Place, Tensor] = {
        None: covered(task, None) & (torch.arange(task.clean.shape[1]) >= task.first_difference[:, None])
    }
    return grouped(task, [Cell(EMBED)], masks, base_tokens)


def _finished(
    model: Model, task: Task, method: str, how: Attribution, sums: _Sums, started: float, kept: bool
) -> EdgeScores:
    """The table, or the error of having been stopped with it."""
    done = sums.done
    n = int(done.sum())
    if n == 0:
        raise Interrupted("Stopped before the first prompts were done.")
    base, source = sums.ends[:, done].mean(1).tolist()
    gap = source - base
    if abs(gap) < 1e-6:
        raise MetricError(
            f'{task.metric.name} is {base:.4g} on clean and corrupt prompts of "{task.name}" alike',
            expected="a metric that tells them apart",
        )
    mean = sums.scores.numpy() / n
    spread = np.clip(sums.squares.numpy() / n - mean**2, 0, None)
    se = np.sqrt(spread / (n - 1)) if n > 1 else np.full_like(mean, np.nan)
    options = {**asdict(how), "base_metric": base, "source_metric": source}
    meta = provenance(model, task, method, time.perf_counter() - started, **options)
    graph = model.graph(how.ungroup)
    scores = EdgeScores.of_matrix(graph, mean / gap, "fraction of the metric gap", meta, se=se / abs(gap), n=n)
    if n == len(task):
        return scores
    fix = "the same call goes on from there" if kept else "with checkpoint=path the same call would go on"
    raise Interrupted(
        f"Stopped after {n} of {len(task)} prompts. Their scores are in the error's .scores (in a notebook: "
        f"import sys; sys.last_value.scores); {fix}.",
        scores,
    )
