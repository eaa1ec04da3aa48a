"""Work is done where the model is.

An analysis asks a model many things, one after the other, and activations are large. So what measures is not taken
apart into questions to a model that runs elsewhere: the measuring function itself is sent there, called there, and what
comes back is what it measured. Written once, it runs in either place.

1. ``where_the_model_is`` marks a function whose first argument is a model, or has one. With a local model it is called
   as it is; with another, its backend is given the function and the arguments.
2. ``kept_where_the_model_is`` marks a class whose instances measure again and again. With a model elsewhere, what one
   gets instead of an instance has its name and its arguments, and hands on what is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

Given = ParamSpec("Given")
Result = TypeVar("Result")
Kind = TypeVar("Kind", bound=type)


@runtime_checkable
class Elsewhere(Protocol):
    """A backend whose model runs in another place."""

    def call(self, function: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
        """What the function gives there."""
        ...


def elsewhere(holder: Any) -> Elsewhere | None:
    """The backend of a model, or of what has one, if it runs in another place."""
    model = holder if hasattr(holder, "backend") else getattr(holder, "model", None)
    backend = getattr(model, "backend", None)
    return backend if isinstance(backend, Elsewhere) else None


def where_the_model_is(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function that is called where its model is."""

    @wraps(function)
    def called(*args: Given.args, **options: Given.kwargs) -> Result:
        other = elsewhere(args[0])
        return function(*args, **options) if other is None else other.call(called, args, options)

    return called


def kept_where_the_model_is(kind: Kind) -> Kind:
    """A class whose instances live where their model is; its first argument is the model."""
    make: Any = kind.__new__

    def new(cls: type, *args: Any, **options: Any) -> Any:
        # Of another type than ``cls``, it is not initialised: nothing is measured here.
        if args and elsewhere(args[0]) is not None:
            return Handle(cls, args, options)
        return make(cls)

    kind.__new__ = new  # type: ignore[method-assign]
    return kind


class Handle:
    """An instance that lives elsewhere: what it is made of, and what was read of it.

    Args:
        kind: its class.
        args, options: what it is made with; the first is the model.
    """

    def __init__(self, kind: type, args: tuple, options: dict[str, Any]):
        self._kind, self._args, self._options = kind, args, options
        self._read: dict[str, Any] = {}

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """Of the instance that it stands for, so that ``isinstance`` says the same of both."""
        return self._kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if callable(getattr(self._kind, name, None)):

            def method(*args: Any, **options: Any) -> Any:
                return ask(self._args[0], self._kind, self._args[1:], self._options, name, args, options)

            return method
        if name not in self._read:
            self._read[name] = ask(self._args[0], self._kind, self._args[1:], self._options, name)
        return self._read[name]


_MOST = 1  # instances kept where the model is; they may hold base runs


@where_the_model_is
def ask(
    model: Any,
    kind: type,
    made_with: tuple,
    made_so: dict[str, Any],
    name: str,
    args: tuple = (),
    options: dict[str, Any] | None = None,
) -> Any:
    """Read an attribute of an instance, or call its method, where the model is; it is made there where need be."""
    import hashlib

    from ..remote.parcel import packed

    made = hashlib.sha256(packed((kind.__qualname__, made_with, made_so))).hexdigest()
    kept: dict[str, Any] = vars(model).setdefault("_instances", {})  # they go with it
    if made not in kept:
        while len(kept) >= _MOST:
            del kept[next(iter(kept))]
        kept[made] = kind(model, *made_with, **made_so)
    found = getattr(kept[made], name)
    return found if options is None else found(*args, **options)
