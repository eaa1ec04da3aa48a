"""Operations that move numbers about, and how parts are lined up with their totals.

A part has one axis more than its total, at the front. Counted from the end, every other axis has the same number in
both: an operation is done to parts as it was to the total, with its axes counted from the end.

Hsu et al. 2024 (arXiv 2407.00886), section 3.2: what is linear and has no constant acts on each part.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from .split import RULES, Role, Rule, Split, like, splits, totals, widened

aten = torch.ops.aten
_AXES = ("dim", "dims", "dim0", "dim1")


def rule(*operations: Any) -> Callable[[Rule], Rule]:
    """Register the rule of some operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations, function))
        return function

    return register


# -- lining up ----------------------------------------------------------------------------------------------------


def sources_of(found: list[Split]) -> int:
    """How many sources have begun."""
    return max((0 if one.relevant is None else len(one.relevant) for one in found), default=0)


def part_of(value: Any, sources: int, role: Role) -> Tensor:
    """What is relevant of a value for so many sources: of constants nothing, but all of what is added to scores."""
    if isinstance(value, Split):
        return widened(value.relevant, sources, value.total)
    if isinstance(value, Number):
        value = torch.tensor(value)
    return (value if role == "scores" else value.new_zeros(())).expand(sources, *value.shape)


def aligned(relevant: Tensor, ndim: int) -> Tensor:
    """Axes of size 1 behind the sources, so that parts broadcast as totals of ``ndim`` axes do."""
    missing = ndim + 1 - relevant.ndim
    return relevant if missing <= 0 else relevant.reshape(len(relevant), *[1] * missing, *relevant.shape[1:])


def spread(relevant: Tensor, total: Tensor) -> Tensor:
    """Parts broadcast to the shape of their total."""
    relevant = aligned(relevant, total.ndim)
    return relevant if relevant.shape[1:] == total.shape else relevant.expand(len(relevant), *total.shape)


def _view(x: Split, total: Tensor, relevant: Tensor | None) -> Split:
    """What came of an activation, which may be a view of it."""
    out = Split(total, relevant, x.rules, x.role)
    if _storage(total) == _storage(x.total):
        shared = relevant is not None and x.relevant is not None and _storage(relevant) == _storage(x.relevant)
        out.writable = x.writable and shared
    return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# -- one activation -----------------------------------------------------------------------------------------------


@rule(
    *(aten.transpose, aten.unsqueeze, aten.slice, aten.select, aten.narrow, aten.split, aten.split_with_sizes),
    *(aten.chunk, aten.unbind, aten.clone, aten.contiguous, aten._to_copy, aten.alias, aten.detach, aten.neg),
    *(aten.sum, aten.mean, aten.cumsum, aten.flip, aten.roll, aten.constant_pad_nd, aten.repeat_interleave),
    *(aten.index_select, aten.diagonal),
)
def _moved(func: Any, *args: Any, **kwargs: Any) -> Any:
    x = args[0]
    if not isinstance(x, Split) or splits((args[1:], kwargs)):
        raise splits((args, kwargs))[0].rules.refuse(str(func.overloadpacket), "takes an activation for an index")
    total = func(x.total, *args[1:], **kwargs)
    func = {aten.sum.default: aten.sum.dim_IntList, aten.mean.default: aten.mean.dim}.get(func, func)
    relevant = None if x.relevant is None else func(x.relevant, **_from_the_end(func, x.total.ndim, args[1:], kwargs))
    if isinstance(total, Tensor):
        return _view(x, total, relevant)
    parts = [None] * len(total) if relevant is None else relevant
    return type(total)(_view(x, one, part) for one, part in zip(total, parts, strict=True))


