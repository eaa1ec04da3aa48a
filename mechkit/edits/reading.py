"""How the arguments of edits are read: numbers, positions, heads, and values of sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import EditError, OptionError, SiteError
from ..sites import Site, SitesLike, sites
from .kinds import Amount

if TYPE_CHECKING:
    from torch import Tensor

Positions: TypeAlias = "int | str | Sequence[int] | None"
_BY_HEAD = ("z", "pattern", "scores")


def patterns(heads: SitesLike, what: str) -> tuple[Site, ...]:
    """The patterns of heads.

    Raises:
        SiteError: an address that is no head's.
    """
    chosen = sites(heads)
    for one in chosen:
        if one.head is None or one.grouped or one.kind not in _BY_HEAD:
            raise SiteError(f'{what} of "{one}"', expected='heads, such as "9.9"')
    return tuple(Site(one.layer, one.head, "pattern") for one in chosen)


def number(name: str, value: Any, least: float | None = None, most: float | None = None) -> float:
    """A finite number within bounds.

    Raises:
        OptionError: it is none.
    """
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise OptionError(f"{name} = {value!r}", expected="a number") from None
    if found != found or found in (float("inf"), float("-inf")):
        raise OptionError(f"{name} = {value!r}", expected="a finite number")
    if (least is not None and found < least) or (most is not None and found > most):
        expected = f"a number from {least:g}" + ("" if most is None else f" to {most:g}")
        raise OptionError(f"{name} = {value!r}", expected=expected)
    return found


def amount(name: str, value: Any, least: float | None = None, most: float | None = None) -> Amount:
    """A number, or a tensor of numbers, which stays one where it has axes or asks for gradients.

    Raises:
        OptionError: it is neither, or outside its bounds.
    """
    if not _is_tensor(value) or not (value.ndim or value.requires_grad):
        return number(name, value, least, most)
    if least is not None and most is not None and not bool(((value >= least) & (value <= most)).all()):
        low, high = float(value.min()), float(value.max())
        raise OptionError(f"{name} from {low:g} to {high:g}", expected=f"numbers from {least:g} to {most:g}")
    return value


def tensor(name: str, value: Any) -> Tensor:
    """A tensor as it is.

    Raises:
        EditError: it is none.
    """
    if not _is_tensor(value):
        raise EditError(f"{name} of type {type(value).__name__}", expected="a tensor")
    return value


def each(
    chosen: Sequence[Site], values: Mapping, read: Callable[[Any], Any], sites_of: Callable = sites
) -> dict[Site, Any]:
    """Values given by address, by site.

    Args:
        chosen: the sites that need one.
        values: by address, in any form.
        read: what checks a value.
        sites_of: what reads an address.

    Raises:
        EditError: a site without a value, or a value without a site.
    """
    keyed = {sites_of(address)[0]: read(value) for address, value in values.items()}
    if odd := set(keyed) ^ set(chosen):
        raise EditError(
            f"Sites and values do not match: {', '.join(sorted(map(str, odd)))}", expected="one value a site"
        )
    return keyed


def where(positions: Positions, name: str = "positions") -> tuple[int, ...] | str | None:
    """Positions as an edit has them.

    Raises:
        OptionError: neither numbers nor a name nor None.
    """
    if positions is None or isinstance(positions, str):
        return positions
    if isinstance(positions, bool) or not isinstance(positions, int | Sequence):
        raise OptionError(f"{name} = {positions!r}", expected="numbers, a span's name, or None for all")
    numbers = [positions] if isinstance(positions, int) else list(positions)
    if not numbers:
        raise OptionError(f"An empty list of {name}", expected="at least one, or None for all")
    try:
        return tuple(index(one) for one in numbers)
    except TypeError:
        raise OptionError(f"{name} = {positions!r}", expected="whole numbers") from None


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "requires_grad") and hasattr(value, "ndim")
