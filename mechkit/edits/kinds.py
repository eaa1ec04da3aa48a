"""The kinds of edit: what each of them says. Descriptions only; the backend carries them out.

1. An edit names its sites, and where it changes them.
2. A value that goes with it is one for all sites, or one a site: a mapping from site to value.
3. A value that is None is still to be found by a fit; such an edit cannot be carried out yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..errors import EditError
from ..sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    from ..tasks.task import Task

ABLATIONS = ("zero", "mean", "resample", "uniform")
Ablation: TypeAlias = Literal["zero", "mean", "resample", "uniform"]
Amount: TypeAlias = "float | Tensor"
Where: TypeAlias = "tuple[int, ...] | str | Tensor | None"
_NOT_EDITABLE = ("result", "logits")
_FITTED = ("vector", "alpha", "gate")


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """What every edit has: the sites it changes, and where.

    Attributes:
        sites: what is changed.
        positions: None for all of them; numbers; a span's name; or, once that is looked up in a task, a mask
            ``[batch, pos]``. Of a pattern they are the queries.
    """

    sites: tuple[Site, ...]
    positions: Where

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
        return not _from_end(self.positions)

    @property
    def missing(self) -> str | None:
        """The name of the value that a fit has yet to find; None where there is none."""
        return next((name for name in _FITTED if getattr(self, name, self) is None), None)


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Edit):
    """Replace by zero, by the reference's mean, by the reference's own values, or by even attention."""

    mode: Ablation
    reference: Task | None


@dataclass(frozen=True, eq=False, repr=False)
class Scale(Edit):
    """Multiply by ``alpha``: a number or what broadcasts to a site."""

    alpha: Amount | Mapping[Site, Amount] | None


@dataclass(frozen=True, eq=False, repr=False)
class PatchIn(Edit):
    """Replace by given values: one tensor a site, each broadcastable to the site's own shape."""

    values: Mapping[Site, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Inject(Edit):
    """Replace the share ``gate``, from 0 to 1, by given values."""

    values: Mapping[Site, Tensor]
    gate: Amount | Mapping[Site, Amount] | None


@dataclass(frozen=True, eq=False, repr=False)
class Steer(Edit):
    """Add ``alpha`` times ``vector``."""

    vector: Tensor | Mapping[Site, Tensor] | None
    alpha: float


@dataclass(frozen=True, eq=False, repr=False)
class Transform(Edit):
    """Multiply from the right by ``matrix``, then add ``shift``."""

    matrix: Tensor | Mapping[Site, Tensor]
    shift: Tensor | Mapping[Site, Tensor] | None


@dataclass(frozen=True, eq=False, repr=False)
class TopHeads(Edit):
    """Set to zero, at each token, all but the ``k`` heads of a layer that write the most.

    Attributes:
        k: how many of a layer's heads are left in.
        grams: W_O W_O^T of each head ``[d_head, d_head]``, which gives the norm of what it writes.
    """

    k: int
    grams: Mapping[Site, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Attend(Edit):
    """Change the scores or the pattern of heads; see ``attend``.

    Attributes:
        how: ``bias``, ``mask``, ``set``, ``sharpen``, ``toward`` or ``median``.
        value: what goes with it: a number, weights, or a target's name; of a bias also one value a site.
        keys: key positions, as ``positions``; None for all.
        alpha: how far ``toward`` goes, from 0 to 1.
        outside: every key but ``keys`` is meant.
    """

    how: str
    value: Any
    keys: Where = None
    alpha: float = 1.0
    outside: bool = False

    @property
    def grows(self) -> bool:
        """As of every edit; keys must not be counted from the end, nor values depend on the length of the prompt."""
        several = list(self.value.values()) if isinstance(self.value, Mapping) else [self.value]
        if self.how == "median" or any(getattr(value, "ndim", 0) for value in several):
            return False
        counted = tuple(self.value) if self.how == "set" and isinstance(self.value, Mapping) else self.keys
        return super().grows and not _from_end(counted)


@dataclass(frozen=True, eq=False, repr=False)
class Redistribute(Edit):
    """Give a part of the attention to some keys to others; see ``redistribute``.

    Attributes:
        keys: key positions that lose, as ``positions``; None: all but ``to``.
        to: key positions that gain, without those of ``keys``; None: all.
        keep: the share that ``keys`` keep.
        least: the attention to ``to`` from which on a query is changed.
        most: the share of it on ``keys`` up to which a query is changed.
    """

    keys: Where
    to: Where
    keep: float
    least: float
    most: float

    @property
    def grows(self) -> bool:
        """As of every edit; keys must not be counted from the end."""
        return super().grows and not (_from_end(self.keys) or _from_end(self.to))


def of_site(value: Any, site: Site) -> Any:
    """The value of a site: its own, or the one for all."""
    return value[site] if isinstance(value, Mapping) else value


def _from_end(positions: Any) -> bool:
    return isinstance(positions, tuple) and any(isinstance(one, int) and one < 0 for one in positions)