def _from_the_end(func: Any, ndim: int, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation by name, its axes counted from the end."""
    schema = func._schema.arguments[1:]
    given = {one.name: one.default_value for one in schema if one.has_default_value()}
    given |= dict(zip((one.name for one in schema), args, strict=False)) | kwargs
    if func in (aten.sum.dim_IntList, aten.mean.dim):
        given.setdefault("dim", None)
    ndim += func.overloadpacket is aten.unsqueeze
    for name in {*_AXES} & {*given}:
        axes = given[name]
        if axes is None or axes == []:
            given[name] = list(range(-ndim, 0))
        else:
            given[name] = [axis % ndim - ndim for axis in axes] if isinstance(axes, list) else axes % ndim - ndim
    return given


@rule(aten.view, aten._unsafe_view, aten.reshape, aten.squeeze)
def _reshaped(func: Any, x: Split, *args: Any) -> Split:
    total = func(x.total, *args)
    return _view(x, total, None if x.relevant is None else x.relevant.reshape(len(x.relevant), *total.shape))


@rule(aten.expand)
def _expanded(func: Any, x: Split, *args: Any, **kwargs: Any) -> Split:
    total = func(x.total, *args, **kwargs)
    return _view(x, total, None if x.relevant is None else spread(x.relevant, total))


@rule(aten.permute)
def _permuted(func: Any, x: Split, dims: Any) -> Split:
    total, behind = func(x.total, dims), [axis % x.total.ndim + 1 for axis in dims]
    return _view(x, total, None if x.relevant is None else x.relevant.permute(0, *behind))


@rule(aten.t)
def _transposed(func: Any, x: Split) -> Split:
    relevant = x.relevant if x.relevant is None or x.total.ndim < 2 else x.relevant.mT
    return _view(x, func(x.total), relevant)


@rule(aten.repeat)
def _repeated(func: Any, x: Split, repeats: Any) -> Split:
    total = func(x.total, repeats)
    relevant = None if x.relevant is None else aligned(x.relevant, len(repeats)).repeat(1, *repeats)
    return Split(total, relevant, x.rules, x.role)


@rule(aten.index)
def _indexed(func: Any, x: Any, indices: Any) -> Split:
    if not isinstance(x, Split) or splits(indices):
        raise splits((x, indices))[0].rules.refuse(str(func.overloadpacket), "takes an activation for an index")
    total = func(x.total, indices)
    if x.relevant is None:
        return Split(total, None, x.rules, x.role)
    relevant = x.relevant[_behind(indices)]
    used = [i for i, one in enumerate(indices) if one is not None]
    if used != list(range(used[0], used[-1] + 1)):  # axes that are picked apart go to the front
        relevant = relevant.movedim(max(indices[i].ndim for i in used if indices[i].dtype != torch.bool), 0)
    return Split(total, relevant, x.rules, x.role)


def _behind(indices: Any) -> tuple:
    return (slice(None), *(slice(None) if one is None else one for one in indices))


@rule(aten.gather)
def _gathered(func: Any, x: Any, dim: int, index: Any, **kwargs: Any) -> Split:
    if not isinstance(x, Split) or isinstance(index, Split):
        raise splits((x, index))[0].rules.refuse(str(func.overloadpacket), "takes an activation for an index")
    return Split(func(x.total, dim, index, **kwargs), gathered(x, dim, index), x.rules, x.role)


@rule(aten.topk, aten.sort)
def _ordered(func: Any, x: Split, *args: Any, **kwargs: Any) -> Any:
    values, indices = func(x.total, *args, **kwargs)
    dim = _from_the_end(func, x.total.ndim, args, kwargs)["dim"]
    return Split(values, gathered(x, dim, indices), x.rules, x.role), indices


def gathered(x: Split, dim: int, index: Tensor) -> Tensor | None:
    """Parts of what is picked along an axis."""
    if x.relevant is None:
        return None
    return x.relevant.gather(dim % x.total.ndim - x.total.ndim, index.expand(len(x.relevant), *index.shape))


# -- several ------------------------------------------------------------------------------------------------------


@rule(aten.cat, aten.stack)
def _joined(func: Any, tensors: Any, dim: int = 0) -> Any:
    found = splits(tensors)
    first, total = found[0], func(totals(list(tensors)), dim)
    sources = sources_of(found)
    if not sources:
        return Split(total, None, first.rules, first.role)
    parts = [part_of(one, sources, first.role) for one in tensors]
    return Split(total, func(parts, dim % total.ndim - total.ndim), first.rules, first.role)


@rule(aten.where)
def _chosen(func: Any, condition: Any, *either: Any) -> Any:
    found, total = splits(either), func(*totals((condition, *either)))
    sources = sources_of(found)
    if not sources:
        return like(total, splits((condition, *either))[0])
    role = found[0].role
    here, there = (aligned(part_of(one, sources, role), total.ndim) for one in either)
    return Split(total, torch.where(totals(condition), here, there), found[0].rules, role)


@rule(aten.masked_fill)
def _masked(func: Any, x: Any, mask: Any, value: Any) -> Any:
    if not isinstance(x, Split):
        raise splits((mask, value))[0].rules.refuse(str(func.overloadpacket), "fills with an activation")
    total = func(x.total, totals(mask), totals(value))
    if x.relevant is None:
        return Split(total, None, x.rules, x.role)
    # A mask's value is the same number in both; of activations, what is filled in comes from no source.
    relevant = aligned(x.relevant, total.ndim).masked_fill(totals(mask), totals(value) if x.role == "scores" else 0)
    return Split(total, relevant, x.rules, x.role)


@rule(aten.copy)
def _copied(func: Any, x: Any, source: Any, *rest: Any) -> Any:
    total = func(*totals((x, source)), *rest)
    rules = splits((x, source))[0].rules
    if not isinstance(source, Split) or source.relevant is None:
        return Split(total, None, rules)
    return Split(total, spread(source.relevant, total).to(total.dtype).contiguous(), rules, source.role)


@rule(aten.index_add)
def _index_added(func: Any, x: Any, dim: int, index: Any, source: Any, **kwargs: Any) -> Any:
    total = func(totals(x), dim, totals(index), totals(source), **kwargs)
    found = splits((x, source))
    sources = sources_of(found)
    if not sources:
        return Split(total, None, found[0].rules)
    onto, part = (part_of(one, sources, "value").contiguous() for one in (x, source))
    return Split(total, func(onto, dim % total.ndim - total.ndim, totals(index), part, **kwargs), found[0].rules)


@rule(aten.index_put)
def _index_put(func: Any, x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    found = splits((x, values))
    if not found or splits(indices):
        raise splits((x, indices, values))[0].rules.refuse(str(func.overloadpacket), "takes an activation for an index")
    total = func(totals(x), indices, totals(values), accumulate)
    sources = sources_of(found)
    if not sources:
        return Split(total, None, found[0].rules)
    if accumulate:
        raise found[0].rules.refuse(str(func.overloadpacket), "adds in places that may coincide")
    onto = part_of(x, sources, "value").clone(memory_format=torch.contiguous_format)
    onto[_behind(indices)] = part_of(values, sources, "value").to(onto.dtype)
    return Split(total, onto, found[0].rules)


@rule(
    *(aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like),
    *(aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full),
)
def _made(func: Any, x: Split, *args: Any, **kwargs: Any) -> Split:
    return like(func(x.total, *args, **kwargs), x)
