"""Pictures, still and live. A view knows no model: it gets tables, arrays and callbacks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .tokens import tokens

if TYPE_CHECKING:
    from .attention_of import attention

__all__ = ["attention", "tokens"]


def __getattr__(name: str) -> Any:
    if name == "attention":
        return import_module(".attention_of", __name__).attention
    raise AttributeError(f"module 'mechkit.view' has no attribute {name!r}")
