"""What a sweep patches: words and addresses to sites, positions to places, the two together to cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ..errors import OptionError, SiteError, UnsupportedError
from ..sites import Site, SitesLike
from ..sites import sites as read_sites

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task

WORDS = ("heads", "q", "k", "v", "patterns", "scores", "mlps", "resid", "embed")
_KINDS = {  # of every word that is understood
    "heads": "z",
    "z": "z",
    "q": "q",
    "k": "k",
    "v": "v",
    "patterns": "pattern",
    "pattern": "pattern",
    "scores": "scores",
    "mlps": "mlp",
    "mlp": "mlp",
    "resid": "resid",
    "embed": "embed",
}
Place: TypeAlias = "str | int | None"
PositionsLike: TypeAlias = "str | int | Sequence[int]"


@dataclass(frozen=True)
class Cell:
    """A site to patch and where.

    Attributes:
        site: any site but the logits.
        positions: None for all; a span's name; or one position from 0. Of patterns and scores, the queries.
    """

    site: Site
    positions: Place = None


def read_patchable(model: Model, wanted: SitesLike) -> list[Site]:
    """Sites of words (``"heads"``, ``"mlps"``), addresses, or both (``"mlps 9.9.q"``), each once, in that order.

    A query head's key or value on a grouped-query model is read as its group's.

    Raises:
        SiteError: none at all, or one that this model does not have.
        UnsupportedError: the logits.
    """
    if isinstance(wanted, str):
        words = wanted.replace(",", " ").split()
        found = [
            one for word in words for one in (_of_kind(model, _KINDS[word]) if word in _KINDS else read_sites(word))
        ]
    else:
        found = list(read_sites(wanted))
    if not found:
        raise SiteError("No sites to patch", expected=", ".join(WORDS) + ", or addresses")
    chosen = list(dict.fromkeys(model.info.shared(model.info.check(one)) for one in found))
    if any(one.kind == "logits" for one in chosen):
        raise UnsupportedError("Patching the logits", expected="a site inside the model")
    return chosen


def _of_kind(model: Model, kind: str) -> list[Site]:
    if kind == "embed":
        return [Site(-1, None, "embed")]
    if kind in ("mlp", "resid"):
        return [Site(layer, None, kind) for layer in range(model.n_layers + (kind == "resid"))]
    grouped = kind in ("k", "v") and model.info.grouped
    count = model.n_kv_heads if grouped else model.n_heads
    return [Site(layer, head, kind, grouped) for layer in range(model.n_layers) for head in range(count)]


def read_places(task: Task, positions: PositionsLike | Iterable[int]) -> list[Place]:
    """Places of ``"all"``, ``"each"``, a span's name, a position, or several.

    Raises:
        TaskError: no span of that name.
        OptionError: positions outside the prompts.
    """
    width = task.clean.shape[1]
    if isinstance(positions, str):
        if positions == "all":
            return [None]
        if positions == "each":
            return list(range(width))
        task.span(positions)
        return [positions]
    try:
        chosen = [index(p) for p in (positions if isinstance(positions, Iterable) else [positions])]
    except TypeError:
        chosen = []
    if not chosen or not all(0 <= p < width for p in chosen):
        raise OptionError(
            f"positions = {positions!r}",
            expected=f'"all", "each", a span, or positions from 0 to {width - 1}',
        )
    return list(dict.fromkeys(chosen))


def covered(task: Task, where: Place) -> Tensor:
    """Which positions of each prompt a place covers ``[n, pos]``, boolean."""
    positions = torch.arange(task.clean.shape[1])
    inside = positions[None] < task.lengths[:, None]
    if where is None:
        return inside
    if isinstance(where, int):
        return (positions[None] == where) & inside
    span = task.span(where)
    return (positions[None] >= span[:, :1]) & (positions[None] < span[:, 1:])
