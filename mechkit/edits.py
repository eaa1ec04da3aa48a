"""Edits: changes made while the model runs. Pure descriptions; the backend carries them out.

    ablate("7.3")                             set to zero
    ablate("7.3", "mean", reference=task)     set to its mean over the task's corrupt prompts
    ablate("7.3", "resample", reference=task) set to its value on the task's corrupt prompts, row by row
    scale("7.3", 0.5)                         multiply
    patch_in("7.3", values)                   set to given values
    steer("resid.10", vector, alpha=2.0)      add alpha times a vector

Edits are carried out in the order given. An edit whose site never ran is an error, not a shrug.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from .errors import EditError, OptionError
from .sites import Site, SitesLike, sites

if TYPE_CHECKING:
    from torch import Tensor

    from .tasks.task import Task

ABLATIONS = ("zero", "mean", "resample")
Ablation: TypeAlias = Literal["zero", "mean", "resample"]
_NOT_EDITABLE = ("result", "logits")


@dataclass(frozen=True, eq=False)
class Edit:
    """What every edit has: the sites it changes, and the positions (None: all of them)."""

    sites: tuple[Site, ...]
    positions: tuple[int, ...] | None

    def __post_init__(self) -> None:
        if not self.sites:
            raise EditError("An edit of no sites", expected="at least one address")
        for edited in self.sites:
            if edited.kind in _NOT_EDITABLE:
                raise EditError(
                    f'"{edited}" cannot be edited',
                    expected="z, q, k, v, pattern, scores, mlp, resid or embed",
                )


@dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """Replace by zero, by the reference's mean, or by the reference's own values."""

    mode: Ablation
    reference: Task | None


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply by ``alpha``."""

    alpha: float


@dataclass(frozen=True, eq=False)
class PatchIn(Edit):
    """Replace by given values: one tensor a site, each broadcastable to the site's own shape."""

    values: Mapping[Site, Tensor]


@dataclass(frozen=True, eq=False)
class Steer(Edit):
    """Add ``alpha`` times ``vector``."""

    vector: Tensor
    alpha: float


def ablate(
    addresses: SitesLike,
    mode: Ablation | None = None,
    reference: Task | None = None,
    positions: Sequence[int] | None = None,
) -> Ablate:
    """Take sites out.

    Args:
        addresses: what to take out.
        mode: ``"zero"``; ``"mean"``, the mean over the reference's corrupt prompts, for each position of a
            template when the run is of a task, else over all positions; ``"resample"``, the values on the
            reference's corrupt prompts, row by row. Left out: mean where there is a reference, else zero.
        reference: the task whose corrupt prompts give the values.
        positions: token positions from 0 (negative: from the end); None for all.
    """
    chosen = mode or ("zero" if reference is None else "mean")
    if chosen not in ABLATIONS:
        raise OptionError(f"Ablation mode {mode!r}", expected="one of " + ", ".join(ABLATIONS))
    if chosen != "zero" and reference is None:
        raise EditError(f"{chosen} ablation without a reference", fix="Pass reference=task")
    return Ablate(sites(addresses), _positions(positions), chosen, reference)


def scale(addresses: SitesLike, alpha: float, positions: Sequence[int] | None = None) -> Scale:
    """Multiply sites by ``alpha``: 1 changes nothing, 0 is a zero ablation, -1 turns them round."""
    return Scale(sites(addresses), _positions(positions), float(alpha))


def patch_in(addresses: SitesLike, values: Tensor | Mapping, positions: Sequence[int] | None = None) -> PatchIn:
    """Set sites to given values.

    Args:
        addresses: what to set.
        values: one tensor for every site, or a mapping from address to tensor. Each must broadcast to the
            site's shape, e.g. ``[d_head]``, ``[pos, d_head]`` or ``[batch, pos, d_head]`` for a head.
        positions: token positions from 0 (negative: from the end); None for all.

    Raises:
        EditError: a site has no value, or a value has no site.
    """
    chosen = sites(addresses)
    if not isinstance(values, Mapping):
        return PatchIn(chosen, _positions(positions), dict.fromkeys(chosen, values))
    keyed = {sites(key)[0]: value for key, value in values.items()}
    if odd := set(keyed) ^ set(chosen):
        raise EditError(
            f"Sites and values do not match: {', '.join(sorted(map(str, odd)))}", expected="one value a site"
        )
    return PatchIn(chosen, _positions(positions), keyed)


def steer(addresses: SitesLike, vector: Tensor, alpha: float = 1.0, positions: Sequence[int] | None = None) -> Steer:
    """Add ``alpha * vector`` to sites; ``vector`` is ``[d_head]`` for heads, ``[d_model]`` elsewhere."""
    return Steer(sites(addresses), _positions(positions), vector, float(alpha))


def _positions(positions: Sequence[int] | None) -> tuple[int, ...] | None:
    if positions is None:
        return None
    if not positions:
        raise OptionError("An empty list of positions", expected="at least one, or None for all")
    return tuple(int(position) for position in positions)
