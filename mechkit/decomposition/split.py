"""Activations in two parts: what comes from a source, and the rest.

1. A ``Split`` stands for an activation of the model's own run, which it holds: the total. Beside it, it holds what is
   relevant of it for each of many sources, with an axis more at the front; the irrelevant part is the rest, and is
   never stored. Totals are thus computed once for all sources.
2. To the model's code it is a tensor. Every operation that meets one is looked up among the rules (``rules``), which
   give the total and the relevant part of what comes out.
3. An operation made of simpler ones comes apart into these. One that has no rule, and does not, is an error that names
   it and the module that called it, whatever it is; nothing is carried on as if it were irrelevant.
4. Nothing relevant yet is written as None. Sources that begin later add rows to the front axis; where parts with fewer
   rows meet parts with more, the missing rows are zero.

Hsu et al. 2024 (arXiv 2407.00886), section 3; Murdoch et al. 2018 (arXiv 1801.05453).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import OptionError, UnsupportedError

Role: TypeAlias = 'Literal["value", "scores", "pattern"]'
Rule: TypeAlias = "Callable[..., Any]"
RULES: dict[Any, Rule] = {}  # by operation, all overloads together


@dataclass(eq=False)
class Rules:
    """How parts are carried through, and where the pass is.

    Attributes:
        attention: ``"frozen"``, patterns are the model's own; or ``"product"``, what is relevant of queries and keys
            makes a pattern of its own.
        activation: who gets what an activation, or a gated product, makes of both parts together: ``"remainder"``, the
            relevant part all of it; ``"shapley"``, each half.
        biases: ``"shared"`` by the sizes of the parts; or ``"irrelevant"``.
        stabilise: within MLPs and after blocks, keep relevant parts between 0 and the total.
        names: of modules, for messages.
        in_mlp: the pass is inside an MLP.

    Raises:
        OptionError: an unknown option.
    """

    attention: Literal["frozen", "product"] = "frozen"
    activation: Literal["remainder", "shapley"] = "remainder"
    biases: Literal["shared", "irrelevant"] = "shared"
    stabilise: bool = True
    names: Mapping[int, str] = field(default_factory=dict)
    in_mlp: bool = False

    _KNOWN: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("frozen", "product"),
        "activation": ("remainder", "shapley"),
        "biases": ("shared", "irrelevant"),
    }

    def __post_init__(self) -> None:
        for name, known in self._KNOWN.items():
            if getattr(self, name) not in known:
                raise OptionError(f"{name} = {getattr(self, name)!r}", expected=" or ".join(map(repr, known)))

    @property
    def options(self) -> dict[str, Any]:
        """What was chosen, by name."""
        return {name: getattr(self, name) for name in (*self._KNOWN, "stabilise")}

    def refuse(self, operation: str, why: str = "has no rule for two parts") -> UnsupportedError:
        """The error for an operation, with the module that called it."""
        return UnsupportedError(
            f"{operation} in {self._caller()} {why}",
            expected="operations that decomposition has rules for: mechkit/decomposition/rules.py",
            fix="Use path patching (mk.path_patch) on this model",
        )

    def _caller(self) -> str:
        """The innermost module whose code is running, told from the frames: nothing need be kept up while it runs."""
        frame: Any = sys._getframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                name = self.names.get(id(owner), "")
                return f"{name} ({type(owner).__name__})" if name else type(owner).__name__
            frame = frame.f_back
        return "no module"


class Split(Tensor):
    """An activation with what is relevant of it.

    Attributes:
        total: the model's own value ``[...]``.
        relevant: what is relevant of it, for each source ``[sources, ...]``; None for nothing.
        rules: how it is carried through.
        role: what it is in attention: ``"scores"`` and ``"pattern"``, which have rules of their own, or ``"value"``.
        writable: writing into it writes into what it is a view of.
    """

    total: Tensor
    relevant: Tensor | None
    rules: Rules
    role: Role
    writable: bool

    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, total: Tensor, relevant: Tensor | None, rules: Rules, role: Role = "value"):
        """A tensor of the total's shape that has no memory of its own."""
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, total.shape, strides=total.stride(), dtype=total.dtype, device=total.device
        )

    def __init__(self, total: Tensor, relevant: Tensor | None, rules: Rules, role: Role = "value"):
        self.total, self.relevant, self.rules, self.role, self.writable = total, relevant, rules, role, True

    @property
    def irrelevant(self) -> Tensor:
        """The rest, for each source ``[sources, ...]``."""
        return self.total[None] if self.relevant is None else self.total - self.relevant

    def __repr__(self, **_: Any) -> str:
        sources = 0 if self.relevant is None else len(self.relevant)
        return f"Split({list(self.total.shape)}, {sources} sources, {self.role})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Carry out an operation by its rule."""
        from . import rules, shapes  # noqa: F401  they register themselves

        kwargs = kwargs or {}
        rule = RULES.get(func.overloadpacket)
        if rule is not None:
            return rule(func, *args, **kwargs)
        found = splits((args, kwargs))
        if func.overloadpacket.__name__.endswith("_") and not func.overloadpacket.__name__.endswith("__"):
            return _in_place(func, args, kwargs)
        if all(one.relevant is None for one in found):
            return like(func(*totals(args), **totals(kwargs)), found[0])
        apart = func.decompose(*args, **kwargs)
        if apart is NotImplemented:
            raise found[0].rules.refuse(str(func.overloadpacket))
        return apart


def splits(tree: Any) -> list[Split]:
    """The splits among arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Split)]


def totals(tree: Any) -> Any:
    """Arguments with the model's own values in place of splits."""
    return tree_map(lambda leaf: leaf.total if isinstance(leaf, Split) else leaf, tree)


def like(total: Any, split: Split) -> Any:
    """What came of totals, with nothing relevant in it; numbers of other kinds than activations stay as they are."""

    def wrapped(leaf: Any) -> Any:
        activation = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return Split(leaf, None, split.rules, split.role) if activation else leaf

    return tree_map(wrapped, total)


def widened(relevant: Tensor | None, sources: int, total: Tensor) -> Tensor:
    """Relevant parts with zeros for sources that they have no row of ``[sources, ...]``."""
    if relevant is None:
        return total.new_zeros(()).expand(sources, *total.shape)
    if len(relevant) == sources:
        return relevant
    return torch.cat([relevant, relevant.new_zeros(sources - len(relevant), *relevant.shape[1:])])


def _in_place(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation that writes into its first argument: what comes out of it otherwise is put there."""
    name, target = func.overloadpacket.__name__, args[0]
    apart = getattr(torch.ops.aten, name.removesuffix("_"))
    rules = splits((args, kwargs))[0].rules
    out = getattr(apart, func._overloadname)(*args, **kwargs)
    if not isinstance(target, Split):
        if out.relevant is not None:
            raise rules.refuse(str(func.overloadpacket), "writes into a tensor that has no parts")
        return target.copy_(out.total)
    target.total.copy_(out.total)
    if target.relevant is None and out.relevant is None:
        return target
    if not target.writable:
        raise rules.refuse(str(func.overloadpacket), "writes into a view whose parts are elsewhere")
    if target.relevant is None or (out.relevant is not None and len(out.relevant) > len(target.relevant)):
        target.relevant = out.relevant
    else:
        target.relevant.copy_(widened(out.relevant, len(target.relevant), target.total))
    return target
