"""Many sources on many prompts: which passes are made, and what is measured of them.

1. Prompts run some at a time, those of a length together, with as many sources on the front axis as fit in memory and
   in what a device runs at once.
2. A pass begins at the first position at which a prompt differs from what its reference is made of: before it, every
   activation is its reference.
3. To the logits: the task's metric of the relevant part of the logits. At a site: how much of what is there is
   relevant, by size and by direction.
4. What is done is kept; with a checkpoint another process goes on from there.

Hsu et al. 2024 (arXiv 2407.00886), section 3.3, equation 16, for sizes; directions: see ``arrived``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.lens import LensBackend, local_backend
from ..backends.memory import TOKENS_AT_ONCE, fitting, in_batches
from ..backends.protocol import Read
from ..errors import UnsupportedError
from ..patching.cells import Cell, Place, covered
from ..patching.checkpoint import Checkpoint, digest, fingerprint
from ..progress import bar as progress_bar
from ..references import TemplateMeans, corrupt_activations, template_means
from ..sites import Site
from .split import Rules, Split
from .split_pass import Key, Source, begins, key_of, split_pass

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task

_TOO_LARGE = 1e3  # times the logits, and a relevant part of them means nothing any more
_PARTS = 3  # times what a block puts out for a variant: the part, and what the rules make on the way


@dataclass(frozen=True, eq=False)
class Work:
    """What is decomposed.

    Attributes:
        model: any loaded model.
        task: the prompts and the metric.
        sources: sets of sites that are relevant together.
        where: at which positions each set is.
        targets: what is read; the logits alone, or sites.
        at: at which positions sites are read.
        reference: ``"zero"``, ``"corrupt"`` (each prompt's own twin), or the task whose corrupt prompts are averaged.
        rules: how parts are carried.
    """

    model: Model
    task: Task
    sources: Sequence[tuple[Site, ...]]
    where: Sequence[Place]
    targets: tuple[Site, ...]
    at: Place
    reference: str | Task
    rules: Rules


@dataclass(frozen=True, eq=False)
class Found:
    """Values ``[sources, n, targets, 2]``, signed and by size, and which are done ``[sources, n]``."""

    values: Tensor
    done: Tensor


@where_the_model_is
def run(work: Work, checkpoint: str | Path | None, progress: bool) -> Found:
    """Measure every source on every prompt.

    Raises:
        UnsupportedError: a model that does what no rule is for.
        StorageError, CapacityError: as of a sweep.
    """
    model, task, backend = work.model, work.task, local_backend(work.model, "Decomposition of")
    values = torch.zeros(len(work.sources), len(task), len(work.targets), 2)
    done = torch.zeros(len(work.sources), len(task), dtype=torch.bool)
    cells = [Cell(one, where) for some, where in zip(work.sources, work.where, strict=True) for one in some]
    identity = fingerprint(model, task, cells, task.clean, task.corrupt, task.metric) | {"method": _told(work)}
    kept = Checkpoint(checkpoint, identity, {"values": values, "done": done}, backend.base_tokens())
    references = _References(work)
    masks = {where: covered(task, where) for where in {*work.where, work.at}}
    order = sorted(range(len(work.sources)), key=lambda i: begins(work.sources[i]))
    with progress_bar(done.numel(), "decomposing", "part", int(done.sum()), progress) as bar:
        try:
            for number, prompts in enumerate(_prompts(work, kept.base_tokens)):
                todo = torch.tensor([i for i in order if not bool(done[i, prompts].all())], dtype=torch.long)
                if not len(todo):
                    continue
                batch = _Batch(work, backend, prompts, references, masks)
                for some, found, rows in in_batches(todo, kept.rows.get(number) or batch.rows(), batch.run):
                    values[some[:, None], prompts], done[some[:, None], prompts] = found, True
                    kept.rows[number] = rows
                    kept.save_now_and_then()
                    bar.update(len(some) * len(prompts))
        except KeyboardInterrupt:
            pass  # what is done is returned
        finally:
            kept.save()
    return Found(values, done)


class _References:
    """What takes the place of sources, and what targets are compared with."""

    def __init__(self, work: Work):
        self._reference, self._task = work.reference, work.task
        sites = [one for some in work.sources for one in some] + [t for t in work.targets if t.kind != "logits"]
        sites = [Site(0, None, "resid") if one.kind == "embed" else one for one in dict.fromkeys(sites)]
        self._means: TemplateMeans | None = None
        self._twins: Mapping[Key, Tensor] = {}
        if work.reference == "corrupt":
            self._twins = corrupt_activations(work.model, work.task, sites)
        elif not isinstance(work.reference, str):
            self._means = template_means(work.model, work.reference, sites)

    def of(self, key: Key, prompts: Tensor, window: slice) -> Tensor:
        """For some prompts ``[n, pos, ...]``; where it is zero, one number."""
        if self._means is not None:
            return self._means.rows(key, self._task[prompts])[:, window]
        if self._twins:
            return self._twins[key][prompts.to(self._twins[key].device), window]
        return torch.zeros(())

    def first(self, prompts: Tensor) -> int:
        """The first position at which these prompts differ from what their references are made of."""
        task = self._task
        if self._reference == "zero":
            return 0
        if isinstance(self._reference, str):
            return int(task.first_difference[prompts].min())
        first = int(task.answer_positions[prompts].min())
        for i in prompts.tolist():
            others = self._reference.corrupt[self._reference.templates == task.templates[i]]
            width = min(others.shape[1], task.clean.shape[1])
            differs = (others[:, :width] != task.clean[i, :width]).any(0).nonzero()
            first = min(first, int(differs[0]) if len(differs) else first)
        return first


class _Batch:
    """Some prompts, on which sources run."""

    def __init__(
        self, work: Work, backend: LensBackend, prompts: Tensor, references: _References, masks: Mapping[Place, Tensor]
    ):
        self._work, self._backend, self._prompts, self._masks = work, backend, prompts, masks
        length = int(work.task.lengths[prompts].max())
        begins = [int(masks[where][prompts].int().argmax(1).min()) for where in {*work.where}]
        first = min(max(references.first(prompts), min(begins)), int(work.task.answer_positions[prompts].min()))
        if any(one.kind != "logits" for one in work.targets):
            read_from = int(masks[work.at][prompts].int().argmax(1).min())
            first = min(first, max(references.first(prompts), read_from))
        self._window = slice(first, length)
        self._references, self._replay = references, backend.start(work.task.clean[prompts, :length], first)
        self._task = work.task[prompts]

    def rows(self) -> int:
        """How many sources run at once."""
        device = self._replay.stream(0).device
        tokens = len(self._prompts) * (self._window.stop - self._window.start)
        useful = max(1, TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE["cuda"]) // tokens)
        return fitting(_PARTS * self._replay.row_bytes * len(self._prompts), device, useful)

    def run(self, some: Tensor) -> Tensor:
        """Values ``[some, prompts, targets, 2]``."""
        work, prompts, window = self._work, self._prompts, self._window
        chosen = [Source(work.sources[i], self._masks[work.where[i]][prompts, window]) for i in some.tolist()]
        keys = {key_of(site) for source in chosen for site in source.sites}
        keys |= {key_of(site) for site in work.targets if site.kind != "logits"}
        references = {key: self._references.of(key, prompts, window).to(self._replay.stream(0)) for key in keys}
        found = torch.zeros(len(some), len(prompts), len(work.targets), 2)
        sites = [site for site in work.targets if site.kind != "logits"]
        taps = {key: self._tap(key, references[key], found) for key in dict.fromkeys(map(key_of, sites))}
        metric, read = work.task.metric, None
        if any(site.kind == "logits" for site in work.targets):
            columns = self._task.answers if metric.reads == "answers" else None
            read = Read(self._task.answer_positions, columns)
        out = split_pass(self._backend, self._replay, work.rules, chosen, references, taps, read)
        if out is not None and out.relevant is not None:
            _check_size(out)
            again = torch.arange(len(prompts)).repeat(len(some))
            measured = metric(out.relevant.flatten(0, 1), self._task[again], None).cpu().view(len(some), -1, 1, 1)
            place = [site.kind for site in work.targets].index("logits")
            found[:, :, place : place + 1] = measured.float()
        return found

    def _tap(self, key: Key, reference: Tensor, found: Tensor) -> Callable[[Split], None]:
        work, prompts, window = self._work, self._prompts, self._window
        mask = self._masks[work.at][prompts, : window.stop]
        before = self._references.of(key, prompts, slice(0, window.start))  # there, the activation is its reference
        places = [i for i, site in enumerate(work.targets) if key_of(site) == key]
        slots = [_slot(work.model, work.targets[i]) for i in places]

        def read(x: Split) -> None:
            if x.relevant is not None:
                shares = arrived(x, reference, before, mask, slots)
                found[: len(x.relevant), :, places] = shares.cpu()

        return read


def _check_size(out: Split) -> None:
    """Whether relevant parts have stayed within what they are parts of.

    Raises:
        UnsupportedError: they have not.
    """
    assert out.relevant is not None
    largest = float(out.relevant.abs().max())
    if not largest <= _TOO_LARGE * max(1.0, float(out.total.abs().max())):
        raise UnsupportedError(
            f"What is relevant of the logits grew to {largest:.2g}, where the logits themselves are at most "
            f"{float(out.total.abs().max()):.2g}: parts of opposite signs fed each other",
            fix='Use stabilise=True, activation="shapley", or reference="corrupt", whose parts are smaller',
        )


def arrived(x: Split, reference: Tensor, before: Tensor, mask: Tensor, slots: Sequence[int | None]) -> Tensor:
    """How much of what is at sites is relevant ``[sources, n, slots, 2]``.

    By direction: the relevant part's share of the target's own deviation from its reference, ``r . d / d . d``, summed
    over positions; parts of one target add up, and those that work against it are negative. By size:
    ``|r| / (|r| + |i|)``, the sums of absolute values of both parts.

    Args:
        x: what is there ``[n, pos, (heads,) width]``.
        reference: of the same shape, or what broadcasts to it.
        before: what is at the positions before these, of which nothing is relevant ``[n, earlier, (heads,) width]``.
        mask: which positions count ``[n, earlier + pos]``.
        slots: which heads; None: there are none.
    """
    assert x.relevant is not None
    total, relevant = x.total, x.relevant
    own = total - reference
    earlier = before.to(total) if before.dim() else total[:, :0]
    if slots[0] is None:
        total, relevant, own, earlier = (part.unsqueeze(-2) for part in (total, relevant, own, earlier))
    else:
        total, relevant, own, earlier = (part[..., slots, :] for part in (total, relevant, own, earlier))
    counted = mask.to(total.device)[:, mask.shape[1] - total.shape[1] :, None, None]
    relevant, own = relevant * counted, own * counted
    axes = (-3, -1)
    signed = (relevant * own).sum(axes) / own.square().sum(axes).clamp_min(1e-12)
    size, rest = relevant.abs().sum(axes), (total * counted - relevant).abs().sum(axes)
    rest = rest + (earlier * mask.to(total.device)[:, : earlier.shape[1], None, None]).abs().sum(axes)
    return torch.stack([signed, size / (size + rest).clamp_min(1e-12)], -1)


def _slot(model: Model, site: Site) -> int | None:
    return None if site.head is None else model.info.slot(site)


def _prompts(work: Work, base_tokens: int) -> list[Tensor]:
    """Prompts that run together: of a length and template, and so few that all sources fit."""
    lengths, templates = work.task.lengths, work.task.templates
    groups = []
    for length, template in torch.stack([lengths, templates], 1).unique(dim=0).tolist():
        prompts = ((lengths == length) & (templates == template)).nonzero()[:, 0]
        several = max(1, min(TOKENS_AT_ONCE["cpu"] // len(work.sources), base_tokens) // length)
        groups += prompts.split(several)
    return groups


def _told(work: Work) -> str:
    reference = work.reference if isinstance(work.reference, str) else digest(work.reference.corrupt.tolist())
    rules = work.rules
    sets = digest([f"{list(map(str, some))} {where}" for some, where in zip(work.sources, work.where, strict=True)])
    how = (rules.attention, rules.activation, rules.biases, rules.stabilise)
    return f"cd-t {sets} {list(map(str, work.targets))} {work.at} {reference} {how}"
