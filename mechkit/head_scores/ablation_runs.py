"""Every head taken out by itself: all layers in one sweep, each run begun at the head's block.

1. Prompts of about the same length run once, and what enters each block is kept (``backends.replay``).
2. In that run it is noted what heads get in place of their z: with ``uniform``, the mean of the values that a query
   can see. What is visible is told from the scores, never from the pattern, in which a visible key may have got
   nothing. No score is kept.
3. A head is taken out in the stream that enters its block: what is there is the base run's. Heads and prompts stand on
   the batch axis, as many as fit, and go through the later blocks together, heads of later layers joining them.
4. Heads that are held are out in the base run and in all of its variants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.change import functions_of
from ..backends.hooks import Function
from ..backends.lens import LensBackend
from ..backends.memory import in_batches
from ..backends.protocol import Write
from ..backends.replay import LensReplay
from ..backends.window import Change, Key, Window, visible
from ..edits import Edit, PatchIn, Scale, ablate
from ..errors import EditError, OptionError
from ..progress import Bar
from ..sites import Site
from ..tasks.task import Task
from .readings import Reading

if TYPE_CHECKING:
    from ..model import Model

_APART = 4  # prompts run together while the shortest lacks no more than this part of the longest's tokens


@dataclass(frozen=True, eq=False)
class Ablation:
    """How heads are taken out.

    Attributes:
        kind: ``zero``, ``mean``, ``uniform``, ``resample``, or ``scale``, which multiplies.
        factor: of ``scale``.
        values: what heads get with ``mean`` and ``resample``: ``[d_head]`` or ``[n, pos, d_head]``.
    """

    kind: str
    factor: float = 0.0
    values: Mapping[Site, Tensor] = field(default_factory=dict)

    def edit(self, heads: Sequence[Site], prompts: Tensor, length: int) -> Edit:
        """All of some heads taken out, in runs of some prompts."""
        if self.kind == "scale":
            return Scale(tuple(heads), None, self.factor)
        if self.kind in ("zero", "uniform"):
            return ablate(heads, "zero" if self.kind == "zero" else "uniform")
        given = {one: self.values[one] for one in heads}
        return PatchIn(tuple(heads), None, {one: v if v.ndim == 1 else v[prompts, :length] for one, v in given.items()})


def ablation_of(
    model: Model,
    kind: str,
    heads: Sequence[Site],
    ids: Tensor,
    reference: Task | None = None,
    task: Task | None = None,
    factor: float = 0.0,
) -> Ablation:
    """How heads are taken out, with the values that a reference gives them.

    Raises:
        EditError: mean or resample without a reference, or one whose prompts do not fit.
    """
    if kind not in ("mean", "resample"):
        return Ablation(kind, factor)
    asked = ablate(heads, "mean" if kind == "mean" else "resample", reference)
    (edit,) = model.resolved([asked], task)
    assert isinstance(edit, PatchIn)
    for one, value in edit.values.items():
        if value.ndim > 1 and (len(value) != len(ids) or value.shape[1] < ids.shape[1]):
            raise EditError(
                f'{kind} ablation of "{one}" by values of {len(value)} prompts of {value.shape[1]} tokens',
                expected=f"values of {len(ids)} prompts of {ids.shape[1]} tokens",
                fix="Take a reference with as many prompts, of the same lengths",
            )
    return Ablation(kind, values=edit.values)


def known_ablation(kind: str, known: Sequence[str]) -> None:
    """Whether a function has this ablation.

    Raises:
        OptionError: it has not.
    """
    if kind not in known:
        raise OptionError(f"ablation = {kind!r}", expected="one of " + ", ".join(known))


class HeadRuns:
    """Runs of prompts in which heads are taken out.

    Args:
        backend: what runs them.
        ids, lengths: the prompts ``[n, pos]``, ``[n]``.
        ablation: how heads are taken out.
        held: heads that are out in every run.
    """

    def __init__(
        self, backend: LensBackend, ids: Tensor, lengths: Tensor, ablation: Ablation, held: Sequence[Site] = ()
    ):
        self._backend, self._ids, self._lengths = backend, ids, lengths
        self._ablation, self._held = ablation, tuple(held)

    def measure(self, heads: Sequence[Site], reading: Reading, bar: Bar | None = None) -> tuple[Tensor, Tensor]:
        """What is read without and with each head out by itself: ``[n, ...]`` and ``[heads, n, ...]``.

        Raises:
            UnsupportedError: the family's blocks cannot be run one by one.
            CapacityError: a single variant does not fit in memory.
        """
        layers = torch.tensor([one.layer for one in heads], dtype=torch.long)
        own: list[tuple[Tensor, Tensor]] = []
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for prompts in alike(self._lengths, self._backend.base_tokens()):
            some = _Some(self._backend, self._ids, self._lengths, self._ablation, self._held, prompts)
            own.append((prompts, reading.begin(some.base, prompts)))
            pairs = torch.cartesian_prod(layers.argsort(stable=True), torch.arange(len(prompts)))
            run = partial(some.run, heads, reading)
            for ran, values, _ in in_batches(pairs, some.base.rows(reading.whole), run):
                found.append((ran[:, 0], prompts[ran[:, 1]], values))
                if bar is not None:
                    bar.update(len(ran))
        n, shape, device = len(self._ids), own[0][1].shape[1:], own[0][1].device
        before, after = torch.zeros(n, *shape, device=device), torch.zeros(len(heads), n, *shape, device=device)
        for prompts, values in own:
            before[prompts] = values
        for which, prompts, values in found:
            after[which, prompts] = values
        return before, after


class _Some:
    """Prompts that run together.

    Attributes:
        base: their base run.
    """

    def __init__(
        self,
        backend: LensBackend,
        ids: Tensor,
        lengths: Tensor,
        ablation: Ablation,
        held: Sequence[Site],
        prompts: Tensor,
    ):
        self._info, self._ablation, self._held, self._prompts = backend.info, ablation, held, prompts
        self._length = int(lengths[prompts].max())
        self._instead: dict[int, Tensor] = {}  # what heads get where it is the base run's, by layer
        tokens = ids[prompts, : self._length].to(backend.info.device)
        self.base = backend.start(tokens, 0)
        functions: dict[Key, Function] = self._noting()
        for layer in range(backend.info.n_layers):
            for key, change in self._always(layer, torch.arange(len(prompts))).items():
                functions[key] = _then(change, functions[key]) if key in functions else change
        if functions:
            # The first base run was there to see that variants of it are exact, with nothing changed.
            changed = LensReplay(backend, tokens, 0, (), functions)
            changed.row_bytes = self.base.row_bytes
            self.base = changed

    def run(self, heads: Sequence[Site], reading: Reading, pairs: Tensor) -> Tensor:
        """What is read of variants: head and prompt of each ``[rows, 2]``, heads by layer."""
        chosen = [heads[i] for i in pairs[:, 0].tolist()]
        with torch.inference_mode():
            streams = self.base.streams(list(self._writes(chosen, pairs[:, 1])), self._always)
            return reading.of(streams, pairs[:, 1])

    def _always(self, layer: int, rows: Tensor) -> Mapping[Key, Change]:
        """What is changed in all runs of some prompts: of a layer and rows of them."""
        held = [one for one in self._held if one.layer == layer]
        if not held:
            return {}
        edit = self._ablation.edit(held, self._prompts[rows.cpu()], self._length)
        return functions_of([edit], self._info, Window(torch.full((len(rows),), self._length)))

    def _noting(self) -> dict[Key, Function]:
        """Functions that note in the base run what heads get, where that depends on it."""
        functions: dict[Key, Function] = {}
        for layer in range(self._info.n_layers):
            if self._ablation.kind == "uniform":
                functions |= _even(layer, self._instead)
            elif self._ablation.kind == "scale":
                functions["z", layer] = _scaled(layer, self._ablation.factor, self._instead)
        return functions

    def _writes(self, heads: Sequence[Site], rows: Tensor) -> Iterator[Write]:
        """What each of these heads gets in its row, layer by layer."""
        layers = torch.tensor([one.layer for one in heads])
        for layer in layers.unique().tolist():
            here = (layers == layer).nonzero()[:, 0]
            some, device = [heads[i] for i in here.tolist()], self.base.stream(layer).device
            row, head = rows[here].to(device), torch.tensor([one.head for one in some], device=device)
            where = torch.ones(len(here), self._length, dtype=torch.bool, device=device)
            values = self._values(layer, some, rows[here], device)
            yield Write("z", layer, row, values, where, head)

    def _values(self, layer: int, heads: Sequence[Site], rows: Tensor, device: torch.device) -> Tensor:
        """What heads of a layer get, each in the run of one prompt: ``[rows, pos, d_head]``."""
        shape = (self._length, self._info.d_head)
        if layer in self._instead:
            head = torch.tensor([one.head for one in heads], device=device)
            return self._instead[layer][rows.to(device), :, head]
        if not self._ablation.values:
            return torch.zeros(1, device=device).expand(len(heads), *shape)
        given = [self._ablation.values[one] for one in heads]
        prompts = self._prompts[rows].tolist()
        parts = [v if v.ndim == 1 else v[i, : self._length] for v, i in zip(given, prompts, strict=True)]
        return torch.stack([part.to(device).expand(shape) for part in parts])


def alike(lengths: Tensor, base_tokens: int) -> Iterator[Tensor]:
    """Prompts that run together: of about the same length, and no more than one base run takes."""
    waiting: list[int] = []
    for prompt in lengths.argsort(stable=True).tolist():
        longest = int(lengths[prompt])
        apart = waiting and longest - int(lengths[waiting[0]]) > longest // _APART
        if waiting and (apart or longest * (len(waiting) + 1) > base_tokens):
            yield torch.tensor(waiting)
            waiting = []
        waiting.append(prompt)
    yield torch.tensor(waiting)


def _even(layer: int, instead: dict[int, Tensor]) -> dict[Key, Function]:
    """Functions that note z of even attention over what each query sees ``[batch, pos, heads, d_head]``."""
    seen: dict[str, Tensor] = {}

    def keep(v: Tensor) -> None:
        seen["v"] = v.clone()

    def note(scores: Tensor) -> None:
        seeing, v = visible(scores), seen.pop("v")
        even = (seeing / seeing.sum(-1, keepdim=True).clamp(min=1)).to(v)
        instead[layer] = torch.einsum("bhqk,bkhe->bqhe", even, v.repeat_interleave(even.shape[1] // v.shape[2], 2))

    return {("v", layer): keep, ("scores", layer): note}


def _scaled(layer: int, factor: float, instead: dict[int, Tensor]) -> Function:
    def note(z: Tensor) -> None:
        instead[layer] = z * factor

    return note


def _then(change: Change, look: Function) -> Function:
    def function(tensor: Tensor) -> Tensor:
        new = change(tensor)
        look(new)
        return new

    return function
