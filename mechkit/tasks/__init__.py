"""Ready-made tasks: ``mk.tasks.ioi(model, n=64, seed=0)``, and others of the same form."""

from .capitals_conflict import capitals_conflict, known_capitals
from .colored_objects import colored_objects
from .docstring import docstring
from .gendered_pronoun import gendered_pronoun
from .greater_than import greater_than
from .induction import induction
from .ioi import ioi
from .laundry_list import laundry_list
from .task import Task

__all__ = [
    "Task",
    "capitals_conflict",
    "colored_objects",
    "docstring",
    "gendered_pronoun",
    "greater_than",
    "induction",
    "ioi",
    "known_capitals",
    "laundry_list",
]
