"""Transformers of which the circuit is known, to check methods on: ``mk.planted.induction()``."""

from collections.abc import Callable

from .circuits import Planted, backup, distractor_copy, induction, linear, q_composition

ALL: dict[str, Callable[..., Planted]] = {
    "induction": induction,
    "q_composition": q_composition,
    "distractor_copy": distractor_copy,
    "backup": backup,
    "linear": linear,
}

__all__ = ["ALL", "Planted", "backup", "distractor_copy", "induction", "linear", "q_composition"]
