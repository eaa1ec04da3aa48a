"""The controls of an edit: the same edit where it should do nothing.

1. Random: every head of the edits becomes another head of its layer, one draw for all of them (as many heads of each
   layer, drawn evenly, heads of the edits too); which takes the place of which is drawn as well, and what shares a
   head goes on sharing one. Keys and values that heads share are drawn among the groups of the layer. A draw that gives
   the very heads of the edits is drawn again.
2. A vector that is added to a site without heads becomes a random one of the same length.
3. Reversed: the heads become those at the bottom of a ranking by size, the least first, whatever their layers.
4. Shuffled labels: the pairs of answers change places among the prompts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..edits import Edit, Steer, moved
from ..errors import OptionError
from ..sites import HeadSet, Site

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.protocol import ModelInfo
    from ..results import Scores
    from ..tasks.task import Task

_TRIES = 1000  # draws that may give the very heads of the edits


def heads_of(edits: Sequence[Edit], info: ModelInfo) -> list[Site]:
    """The heads that edits change, whatever of them, each once; groups of keys or values as they are."""
    found = [_owner(site, info) for edit in edits for site in edit.sites if site.head is not None]
    return list(dict.fromkeys(found))


def random_edits(edits: Sequence[Edit], info: ModelInfo, seed: int) -> list[Edit] | None:
    """The same edits at random places; None where there is nothing to draw.

    Args:
        edits: at heads, or adding vectors.
        info: of the model.
        seed: same seed, same draw.
    """
    owners, draw = heads_of(edits, info), random.Random(seed)
    places = {owner: owner for owner in owners}
    for _ in range(_TRIES if _free_to_move(owners, info) else 0):
        places = _drawn(owners, info, draw)
        if set(places.values()) != set(owners):
            break
    else:
        places = {}
    vectors = [_other_vector(edit, seed) for edit in edits]
    if not places and not any(vectors):
        return None
    return [vector or _moved(edit, places, info) for edit, vector in zip(edits, vectors, strict=True)]


def least_heads(edits: Sequence[Edit], info: ModelInfo, ranking: Scores) -> list[Edit]:
    """The same edits at as many heads from the bottom of a ranking by size.

    Raises:
        OptionError: too few heads are ranked, or the edits are at none.
    """
    owners = heads_of(edits, info)
    ranked = [info.check(one) for one in ranking.ranked() if one.is_head][::-1]
    if not owners or len(ranked) < len(owners):
        raise OptionError(
            f"A ranking of {len(ranked)} heads for edits of {len(owners)}",
            expected="edits of heads, and a ranking of at least as many",
            fix="Leave ranking out",
        )
    return [_moved(edit, dict(zip(owners, ranked, strict=False)), info) for edit in edits]


def shuffled_labels(task: Task, seed: int) -> Task | None:
    """The same prompts, their pairs of answers changed about; None where all prompts have the same pair."""
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(seed))
    shuffled = replace(task, correct=task.correct[order], wrong=task.wrong[order], name=f"{task.name}, labels shuffled")
    return None if torch.equal(shuffled.answers, task.answers) else shuffled


def _owner(site: Site, info: ModelInfo) -> Site:
    """The head that a site is of; of shared keys and values, the group, as its key."""
    site = info.shared(info.check(site))
    return Site(site.layer, site.head, "k", True) if site.grouped else Site(site.layer, site.head)


def _room(owner: Site, info: ModelInfo) -> int:
    return info.n_kv_heads if owner.grouped else info.n_heads


def _free_to_move(owners: Sequence[Site], info: ModelInfo) -> bool:
    kinds = [(owner.layer, owner.grouped) for owner in owners]
    return any(kinds.count(kind) < _room(owner, info) for kind, owner in zip(kinds, owners, strict=True))


def _drawn(owners: Sequence[Site], info: ModelInfo, draw: random.Random) -> dict[Site, Site]:
    places: dict[Site, Site] = {}
    for grouped in (False, True):
        some = [owner for owner in owners if owner.grouped == grouped]
        width = info.n_kv_heads if grouped else info.n_heads
        like = HeadSet([Site(one.layer, one.head) for one in some], width).random_like(draw.getrandbits(32))
        for layer in dict.fromkeys(one.layer for one in some):
            here = [one for one in some if one.layer == layer]
            there = [one.head for one in like if one.layer == layer]
            draw.shuffle(there)
            places |= {one: replace(one, head=head) for one, head in zip(here, there, strict=True)}
    return places


def _moved(edit: Edit, places: Mapping[Site, Site], info: ModelInfo) -> Edit:
    mapping: dict[Site, Site] = {}
    for site in edit.sites:
        if site.head is None or (owner := _owner(site, info)) not in places:
            continue
        place, whole = places[owner], info.shared(site)
        mapping[site] = info.shared(replace(whole, layer=place.layer, head=place.head, grouped=place.grouped))
    return moved(edit, mapping) if mapping else edit


def _other_vector(edit: Edit, seed: int) -> Edit | None:
    if not isinstance(edit, Steer) or edit.vector is None or any(site.head is not None for site in edit.sites):
        return None
    draw = torch.Generator().manual_seed(seed)
    if isinstance(edit.vector, Mapping):
        return replace(edit, vector={site: _random_like(vector, draw) for site, vector in edit.vector.items()})
    return replace(edit, vector=_random_like(edit.vector, draw))


def _random_like(vector: Tensor, draw: torch.Generator) -> Tensor:
    noise = torch.randn(vector.shape, generator=draw).to(vector)
    return noise * (vector.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
