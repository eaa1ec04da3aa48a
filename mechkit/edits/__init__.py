"""Edits: changes made while the model runs. Pure descriptions; the backend carries them out.

    ablate("7.3")                             set to zero
    ablate("7.3", "mean", reference=task)     set to its mean over the task's corrupt prompts
    ablate("7.3", "resample", reference=task) set to its value on the task's corrupt prompts, row by row
    ablate("7.3", "uniform")                  look evenly at every key it can see
    scale("7.3", 0.5)                         multiply
    gate("7.3", gates)                        multiply at each token by a number of its own
    patch_in("7.3", values)                   set to given values
    inject("7.3", values, gate=0.5)           set to a mixture of what is there and given values
    steer("resid.10", vector, alpha=2.0)      add alpha times a vector
    transform("7.3", matrix)                  multiply by a matrix, and add a vector
    attend("7.3", mask="S2")                  change where a head looks; see ``attend``
    redistribute("7.3", keys=0, to="S2")      take attention from some keys and give it to others

Edits are carried out in the order given; those of one site build on each other. Positions are those of the prompt,
from 0, or from its end when negative; or the name of a span, where the run is of a task. An edit whose site or
position never ran is an error, not a shrug.
"""

from .attention import TARGETS, attend, redistribute
from .free import Free, free, with_tensors
from .kinds import (
    ABLATIONS,
    Ablate,
    Ablation,
    Attend,
    Edit,
    Inject,
    PatchIn,
    Redistribute,
    Scale,
    Steer,
    TopHeads,
    Transform,
    of_site,
)
from .making import ablate, gate, inject, patch_in, scale, steer, transform
from .moving import at_masks, moved
from .reading import Positions

__all__ = [
    "ABLATIONS",
    "TARGETS",
    "Ablate",
    "Ablation",
    "Attend",
    "Edit",
    "Free",
    "Inject",
    "PatchIn",
    "Positions",
    "Redistribute",
    "Scale",
    "Steer",
    "TopHeads",
    "Transform",
    "ablate",
    "at_masks",
    "attend",
    "free",
    "gate",
    "inject",
    "moved",
    "of_site",
    "patch_in",
    "redistribute",
    "scale",
    "steer",
    "transform",
    "with_tensors",
]
