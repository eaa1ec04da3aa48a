"""Carry out edits of attention: biases, masks, set patterns, sharpening, mixing with a target, redistribution.

1. Everything that the softmax is to see is done to the scores: bias, median, mask, sharpen.
2. Everything else is done to the pattern. What a query can see is taken from the scores of the same call, never from
   the pattern, in which a key that is visible may have got nothing.
3. Weights and keys are positions of the prompt; the pattern's keys end at the last position computed, so that the
   first of them is found from there.
4. A median is over all the queries of a prompt; while text is made, it is taken anew for every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..edits import Ablate, Attend, Redistribute, of_site
from ..errors import EditError
from ..sites import Site
from .window import Change, Window, fitted, marked, taken, visible


def attended(edit: Attend | Ablate, sites: list[Site], window: Window) -> dict[str, Change]:
    """Functions by kind (``scores``, ``pattern``) that carry out an edit in one layer."""
    how, value = (edit.how, edit.value) if isinstance(edit, Attend) else ("toward", "uniform")
    alpha = edit.alpha if isinstance(edit, Attend) else 1.0
    seen: dict[Site, Tensor] = {}

    def scores(tensor: Tensor) -> Tensor:
        for site in sites:
            old = taken(tensor, (slice(None), site.head))
            seeing = visible(old)
            new = old
            if how == "bias":
                new = old + fitted(of_site(value, site), old, site) * _keys(edit, window, old, site)
            elif how == "median":
                new = old + float(value) * _median(old, seeing, window) * _keys(edit, window, old, site)
            elif how == "sharpen":
                new = old * float(value)
            elif how == "mask":
                hidden = _keys(edit, window, old, site) & _queries(edit, window, old, site)
                seeing = seeing & ~hidden
                new = old.masked_fill(hidden, torch.finfo(old.dtype).min)
            seen[site] = seeing
            tensor[:, site.head] = torch.where(_queries(edit, window, old, site), new, old)
        return tensor

    def pattern(tensor: Tensor) -> Tensor:
        for site in sites:
            old, seeing = taken(tensor, (slice(None), site.head)), seen[site]
            if how == "mask":  # the softmax of a row with nothing left to see is not empty
                new = torch.where(seeing.any(-1, keepdim=True), old, 0)
            elif how == "toward":
                new = (1 - alpha) * old + alpha * _target(value, seeing, window, old.dtype)
            else:
                new = _set(value, old, seeing & _queries(edit, window, old, site), window, site)
            tensor[:, site.head] = torch.where(_queries(edit, window, old, site), new, old)
        return tensor

    if how in ("bias", "sharpen", "median"):
        return {"scores": scores}
    return {"scores": scores, "pattern": pattern}


def redistributed(edit: Redistribute, sites: list[Site], window: Window) -> dict[str, Change]:
    """Functions by kind (``pattern``) that carry out a redistribution in one layer."""

    def pattern(tensor: Tensor) -> Tensor:
        for site in sites:
            old = taken(tensor, (slice(None), site.head))
            wide = old.to(torch.promote_types(old.dtype, torch.float32))
            to = _key_mask(edit.to, window, old, site)
            losing = ~to if edit.keys is None else _key_mask(edit.keys, window, old, site)
            looked = (wide * to).sum(-1, keepdim=True)
            lost = (wide * (to & losing)).sum(-1, keepdim=True)
            has = (wide * (to & ~losing)).sum(-1, keepdim=True)
            freed = (1 - edit.keep) * (wide * losing).sum(-1, keepdim=True)
            gain = freed / has.clamp(min=torch.finfo(wide.dtype).tiny)
            new = wide + wide * (to & ~losing) * gain - (1 - edit.keep) * wide * losing
            meant = _queries(edit, window, old, site) & (has > 0)
            meant = meant & (looked >= edit.least) & (lost <= edit.most * looked)
            tensor[:, site.head] = torch.where(meant, new.to(old.dtype), old)
        return tensor

    return {"pattern": pattern}


def _median(scores: Tensor, seeing: Tensor, window: Window) -> Tensor:
    """The median of what a head's queries see of a prompt ``[batch, 1, 1]``, padding not counted."""
    queries = torch.arange(scores.shape[1], device=scores.device) + window.first
    own = seeing & (queries < window.lengths.to(scores.device)[:, None])[..., None]
    return scores.masked_fill(~own, float("nan")).flatten(1).nanmedian(-1).values[:, None, None]


def _target(name: str, seeing: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
    if name == "uniform":
        return (seeing / seeing.sum(-1, keepdim=True).clamp(min=1)).to(dtype)
    if name == "first":
        return torch.nn.functional.one_hot(seeing.int().argmax(-1), seeing.shape[-1]).to(dtype)
    queries = torch.arange(seeing.shape[1], device=seeing.device) + window.first
    keys = torch.arange(seeing.shape[2], device=seeing.device) + _first_key(window, seeing)
    itself = (queries[:, None] == keys[None])[None]
    if name == "identity":
        return itself.to(dtype)
    before = (queries[:, None] - 1 == keys[None]) & seeing
    return torch.where(before.any(-1, keepdim=True), before, itself).to(dtype)


def _set(value: Any, old: Tensor, seeing: Tensor, window: Window, site: Site) -> Tensor:
    if not isinstance(value, Mapping):
        return torch.where(seeing, fitted(value, old, site), 0)
    weights = torch.zeros_like(old)
    for key, weight in value.items():
        where = _key_mask((key,) if isinstance(key, int) else key, window, old, site) & seeing
        # A span's weight is shared by those of its keys that the query sees.
        weights += where * (float(weight) / where.sum(-1, keepdim=True).clamp(min=1))
    sees_one = (weights != 0).any(-1, keepdim=True)
    if not window.growing and all(float(weight) for weight in value.values()) and not bool(sees_one.any()):
        raise EditError(f'No query of "{site}" sees the keys it is to attend to', expected="keys before the queries")
    return torch.where(sees_one, weights, old)


def _keys(edit: Attend | Ablate, window: Window, old: Tensor, site: Site) -> Tensor:
    if not isinstance(edit, Attend):
        return _key_mask(None, window, old, site)
    keys = _key_mask(edit.keys, window, old, site)
    return ~keys if edit.outside else keys


def _key_mask(keys: Sequence[int] | Tensor | str | None, window: Window, old: Tensor, site: Site) -> Tensor:
    """Which keys are meant ``[batch, 1, key]``."""
    return marked(keys, window, _first_key(window, old), old.shape[2], old, site)[:, None]


def _queries(edit: Attend | Ablate | Redistribute, window: Window, old: Tensor, site: Site) -> Tensor:
    """Which queries are meant ``[batch, query, 1]``."""
    return marked(edit.positions, window, window.first, old.shape[1], old, site)[..., None]


def _first_key(window: Window, old: Tensor) -> int:
    """Position of the first key; caches of sliding windows may have dropped those before it."""
    return window.first + old.shape[1] - old.shape[2]
