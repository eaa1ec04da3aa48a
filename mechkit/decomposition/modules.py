"""Modules that are one operation for the rules, though they are made of several.

1. A norm takes its scale from the total; given that, it is linear. Its bias is shared by the sizes of what goes in.
2. An activation module is one activation, however many operations compute it.
3. Inside an MLP linear maps are stabilised, where that is asked for.
4. A projection whose relevant part nobody reads, such as that of queries where patterns are frozen, is run on the total
   alone.

While the rules are in force, such modules have another ``forward``; with plain tensors it does what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..backends.norms import Norm, elementwise_activation, norms_of
from .rules import activated, share
from .split import Rules, Split


@contextmanager
def in_force(
    rules: Rules, root: nn.Module, mlps: Iterable[nn.Module], unread: Iterable[nn.Module], epsilon: float
) -> Iterator[None]:
    """While active, a model's modules go by the rules.

    Args:
        rules: how parts are carried through.
        root: the whole model.
        mlps: modules inside of which linear maps are stabilised.
        unread: projections whose relevant parts are not read.
        epsilon: of norms that do not tell theirs.

    Raises:
        UnsupportedError: while it is active, a norm that is neither LayerNorm nor RMSNorm.
    """
    rules.names = {id(module): name for name, module in root.named_modules()}
    with ExitStack() as stack:
        for module in norms_of(root):
            norm = _norm(Norm(module, epsilon, lambda what: rules.refuse(what, "has no rule")))
            stack.enter_context(_replaced(module, stack.enter_context(_points_around(module, norm))))
        for module in root.modules():
            if elementwise_activation(module):
                stack.enter_context(_replaced(module, _activation))
        for module in mlps:
            stack.enter_context(_replaced(module, _mlp(rules)))
        for module in unread:
            stack.enter_context(_replaced(module, _total_alone))
        yield


def _norm(norm: Norm) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], x: Any, *rest: Any, **options: Any) -> Any:
        if not isinstance(x, Split):
            return original(x, *rest, **options)
        total = original(x.total, *rest, **options)
        if x.relevant is None:
            return Split(total, None, x.rules)
        _, gain = norm.parts(x.total, total)
        relevant = norm.centred(x.relevant) * gain
        if norm.bias is not None and x.rules.biases == "shared":
            relevant = relevant + norm.bias * share(x.relevant, x.irrelevant)
        return Split(total, relevant.to(total.dtype), x.rules)

    return forward


@contextmanager
def _points_around(module: nn.Module, function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A function in place of a module's forward, between the hook points that a bridge has before and after it.

    The module itself, which is given totals alone, passes them by.
    """
    points = {name: module._modules[name] for name in ("hook_in", "hook_out") if name in module._modules}
    module._modules.update(dict.fromkeys(points, nn.Identity()))
    before, after = (points.get(name) or nn.Identity() for name in ("hook_in", "hook_out"))

    def between(original: Callable[..., Any], x: Any, *rest: Any, **options: Any) -> Any:
        return after(function(original, before(x), *rest, **options))

    try:
        yield between
    finally:
        module._modules.update(points)


def _activation(original: Callable[..., Any], x: Any, *rest: Any, **options: Any) -> Any:
    if not isinstance(x, Split):
        return original(x, *rest, **options)
    return activated(lambda value: original(value, *rest, **options), x)


def _mlp(rules: Rules) -> Callable[..., Any]:
    def forward(original: Callable[..., Any], *given: Any, **options: Any) -> Any:
        before, rules.in_mlp = rules.in_mlp, True
        try:
            return original(*given, **options)
        finally:
            rules.in_mlp = before

    return forward


def _total_alone(original: Callable[..., Any], x: Any, *rest: Any, **options: Any) -> Any:
    if not isinstance(x, Split):
        return original(x, *rest, **options)
    out: Tensor = original(x.total, *rest, **options)
    return Split(out, None, x.rules)


@contextmanager
def _replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """While active, a module's forward is a function that is given the one that it had."""
    own = vars(module)  # the instance's dictionary: a bridge passes attributes that are set on it on to what it wraps
    before, original = own.get("forward"), module.forward
    own["forward"] = lambda *given, **options: function(original, *given, **options)
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before
