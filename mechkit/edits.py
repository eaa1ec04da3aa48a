"""Edits: changes made while the model runs. Pure descriptions; the backend carries them out.

    ablate("7.3")                             set to zero
    ablate("7.3", "mean", reference=task)     set to its mean over the task's corrupt prompts
    ablate("7.3", "resample", reference=task) set to its value on the task's corrupt prompts, row by row
    ablate("7.3", "uniform")                  look evenly at every key it can see
    scale("7.3", 0.5)                         multiply
    patch_in("7.3", values)                   set to given values
    steer("resid.10", vector, alpha=2.0)      add alpha times a vector
    transform("7.3", matrix)                  multiply by a matrix, and add a vector
    attend("7.3", mask="S2")                  change where a head looks; see ``attend``

Edits are carried out in the order given; those of one site build on each other. Positions are those of the prompt,
from 0, or from its end when negative; or the name of a span, where the run is of a task. An edit whose site or
position never ran is an error, not a shrug.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import index
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .errors import EditError, OptionError, SiteError
from .sites import Site, SitesLike, sites

if TYPE_CHECKING:
    from torch import Tensor

    from .tasks.task import Task

ABLATIONS = ("zero", "mean", "resample", "uniform")
Ablation: TypeAlias = Literal["zero", "mean", "resample", "uniform"]
Positions: TypeAlias = "int | str | Sequence[int] | None"
TARGETS = ("uniform", "identity", "first")
_NOT_EDITABLE = ("result", "logits")
_BY_HEAD = ("z", "pattern", "scores")


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """What every edit has: the sites it changes, and where.

    Attributes:
        sites: what is changed.
        positions: None for all of them; numbers; a span's name; or, once that is looked up in a task, a mask
            ``[batch, pos]``. Of a pattern they are the queries.
    """

    sites: tuple[Site, ...]
    positions: tuple[int, ...] | str | Tensor | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(dict.fromkeys(self.sites)))  # each once
        if not self.sites:
            raise EditError("An edit of no sites", expected="at least one address")
        for edited in self.sites:
            if edited.kind in _NOT_EDITABLE:
                raise EditError(
                    f'"{edited}" cannot be edited',
                    expected="z, q, k, v, pattern, scores, mlp, resid or embed",
                )

    def __repr__(self) -> str:
        """Without tensors, which are long."""
        rest = ((field.name, getattr(self, field.name)) for field in fields(self) if field.name != "sites")
        told = [f"{name}={value!r}" for name, value in rest if isinstance(value, str | int | float | tuple)]
        return f"{type(self).__name__}({', '.join([repr(' '.join(map(str, self.sites))), *told])})"

    @property
    def grows(self) -> bool:
        """True when the edit of a longer prompt leaves what it did to a shorter one, so that it can be cached."""
        return not (isinstance(self.positions, tuple) and min(self.positions) < 0)


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Edit):
    """Replace by zero, by the reference's mean, by the reference's own values, or by even attention."""

    mode: Ablation
    reference: Task | None


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply by ``alpha``."""

    alpha: float


