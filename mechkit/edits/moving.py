"""The same edit with its names looked up, or at other sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import EditError
from ..sites import Site
from .kinds import Attend, Edit, TopHeads

if TYPE_CHECKING:
    from torch import Tensor

_PLACES = ("positions", "keys", "to")


def at_masks(edit: Edit, look_up: Callable[[str], Tensor]) -> Edit:
    """The same edit with the names of spans replaced by what ``look_up`` gives for them."""
    named = {name: getattr(edit, name, None) for name in _PLACES}
    changes: dict[str, Any] = {name: look_up(value) for name, value in named.items() if isinstance(value, str)}
    if isinstance(edit, Attend) and edit.how == "set" and isinstance(edit.value, Mapping):
        weights = {key: look_up(key) if isinstance(key, str) else key for key in edit.value}
        changes["value"] = {weights[key]: weight for key, weight in edit.value.items()}
    return replace(edit, **changes) if changes else edit


def moved(edit: Edit, mapping: Mapping[Site, Site]) -> Edit:
    """The same edit at other sites, their values with them: for controls such as random heads of the same layers.

    Args:
        edit: any but ``top_heads``, whose values are those of its heads.
        mapping: from the edit's sites to sites of the same kind; a site that is not there stays. The sites of an edit
            of attention are patterns.

    Raises:
        EditError: a site of another kind, one site for two that have different values, or an edit that cannot move.
    """
    places = {site: mapping.get(site, site) for site in edit.sites}
    if all(old == new for old, new in places.items()):
        return edit
    if isinstance(edit, TopHeads):
        raise EditError("top_heads at other heads", fix="Make it anew with mk.top_heads")
    for old, new in places.items():
        if old.kind != new.kind:
            raise EditError(f'"{old}" moved to "{new}"', expected=f"a site of kind {old.kind!r}")
    changes: dict[str, Any] = {"sites": tuple(places.values())}
    for name in (field.name for field in fields(edit)):
        values = getattr(edit, name)
        if isinstance(values, Mapping) and set(values) == set(edit.sites):
            changes[name] = {places[site]: value for site, value in values.items()}
            if not all(_same(changes[name][places[site]], value) for site, value in values.items()):
                raise EditError("Several values for sites that become one", expected="one value a site, or a group")
    return replace(edit, **changes)


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, float) and isinstance(other, float) and one == other)
