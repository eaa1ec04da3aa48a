"""Pictures. A view knows no model: it gets tables and arrays."""

from .tokens import tokens

__all__ = ["tokens"]