@dataclass(frozen=True, eq=False, repr=False)
class PatchIn(Edit):
    """Replace by given values: one tensor a site, each broadcastable to the site's own shape."""

    values: Mapping[Site, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Steer(Edit):
    """Add ``alpha`` times ``vector``."""

    vector: Tensor
    alpha: float


@dataclass(frozen=True, eq=False, repr=False)
class Transform(Edit):
    """Multiply from the right by ``matrix``, then add ``shift``."""

    matrix: Tensor
    shift: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class Attend(Edit):
    """Change the scores or the pattern of heads; see ``attend``.

    Attributes:
        how: ``bias``, ``mask``, ``set``, ``sharpen`` or ``toward``.
        value: what goes with it: a number, weights, or a target's name.
        keys: key positions, as ``positions``; None for all.
        alpha: how far ``toward`` goes, from 0 to 1.
    """

    how: str
    value: Any
    keys: tuple[int, ...] | str | Tensor | None = None
    alpha: float = 1.0

    @property
    def grows(self) -> bool:
        """As of every edit; keys must not be counted from the end, nor be those of one length of prompt."""
        if getattr(self.value, "ndim", 0):
            return False
        counted = list(self.value) if isinstance(self.value, Mapping) else self.keys
        from_end = isinstance(counted, tuple | list) and any(isinstance(key, int) and key < 0 for key in counted)
        return super().grows and not from_end


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
    where = _patterns(addresses, "uniform ablation") if chosen == "uniform" else sites(addresses)
    return Ablate(where, _positions(positions), chosen, reference)


def scale(addresses: SitesLike, alpha: float, positions: Positions = None) -> Scale:
    """Multiply sites by ``alpha``: 1 changes nothing, 0 is a zero ablation, -1 turns them round."""
    return Scale(sites(addresses), _positions(positions), _number("alpha", alpha))


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
        return PatchIn(chosen, _positions(positions), dict.fromkeys(chosen, values))
    keyed = {sites(key)[0]: value for key, value in values.items()}
    if odd := set(keyed) ^ set(chosen):
        raise EditError(
            f"Sites and values do not match: {', '.join(sorted(map(str, odd)))}", expected="one value a site"
        )
    return PatchIn(chosen, _positions(positions), keyed)


def steer(addresses: SitesLike, vector: Tensor, alpha: float = 1.0, positions: Positions = None) -> Steer:
    """Add ``alpha * vector`` to sites; ``vector`` is ``[d_head]`` for heads, ``[d_model]`` elsewhere."""
    return Steer(sites(addresses), _positions(positions), vector, _number("alpha", alpha))


def transform(
    addresses: SitesLike, matrix: Tensor, shift: Tensor | None = None, positions: Positions = None
) -> Transform:
    """Set sites to ``x @ matrix + shift``, x what is there.

    Args:
        addresses: what to change, of one width: z, q, k, v of heads, mlp, resid, embed.
        matrix: ``[width, width]``; the identity changes nothing.
        shift: ``[width]``; left out: nothing is added.
        positions: token positions from 0 (negative: from the end), or a span of the task; None for all.

    Raises:
        EditError: a matrix that is not square, a shift of another width, or a site that is a pattern or scores.
    """
    chosen = sites(addresses)
    if any(one.kind in ("pattern", "scores") for one in chosen):
        raise EditError("transform of attention", expected="z, q, k, v, mlp, resid or embed", fix="Use mk.attend")
    shapes = [getattr(part, "shape", None) for part in (matrix, shift) if part is not None]
    if any(not hasattr(part, "to") for part in (matrix, shift) if part is not None) or not shapes[0]:
        raise EditError(f"transform by {type(matrix).__name__} of shape {shapes[0]}", expected="tensors")
    width = matrix.shape[-1]
    if matrix.ndim != 2 or len(matrix) != width or (shift is not None and list(shift.shape) != [width]):
        given = f"{list(matrix.shape)}" + ("" if shift is None else f" and {list(shift.shape)}")
        raise EditError(f"transform by shapes {given}", expected="[width, width] and [width]")
    return Transform(chosen, _positions(positions), matrix, shift)


def attend(
    heads: SitesLike,
    *,
    bias: float | Tensor | None = None,
    mask: Positions = None,
    set: Tensor | Mapping[int | str, float] | None = None,
    sharpen: float | None = None,
    toward: Literal["uniform", "identity", "first"] | None = None,
    keys: Positions = None,
    alpha: float = 1.0,
    positions: Positions = None,
) -> Attend:
    """Change where heads look; one of the five, and never at what the model itself hides from a query.

    Args:
        heads: addresses such as ``"9.9"``.
        bias: add to the scores, a number or a tensor that broadcasts to ``[batch, query, key]``; with ``keys``, only
            there.
        mask: key positions (or a span) that become invisible. A query that can then see nothing attends to nothing.
        set: the pattern itself: a weight a key position (or span, shared evenly), all other keys 0; or a tensor that
            broadcasts to ``[batch, query, key]``. Queries that see none of those keys stay as they are.
        sharpen: multiply the scores: above 1 sharper, below 1 flatter, 0 even (attention sinks apart).
        toward: mix the pattern with ``"uniform"`` (every visible key), ``"identity"`` (the query itself) or
            ``"first"`` (the first visible key): ``(1 - alpha) * pattern + alpha * target``.
        keys: for ``bias``, which keys.
        alpha: for ``toward``, from 0 (no change) to 1.
        positions: the queries; None for all.

    Raises:
        EditError: none or several of the five, or addresses that are not heads.
        OptionError: a number outside its range.
    """
    given = {"bias": bias, "mask": mask, "set": set, "sharpen": sharpen, "toward": toward}
    chosen = {how: value for how, value in given.items() if value is not None}
    if len(chosen) != 1:
        raise EditError(
            f"attend with {' and '.join(chosen) or 'nothing to do'}",
            expected="exactly one of " + ", ".join(given),
            fix="Give several edits: they are carried out in order",
        )
    ((how, value),) = chosen.items()
    if keys is not None and how != "bias":
        raise EditError(f"attend with {how} and keys", expected="keys together with bias only")
    if how == "sharpen" and not _number(how, value) >= 0:
        raise OptionError(f"sharpen = {value!r}", expected="a number from 0")
    if how == "toward" and value not in TARGETS:
        raise OptionError(f"toward = {value!r}", expected="one of " + ", ".join(TARGETS))
    if not 0 <= _number("alpha", alpha) <= 1:
        raise OptionError(f"alpha = {alpha!r}", expected="a number from 0 to 1")
    if how == "mask":
        keys = value
    if isinstance(value, Mapping) and not value:
        raise EditError("attend with set={}", expected="a weight for at least one key")
    return Attend(_patterns(heads, "attend"), _positions(positions), how, value, _positions(keys), float(alpha))


def at_masks(edit: Edit, look_up: Any) -> Edit:
    """The same edit with the names of spans replaced by what ``look_up`` gives for them."""
    changes: dict[str, Any] = {}
    if isinstance(edit.positions, str):
        changes["positions"] = look_up(edit.positions)
    if isinstance(edit, Attend):
        if isinstance(edit.keys, str):
            changes["keys"] = look_up(edit.keys)
        if isinstance(edit.value, Mapping):
            weights = {k: look_up(k) if isinstance(k, str) else k for k in edit.value}
            changes["value"] = {weights[key]: weight for key, weight in edit.value.items()}
    return replace(edit, **changes) if changes else edit


def _patterns(heads: SitesLike, what: str) -> tuple[Site, ...]:
    chosen = sites(heads)
    for one in chosen:
        if one.head is None or one.grouped or one.kind not in _BY_HEAD:
            raise SiteError(f'{what} of "{one}"', expected='heads, such as "9.9"')
    return tuple(Site(one.layer, one.head, "pattern") for one in chosen)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise OptionError(f"{name} = {value!r}", expected="a number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise OptionError(f"{name} = {value!r}", expected="a finite number")
    return number


def _positions(positions: Positions) -> tuple[int, ...] | str | None:
    if positions is None or isinstance(positions, str):
        return positions
    if isinstance(positions, bool) or not isinstance(positions, int | Sequence):
        raise OptionError(f"positions = {positions!r}", expected="numbers, a span's name, or None for all")
    numbers = [positions] if isinstance(positions, int) else list(positions)
    if not numbers:
        raise OptionError("An empty list of positions", expected="at least one, or None for all")
    try:
        return tuple(index(number) for number in numbers)
    except TypeError:
        raise OptionError(f"positions = {positions!r}", expected="whole numbers") from None
