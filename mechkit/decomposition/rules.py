"""What each operation makes of the two parts of an activation.

    operation                       the relevant part of what comes out
    what moves numbers about        moved in the same way
    sum of two activations          the sum of both
    linear map with a bias          the map of the relevant part, and a share of the bias as large as the part is
    activation f                    f(total) - f(irrelevant); or half of that and half of f(relevant) - f(0)
    product of two activations      total - irrelevant times irrelevant; or half of each one's part times the other
    query times key                 none (attention "frozen"); or the product of the relevant parts ("product")
    softmax of scores               none; or the softmax of the relevant part, masked in the same way
    pattern times value             the pattern's total, or its relevant part, times the relevant part
    other softmax, comparison       none: weights and choices of a router are the model's own

Norms and activations that are made of several operations are one operation here; see ``modules``. Constants that are
added to scores (masks, position biases) are added to both the total and its relevant part.

Hsu et al. 2024 (arXiv 2407.00886), section 3.2 and appendix B.1; for gated products and shared (Shapley) terms no
source gives a rule: Murdoch et al. 2018 (arXiv 1801.05453) is the nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .shapes import aligned, rule, sources_of, spread
from .split import Role, Split, like, splits, totals, widened

aten = torch.ops.aten
_TINY = 1e-8  # keeps the share of a bias defined where both parts are zero


# -- shares ---------------------------------------------------------------------------------------------------


def share(relevant: Tensor, irrelevant: Tensor) -> Tensor:
    """How much of a bias goes to the relevant part: as large as the part is."""
    size = relevant.abs()
    return size / (size + irrelevant.abs() + _TINY)


def stabilised(relevant: Tensor, total: Tensor) -> Tensor:
    """Where the parts have opposite signs, the larger one in size gets all.

    That is the relevant part kept between 0 and the total: beyond the total it is the larger one, below 0 the smaller.
    """
    zero = total.new_zeros(())
    return torch.clamp(relevant, torch.minimum(total, zero), torch.maximum(total, zero))


def activated(function: Callable[[Tensor], Tensor], x: Split) -> Split:
    """An activation of an activation."""
    total = function(x.total)
    if x.relevant is None:
        return Split(total, None, x.rules, x.role)
    if x.role == "scores":
        return Split(total, function(x.relevant), x.rules, x.role)
    relevant = function(x.total - x.relevant).neg_().add_(total)
    if x.rules.activation == "shapley":
        relevant = (relevant + function(x.relevant) - function(torch.zeros_like(x.total))) / 2
    return Split(total, relevant, x.rules)


def affine(x: Split, total: Tensor, relevant: Tensor | None, bias: Tensor | None) -> Split:
    """What a linear map gives: its total, bias included, and the map of the relevant part."""
    rules = x.rules
    if relevant is None:
        return Split(total, None, rules)
    if bias is not None and rules.biases == "shared":
        relevant = relevant + bias * share(relevant, total - bias - relevant)
    if rules.stabilise and rules.in_mlp:
        relevant = stabilised(relevant, total)
    return Split(total, relevant, rules)


# -- sums ---------------------------------------------------------------------------------------------------------


@rule(aten.add, aten.sub, aten.rsub)
def _added(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Any:
    total = func(totals(a), totals(b), alpha=alpha)
    sign_a, sign_b = {aten.add: (1, alpha), aten.sub: (1, -alpha), aten.rsub: (-alpha, 1)}[func.overloadpacket]
    if isinstance(a, Split) and isinstance(b, Split):
        sources = sources_of([a, b])
        role: Role = "scores" if "scores" in (a.role, b.role) else "value"
        if not sources:
            return Split(total, None, a.rules, role)
        if b.relevant is None and a.relevant is not None:
            return Split(total, spread(_scaled(a.relevant, sign_a), total), a.rules, role)
        if a.relevant is None and b.relevant is not None:
            return Split(total, spread(_scaled(b.relevant, sign_b), total), a.rules, role)
        one, other = (aligned(widened(x.relevant, sources, x.total), total.ndim) for x in (a, b))
        return Split(total, _scaled(one, sign_a) + _scaled(other, sign_b), a.rules, role)
    x, constant, sign_x, sign_c = (a, b, sign_a, sign_b) if isinstance(a, Split) else (b, a, sign_b, sign_a)
    if x.relevant is None:
        return Split(total, None, x.rules, x.role)
    relevant = aligned(_scaled(x.relevant, sign_x), total.ndim)
    if x.role == "scores":
        return Split(total, relevant + _scaled(constant, sign_c), x.rules, x.role)
    relevant = spread(relevant, total)
    if x.rules.biases == "shared":
        bias = _scaled(constant, sign_c)
        relevant = relevant + bias * share(relevant, total - bias - relevant)
    return Split(total, relevant, x.rules)


def _scaled(value: Any, factor: float) -> Any:
    return value if factor == 1 else value * factor


# -- products -------------------------------------------------------------------------------------------------------


@rule(aten.mul)
def _multiplied(func: Any, a: Any, b: Any) -> Any:
    total = func(totals(a), totals(b))
    if not isinstance(a, Split) or not isinstance(b, Split):
        x, constant = (a, b) if isinstance(a, Split) else (b, a)
        if x.relevant is None:
            return Split(total, None, x.rules, x.role)
        return Split(total, spread(aligned(x.relevant, total.ndim) * constant, total), x.rules, x.role)
    sources = sources_of([a, b])
    if not sources:
        return Split(total, None, a.rules)
    if a.relevant is None or b.relevant is None:  # one factor is the model's own, for all sources
        x, whole = (b, a.total) if a.relevant is None else (a, b.total)
        return Split(total, spread(aligned(widened(x.relevant, sources, x.total), total.ndim) * whole, total), a.rules)
    one, other = (aligned(widened(x.relevant, sources, x.total), total.ndim) for x in (a, b))
    if a.rules.activation == "shapley":
        return Split(total, (one * b.total + other * a.total) / 2, a.rules)
    return Split(total, (a.total - one).mul_(b.total - other).neg_().add_(total), a.rules)


@rule(aten.div)
def _divided(func: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    if isinstance(b, Split) and b.relevant is not None:
        raise b.rules.refuse(str(func.overloadpacket), "divides by an activation")
    total = func(totals(a), totals(b), **kwargs)
    if not isinstance(a, Split) or a.relevant is None:
        return like(total, splits((a, b))[0])
    if kwargs.get("rounding_mode"):
        raise a.rules.refuse(str(func.overloadpacket), "rounds an activation")
    return Split(total, spread(aligned(a.relevant, total.ndim) / totals(b), total), a.rules, a.role)


@rule(aten.matmul, aten.mm, aten.bmm)
def _product(func: Any, a: Any, b: Any) -> Any:
    total = func(totals(a), totals(b))
    if isinstance(a, Split) and isinstance(b, Split):
        return _of_attention(a, b, total)
    if isinstance(a, Split):
        relevant = None if a.relevant is None else torch.matmul(_batched(a.relevant, b, a.total), b)
        return affine(a, total, relevant, None)
    relevant = None if b.relevant is None else torch.matmul(a, _batched(b.relevant, a, b.total))
    return Split(total, relevant, b.rules)


def _batched(relevant: Tensor, other: Tensor, total: Tensor) -> Tensor:
    """Parts with axes of size 1 where the other factor of a product has batch axes that they lack."""
    return aligned(relevant, max(other.ndim, total.ndim))


def _of_attention(a: Split, b: Split, total: Tensor) -> Split:
    """Queries times keys, or a pattern times values."""
    if a.role == "pattern":
        if b.relevant is None:
            return Split(total, None, a.rules)
        if a.relevant is None:
            return Split(total, torch.matmul(a.total, b.relevant), a.rules)
        sources = sources_of([a, b])
        pattern, values = widened(a.relevant, sources, a.total), widened(b.relevant, sources, b.total)
        return Split(total, torch.matmul(pattern, values), a.rules)
    if a.rules.attention == "frozen" or a.relevant is None or b.relevant is None:
        return Split(total, None, a.rules, "scores")
    sources = sources_of([a, b])
    queries, keys = widened(a.relevant, sources, a.total), widened(b.relevant, sources, b.total)
    return Split(total, torch.matmul(queries, keys), a.rules, "scores")


@rule(aten._grouped_mm)
def _expert_products(func: Any, x: Any, weights: Any, offs: Any = None, bias: Any = None, *rest: Any) -> Any:
    """Rows that stand together by expert, each with its expert's weights."""
    if not isinstance(x, Split) or x.total.ndim != 2 or offs is None or bias is not None or splits((weights, offs)):
        raise splits((x, weights, offs, bias))[0].rules.refuse(str(func.overloadpacket))
    total, relevant = func(x.total, weights, offs, bias, *rest), None
    if x.relevant is not None:
        ends = [0, *offs.tolist()]
        parts = [x.relevant[:, a:b] @ one for a, b, one in zip(ends, ends[1:], weights, strict=False)]
        relevant = torch.cat([*parts, x.relevant.new_zeros(len(x.relevant), len(total) - ends[-1], total.shape[1])], 1)
    return affine(x, total, relevant, None)


