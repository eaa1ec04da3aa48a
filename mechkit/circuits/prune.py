"""Greedy pruning: take out what the circuit is better without.

1. Leave out each node of the circuit by itself, everything outside the circuit being ablated.
2. Take out the one without which the metric is nearest to, or furthest beyond, the whole model's, if that is more than
   with it.
3. Again, until no node is worth taking out.

Hsu et al. 2024 (arXiv 2407.00886), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..sites import Site
from .keep import Keeper

if TYPE_CHECKING:
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task


def greedily_pruned(model: Model, task: Task, nodes: Sequence[Site], ablation: Ablation) -> list[Site]:
    """The nodes that are left, in the order given; at least one.

    Args:
        model, task: what is measured, on the prompts that the circuit was found on.
        nodes: heads and MLPs. Sites of kinds that are not among them are left in throughout.
        ablation: of what is out: ``"mean"``, ``"zero"`` or ``"resample"``.
    """
    left = list(nodes)
    keeper = Keeper(model, task, ablation, kinds=sorted({one.kind for one in left}, reverse=True))
    empty, whole = keeper.metric([[], left]).mean(1)
    sign = 1 if keeper.model_metric.mean() >= empty else -1
    best = sign * whole
    while len(left) > 1:
        without = sign * keeper.metric([[other for other in left if other != one] for one in left]).mean(1)
        if not without.max() > best:
            break
        best = without.max()
        del left[int(without.argmax())]
    return left
