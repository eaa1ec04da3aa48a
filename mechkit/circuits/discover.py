"""Find the circuit of a behaviour.

``method="patch"``: patch every site by itself (activation patching), then keep the sites with the largest effects in
size, whatever their sign: heads that work against the behaviour belong to its circuit. Sites whose effect is less
than ``min_share`` of the largest are left out even where ``size`` has room for them.

Give it prompts that the circuit will not be evaluated on: ``found, held_out = task.split(0.5)``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import OptionError
from ..patching.activation import patch
from ..results import provenance
from ..sites import SitesLike
from .circuit import Circuit

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task

METHODS = ("patch",)


def discover(
    model: Model,
    task: Task,
    method: Literal["patch"] = "patch",
    *,
    sites: SitesLike = "heads",
    size: int = 13,
    min_share: float = 0.2,
    direction: Literal["denoise", "noise"] = "denoise",
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Circuit:
    """The sites that carry out a behaviour.

    Args:
        model: any loaded model.
        task: the prompts to find it on.
        method: ``"patch"``; see the module.
        sites: ``"heads"``, ``"mlps"``, or addresses to choose from.
        size: the largest number of nodes.
        min_share: leave out sites whose effect is below this share of the largest one's (0: fill up to ``size``).
        direction: of the patches, ``"denoise"`` or ``"noise"``.
        checkpoint: a file that keeps what is done, and from which the same call goes on; see ``mk.patch``.
        progress: show a bar.

    Returns:
        The circuit, its nodes in order of the size of their effect, with the scores of every site.

    Raises:
        OptionError: an unknown method, a size below 1, or a share outside 0 to 1.
    """
    started = time.perf_counter()
    if method not in METHODS:
        raise OptionError(f"method = {method!r}", expected="one of " + ", ".join(METHODS))
    if not isinstance(size, int) or size < 1:
        raise OptionError(f"size = {size!r}", expected="a whole number from 1")
    if not 0 <= min_share <= 1:
        raise OptionError(f"min_share = {min_share!r}", expected="a share from 0 to 1")
    scores = patch(model, task, sites, direction=direction, checkpoint=checkpoint, progress=progress)
    effect = dict(zip(scores.frame.site, scores.frame.score.abs(), strict=True))
    least = min_share * max(effect.values())
    nodes = tuple(node for node in scores.ranked()[:size] if effect[str(node)] >= least)
    meta = provenance(
        model,
        task,
        "discover: patch",
        time.perf_counter() - started,
        sites=sites if isinstance(sites, str) else str(sites),
        size=size,
        min_share=min_share,
        direction=direction,
    )
    return Circuit(nodes, scores, meta)