@rule(aten.linear)
def _linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(x, Split) or splits((weight, bias)):
        raise splits((x, weight, bias))[0].rules.refuse(str(func.overloadpacket), "takes an activation for a weight")
    relevant = None if x.relevant is None else torch.nn.functional.linear(x.relevant, weight)
    return affine(x, func(x.total, weight, bias), relevant, bias)


@rule(aten.addmm, aten.baddbmm)
def _added_product(func: Any, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    found = splits((bias, a, b))
    total = func(*totals((bias, a, b)), beta=beta, alpha=alpha)
    if isinstance(bias, Split) and bias.relevant is not None:
        product = (aten.mm if func.overloadpacket is aten.addmm else aten.bmm)(a, b)
        return product * alpha + bias * beta
    bias = totals(bias)
    if isinstance(a, Split) and isinstance(b, Split):  # scores, with position biases
        out = _of_attention(a, b, total)
        if out.relevant is not None:
            out.relevant = out.relevant * alpha + bias * beta
        return out
    if isinstance(a, Split):
        relevant = None if a.relevant is None else torch.matmul(_batched(a.relevant, b, a.total), b) * alpha
    elif isinstance(b, Split):
        relevant = None if b.relevant is None else torch.matmul(a, _batched(b.relevant, a, b.total)) * alpha
    else:
        return like(total, found[0])
    return affine(found[0], total, relevant, _scaled(bias, beta))


# -- what is not linear -----------------------------------------------------------------------------------------


@rule(aten.softmax, aten._softmax)
def _softmax(func: Any, x: Split, dim: int, *rest: Any, **kwargs: Any) -> Split:
    total = func(x.total, dim, *rest, **kwargs)
    relevant = None
    # Frozen patterns have none, whatever was added to the scores (relative positions are made of activations).
    if x.role == "scores" and x.relevant is not None and x.rules.attention == "product":
        relevant = func(x.relevant, dim if dim < 0 else dim + 1, *rest, **kwargs)
    return Split(total, relevant, x.rules, "pattern")


@rule(aten.silu, aten.gelu, aten.relu, aten.tanh, aten.sigmoid, aten.clamp, aten.softplus, aten.leaky_relu, aten.elu)
def _pointwise(func: Any, x: Split, *args: Any, **kwargs: Any) -> Split:
    return activated(lambda value: func(value, *args, **kwargs), x)


@rule(
    *(aten.gt, aten.lt, aten.ge, aten.le, aten.eq, aten.ne, aten.isnan, aten.isinf, aten.isfinite, aten.any, aten.all),
    *(aten.argmax, aten.argsort, aten.max, aten.amax, aten.equal),
)
def _judged(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Choices are the model's own; so is the largest score, which shifts scores and patterns not at all."""
    return func(*totals(args), **totals(kwargs))
