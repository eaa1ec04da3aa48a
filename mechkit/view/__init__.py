"""Pictures, still and live. A view knows no model: it gets tables, arrays and callbacks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention_of import attention
    from .tokens_view import tokens

_HOMES = {"attention": "attention_of", "tokens": "tokens_view"}
__all__ = ["attention", "tokens"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'mechkit.view' has no attribute {name!r}")
