"""Scores of every edge of a model's graph: how much of the behaviour does it carry?

See ``mechkit.graph`` for what edges are, ``attribution`` for the first-order methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..edge_scores import EdgeScores
from ..errors import OptionError
from ..prompts import check_task
from ..tasks.task import Task
from .attribution import METHODS, Attribution, attribute
from .exact_edges import exact_edges

if TYPE_CHECKING:
    from ..model import Model


def edges(
    model: Model,
    task: Task | Sequence[Task],
    method: Literal["eap", "eap-ig", "eap-ig-activations", "exact"] = "eap",
    *,
    steps: int = 5,
    direction: Literal["noise", "denoise"] = "noise",
    ungroup: bool = False,
    correction: Literal["atp*"] | None = None,
    gradients: Literal["plain", "relp"] = "plain",
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> EdgeScores:
    """Score every edge by the effect of patching it, to first order or exactly.

    The score of ``u -> t`` is (what u writes in the source run - what u writes in the base run) . dL/d(what t reads),
    L the metric, summed over positions, the mean over prompts, as a fraction of the metric gap (source - base). Summed
    over the edges that leave a node it is the node's own attribution score. Costs are in forward passes F of all
    prompts from their first difference on, measured at the size of GPT-2 small.

    Args:
        model: a local model.
        task: pairs of prompts, and the metric, which must be differentiable; or several tasks with one metric.
        method: ``"eap"``: the gradient of the base run. 6 F: both runs, one backward pass, and the products.

            ``"eap-ig"``: the mean of the gradients at ``steps`` points of the line between the two streams that enter
            block 0: ``source + k/steps (base - source)``, k = 0 ... steps - 1, so the source's end is one of them and
            the base's is not. 2 + 4 ``steps`` F.

            ``"eap-ig-activations"``: the mean over runs of the base prompts in which one group of parts is set to a
            point of its own line: the stream entering block 0, each layer's heads together, each MLP; here k = 1 ...
            ``steps``, so the base's end is one of the points and the source's is not. Every run counts for every edge,
            and through what is set no gradient passes, as in the authors' code. 2 + 4 ``steps`` (1 + 2 ``n_layers``) F.

            ``"exact"``: no gradient; each edge is patched by itself and what comes after its target runs anew, at the
            positions that change: for L layers about L/2 blocks an edge and prompt, of some 70,000 edges in
            SmolLM2-135M. What the others approximate.
        steps: points on each line; ``"eap"`` has none.
        direction: ``"noise"``: the base is the clean run, the source the corrupt one; ``"denoise"``: the reverse.
        ungroup: score the keys and values of each query head apart, where several share them; their sum over a group is
            the group's score.
        correction: ``"atp*"``: with ``"eap"``, what changes in a query or key goes through the norm, the projection and
            the softmax as it is, not linearised: (pattern with it - pattern) . dL/dpattern. Gradients that vanish
            because the softmax is saturated then hide no edge. The first half of an attention layer, twice, for
            every source before it: about ``n_layers n_heads / 4`` F.
        gradients: ``"relp"``: backward passes by relevance propagation's rules: norms with their scale held fixed,
            activations as if linear, and half of the gradient to each factor of a gated MLP.
        checkpoint: a file that keeps what is done. The same call with the same file goes on from there.
        progress: show a bar.

    Returns:
        EdgeScores in fractions of the metric gap, with their standard error over prompts, the gap taken as known.

    Raises:
        OptionError, TaskError, PromptError: see each kind.
        MetricError: a metric without a gradient, or one that is the same on clean and corrupt prompts.
        UnsupportedError: a remote model, or a family for which what was asked for does not hold.
        StorageError: a checkpoint of other work, or one that cannot be read or written.
        CapacityError: a single prompt does not fit in memory.
        Interrupted: it was stopped; ``error.scores`` has the scores over the prompts done so far.

    Syed et al. 2023 (arXiv 2310.10348), EAP; Hanna et al. 2024 (arXiv 2403.17806), EAP-IG; Mueller et al. 2025 (arXiv
    2504.13151), activations; Kramar et al. 2024 (arXiv 2403.00745), AtP*; Jafari et al. 2025 (arXiv
    2508.21258), RelP.
    """
    task = task if isinstance(task, Task) else Task.join(task)
    _one_of("method", method, (*METHODS, "exact"))
    _one_of("direction", direction, ("noise", "denoise"))
    _one_of("correction", correction, (None, "atp*"))
    _one_of("gradients", gradients, ("plain", "relp"))
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise OptionError(f"steps = {steps!r}", expected="a whole number from 1")
    if correction and method != "eap":
        raise OptionError(f"correction = {correction!r} with method = {method!r}", expected='method = "eap"')
    check_task(model, task)
    if method == "exact":
        given = {"ungroup": ungroup, "correction": correction, "gradients": gradients != "plain"}
        if odd := [name for name, value in given.items() if value]:
            raise OptionError(f'{", ".join(odd)} with method = "exact"', expected="a method that takes gradients")
        return exact_edges(model, task, direction, checkpoint, progress)
    how = Attribution(steps, direction, bool(ungroup), correction, gradients)
    return attribute(model, task, method, how, checkpoint, progress)


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} = {value!r}", expected="one of " + ", ".join(map(repr, allowed)))
