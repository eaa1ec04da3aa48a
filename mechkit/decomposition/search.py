"""The iterative search of CD-T: from the logits backwards, to whatever is most of what arrives there.

1. One sweep decomposes the logits, and everything that any part reads (queries, keys and values of heads; of an MLP,
   what it writes), into all heads (and MLPs). The steps below look up what they need.
2. Take the ``width`` parts whose relevant part moves the metric most.
3. What these read are the next targets. A part's relevance is the sum, over targets, of the share that it is of what
   is there.
4. Relevance is divided by the sum over the part's layer, so that layers that write much do not drown the others; take
   the largest ``width`` that are not in yet.
5. Go on until there are as many parts as were asked for, or nothing comes before the targets.

A part's score is its relevance in the step with its largest one, as a fraction of the largest of that step.

Hsu et al. 2024 (arXiv 2407.00886), algorithm 1; the authors' notebooks take two parts a step and divide by layers.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import OptionError
from ..patching.effects import or_interrupted
from ..results import Scores, provenance
from ..sites import Site, site
from .cdt import arrives, read_work, table, told
from .runs import run
from .split import Rules

if TYPE_CHECKING:
    from ..model import Model
    from ..tasks.task import Task


def by_nodes(
    model: Model,
    task: Task,
    sites: str,
    size: int,
    width: int,
    min_share: float,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> tuple[list[Site], Scores]:
    """The parts found, in order, and the scores of all.

    Args:
        model, task: as of ``decompose``.
        sites: ``"heads"``, ``"mlps"`` or both words.
        size: how many parts at most.
        width: how many parts a step takes.
        min_share: leave out what is below this share of the largest relevance in a step.
        checkpoint: of the sweep.
        progress: show a bar.
        options: ``reference``, ``attention``, ``activation``, ``biases``, ``stabilise`` of ``decompose``.

    Raises:
        OptionError: another option.
    """
    if unknown := options.keys() - {"reference", "attention", "activation", "biases", "stabilise"}:
        raise OptionError(f"{', '.join(sorted(unknown))} in a search", expected="how to decompose, not what")
    started = time.perf_counter()
    reference = options.pop("reference", "corrupt")
    work = read_work(model, task, Rules(**options), sites, reference=reference)
    read = {part: _read_by(model, part, sites) for (part,) in work.sources}
    work = replace(work, targets=(*work.targets, *dict.fromkeys(one for some in read.values() for one in some)))
    found = run(work, checkpoint, progress)
    first = table(work, found, work.targets[0], False, "signed")
    meta = provenance(model, task, "discover: cd-t", time.perf_counter() - started, **told(work))
    or_interrupted(Scores(first, task.metric.name, meta), found.done, "parts", checkpoint is not None)
    parts = [site(one) for one in first["site"]]
    before = np.array([[arrives(part, target) for part in parts] for target in work.targets])
    shares = found.values[..., 1].double().mean(1).T.numpy() * before  # [targets, parts]: an MLP is no part of itself
    share = dict(zip(work.targets, shares, strict=True))
    layers = np.array([one.layer for one in parts])
    relevance, scores, chosen = first["score"].to_numpy(), np.zeros(len(parts)), list[int]()
    while len(chosen) < size:
        sizes = np.abs(relevance)
        largest = sizes.max()
        if largest > 0:
            scores = np.where(sizes / largest > np.abs(scores), relevance / largest, scores)
        order = [i for i in np.argsort(-sizes, kind="stable") if sizes[i] > 0 and sizes[i] >= min_share * largest]
        new = [i for i in order if i not in chosen][: min(width, size - len(chosen))]
        chosen += new
        if len(chosen) >= size:
            break
        targets = [one for i in new for one in read[parts[i]]]
        if not targets:
            break
        arrived = np.sum([share[one] for one in dict.fromkeys(targets)], 0)
        relevance = arrived / np.bincount(layers, arrived)[layers].clip(min=1e-12)
    frame = first.drop(columns=["sender", "receiver"]).assign(score=scores, se=np.nan)
    return [parts[i] for i in chosen], Scores(frame, "relevance, of the largest in its step", meta)


def _read_by(model: Model, node: Site, sites: str) -> list[Site]:
    """What a part reads, where one of the sites comes before it; of an MLP, what it writes."""
    if node.kind == "mlp":
        return [node] if node.layer > 0 or "heads" in sites else []
    return [slot for slot in model.graph().slots(node) if slot.layer > 0]
