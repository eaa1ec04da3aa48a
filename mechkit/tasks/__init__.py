"""Ready-made tasks: ``mk.tasks.ioi(model, n=64, seed=0)``."""

from .ioi import ioi
from .task import Task

__all__ = ["Task", "ioi"]
