"""Edits of what sites hold: taken out, scaled, replaced, mixed, added to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import EditError, OptionError, SiteError
from ..sites import SitesLike, sites
from .kinds import ABLATIONS, Ablate, Ablation, Amount, Inject, PatchIn, Scale, Steer, Transform, of_site
from .reading import Positions, amount, each, number, patterns, tensor, where

if TYPE_CHECKING:
    from torch import Tensor

    from ..tasks.task import Task


def ablate(
    addresses: SitesLike,
    mode: Ablation | None = None,
    reference: Task | None = None,
    positions: Positions = None,
) -> Ablate:
    """Take sites out.

    Args:
        addresses: what to take out.
        mode: ``"zero"``; ``"mean"``, the mean over the reference's corrupt prompts, for each position of a
            template when the run is of a task, else over all positions; ``"resample"``, the values on the
            reference's corrupt prompts, row by row; ``"uniform"``, of heads only: even attention over every key
            that the query can see. Left out: mean where there is a reference, else zero.
        reference: the task whose corrupt prompts give the values.
        positions: token positions from 0 (negative: from the end), or a span of the task; None for all.
    """
    chosen = mode or ("zero" if reference is None else "mean")
    if chosen not in ABLATIONS:
        raise OptionError(f"Ablation mode {mode!r}", expected="one of " + ", ".join(ABLATIONS))
    if chosen in ("mean", "resample") and reference is None:
        raise EditError(f"{chosen} ablation without a reference", fix="Pass reference=task")
    taken = patterns(addresses, "uniform ablation") if chosen == "uniform" else sites(addresses)
    return Ablate(taken, where(positions), chosen, reference)


def scale(addresses: SitesLike, alpha: Amount | Mapping | None = None, positions: Positions = None) -> Scale:
    """Multiply sites by ``alpha``: 1 changes nothing, 0 is a zero ablation, -1 turns them round.

    Args:
        addresses: what to multiply.
        alpha: a number; a tensor that broadcasts to the site, such as ``[d_head]`` for a head; a mapping from address
            to either; left out: to be found by a fit.
        positions: token positions from 0 (negative: from the end), or a span of the task; None for all.

    Raises:
        OptionError: ``alpha`` is not a finite number, nor a tensor.
        EditError: a site has no value, or a value has no site.
    """
    chosen, read = sites(addresses), partial(amount, "alpha")
    if isinstance(alpha, Mapping):
        return Scale(chosen, where(positions), each(chosen, alpha, read))
    return Scale(chosen, where(positions), None if alpha is None else read(alpha))


def gate(heads: SitesLike, gates: Amount | Mapping, positions: Positions = None) -> Scale:
    """Multiply the z of heads at each token by a number of its own: 1 changes nothing, 0 takes the head out there.

    Args:
        heads: addresses such as ``"9.9"``.
        gates: a tensor that broadcasts to ``[batch, pos]``, or a mapping from address to such a tensor; ``pos`` counts
            the numbered positions where there are any.
        positions: token positions from 0 (negative: from the end), or a span of the task; None for all.

    Raises:
        SiteError: an address that is no head's.
        OptionError: gates that are neither tensors nor numbers.
        EditError: a head has no gates, or gates have no head.
    """
    chosen = sites(heads)
    for one in chosen:
        if not one.is_head:
            raise SiteError(f'gate of "{one}"', expected='heads, such as "9.9"')
    if isinstance(gates, Mapping):
        return Scale(chosen, where(positions), each(chosen, gates, _by_token))
    return Scale(chosen, where(positions), _by_token(gates))


def patch_in(addresses: SitesLike, values: Tensor | Mapping, positions: Positions = None) -> PatchIn:
    """Set sites to given values.

    Args:
        addresses: what to set.
        values: one tensor for every site, or a mapping from address to tensor. Each must broadcast to the
            site's shape, e.g. ``[d_head]``, ``[pos, d_head]`` or ``[batch, pos, d_head]`` for a head; ``pos`` counts
            the numbered positions where there are any.
        positions: token positions from 0 (negative: from the end), or a span of the task; None for all.

    Raises:
        EditError: a site has no value, or a value has no site.
    """
    chosen = sites(addresses)
    if not isinstance(values, Mapping):
        return PatchIn(chosen, where(positions), dict.fromkeys(chosen, values))
    return PatchIn(chosen, where(positions), each(chosen, values, lambda value: value))


def inject(
    addresses: SitesLike,
    values: Tensor | Mapping,
    gate: Amount | Mapping | None = None,
    positions: Positions = None,
) -> Inject:
    """Mix given values into sites: ``(1 - gate) * x + gate * value``, x what is there.

    Task vectors, the mean z of heads over prompts that show the task, are given to a prompt that does not in this
    way: Soft Injection (2507.20906).

    Args:
        addresses: what to change.
        values: as of ``patch_in``.
        gate: from 0, which changes nothing, to 1, which is ``patch_in``: a number, a tensor that broadcasts to the
            site, or a mapping from address to either; left out: to be found by a fit.
        positions: token positions from 0 (negative: from the end), or a span of the task; None for all.

    Raises:
        OptionError: a gate outside 0 to 1.
        EditError: a site has no value or gate, or one of these has no site.
    """
    given, read = patch_in(addresses, values, positions), partial(amount, "gate", least=0.0, most=1.0)
    if isinstance(gate, Mapping):
        return Inject(given.sites, given.positions, given.values, each(given.sites, gate, read))
    return Inject(given.sites, given.positions, given.values, None if gate is None else read(gate))


def steer(
    addresses: SitesLike,
    vector: Tensor | Mapping | None = None,
    alpha: float = 1.0,
    positions: Positions = None,
) -> Steer:
    """Add ``alpha * vector`` to sites.

    Args:
        addresses: what to add to.
        vector: ``[d_head]`` for heads, ``[d_model]`` elsewhere, or what broadcasts to the site; a mapping from address
            to such tensors; left out: to be found by a fit.
        alpha: how much of it.
        positions: token positions from 0 (negative: from the end), or a span of the task; None for all.

    Raises:
        OptionError: ``alpha`` is not a finite number.
        EditError: a site has no vector, or a vector has no site.
    """
    chosen, much = sites(addresses), number("alpha", alpha)
    if isinstance(vector, Mapping):
        return Steer(chosen, where(positions), each(chosen, vector, partial(tensor, "vector")), much)
    return Steer(chosen, where(positions), vector, much)


def transform(
    addresses: SitesLike,
    matrix: Tensor | Mapping,
    shift: Tensor | Mapping | None = None,
    positions: Positions = None,
) -> Transform:
    """Set sites to ``x @ matrix + shift``, x what is there.

    Args:
        addresses: what to change, of one width: z, q, k, v of heads, mlp, resid, embed.
        matrix: ``[width, width]``, or a mapping from address to such tensors; the identity changes nothing.
        shift: ``[width]``, or a mapping from address to such tensors; left out: nothing is added.
        positions: token positions from 0 (negative: from the end), or a span of the task; None for all.

    Raises:
        EditError: a matrix that is not square, a shift of another width, or a site that is a pattern or scores.
    """
    chosen = sites(addresses)
    if any(one.kind in ("pattern", "scores") for one in chosen):
        raise EditError("transform of attention", expected="z, q, k, v, mlp, resid or embed", fix="Use mk.attend")
    read = partial(tensor, "transform by a matrix or shift")
    matrices, shifts = (each(chosen, one, read) if isinstance(one, Mapping) else one for one in (matrix, shift))
    for one in chosen:
        _check_widths(of_site(matrices, one), of_site(shifts, one))
    return Transform(chosen, where(positions), matrices, shifts)  # type: ignore[arg-type]


def _check_widths(matrix: Any, shift: Any) -> None:
    shape = getattr(matrix, "shape", None)
    if not shape or not all(hasattr(part, "to") for part in (matrix, shift) if part is not None):
        raise EditError(f"transform by {type(matrix).__name__} of shape {shape}", expected="tensors")
    width = matrix.shape[-1]
    if matrix.ndim != 2 or len(matrix) != width or (shift is not None and list(shift.shape) != [width]):
        given = f"{list(matrix.shape)}" + ("" if shift is None else f" and {list(shift.shape)}")
        raise EditError(f"transform by shapes {given}", expected="[width, width] and [width]")


def _by_token(gates: Any) -> Amount:
    """Numbers ``[batch, pos]`` with an axis for the numbers of a head."""
    read = amount("gates", gates)
    return read if isinstance(read, float | int) else read[..., None]
