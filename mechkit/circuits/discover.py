"""Find the circuit of a behaviour.

    method      what is measured                                                       node    edge
    "patch"     activation patching of every site by itself (mk.patch)                  yes
    "path"      path patching from the logits backwards (circuits.backwards)            yes     yes
    "eap"       edge attribution: one gradient (mk.edges)                               yes     yes
    "eap-ig"    the same, gradients averaged between the twins (mk.edges)               yes     yes
    "exact"     every edge patched by itself (mk.edges): small models                   yes     yes
    "acdc"      what the behaviour does without is taken out (circuits.acdc)            yes     yes
    "cd-t"      contextual decomposition from the logits backwards (decomposition)      yes

1. Score the nodes, or the edges.
2. Keep the largest in size, whatever their sign: parts that work against a behaviour belong to its circuit. Nodes whose
   score is less than ``min_share`` of the largest are left out even where ``size`` has room for them. Of edges, dead
   ends are taken out.

Give it prompts that the circuit will not be evaluated on: ``found, held_out = task.split(0.5)``.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..decomposition import search
from ..edge_scores import EdgeScores
from ..errors import OptionError, UnsupportedError
from ..graph import Edge
from ..patching.activation import patch
from ..patching.cells import read_patchable
from ..patching.edges import edges as score_edges
from ..results import Scores, provenance
from ..sites import Site, SitesLike
from . import acdc, backwards
from .circuit import Circuit
from .prune import greedily_pruned
from .select import SELECTIONS, chosen_edges

if TYPE_CHECKING:
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task

_BY_EDGES = ("eap", "eap-ig", "eap-ig-activations", "exact")
METHODS = ("patch", "path", *_BY_EDGES, "acdc", "cd-t")
_WIDTHS = {"path": 4, "cd-t": 2}
_SIZES = {"node": 13, "edge": 200}
_PARTS = (["heads"], ["mlps"], ["heads", "mlps"])


def discover(
    model: Model,
    task: Task,
    method: Literal["patch", "path", "eap", "eap-ig", "eap-ig-activations", "exact", "acdc", "cd-t"] = "patch",
    *,
    level: Literal["node", "edge"] = "node",
    sites: SitesLike = "heads",
    size: int | None = None,
    min_share: float | None = None,
    selection: Literal["top", "greedy"] = "top",
    direction: Literal["denoise", "noise"] | None = None,
    width: int | None = None,
    threshold: float = 0.01,
    ablation: Ablation = "resample",
    prune: bool = True,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Circuit:
    """The parts, or the edges between them, that carry out a behaviour.

    Args:
        model: any loaded model.
        task: the prompts to find it on.
        method: see the module.
        level: ``"node"`` or ``"edge"``. Circuits of edges are of the whole graph: embedding, heads, MLPs, logits.
        sites: of nodes, what to choose from: ``"heads"``, ``"mlps"``, ``"heads mlps"``; for ``"patch"`` also addresses.
        size: the largest number of nodes (13), or edges (200). ``"acdc"`` has none.
        min_share: leave out what is below this share of the largest score (0: fill up to ``size``); by path patching
            and decomposition, of the largest in a step. Left out: 0.2 for nodes, 0 for edges.
        selection: of edges, ``"top"`` or ``"greedy"``; see ``circuits.select``. Of nodes by an edge method, greedy
            takes the nodes in the order in which the greedy search reaches them.
        direction: of the patches; left out: ``"denoise"`` for ``"patch"``, ``"noise"`` for the rest.
        width: how many parts a step adds: by path patching (4; edges: for each receiver), and by decomposition (2).
        threshold: by ACDC, the fraction of the metric gap that a part must be worth.
        ablation: by ACDC, and in pruning by decomposition, what takes the place of what is out.
        prune: take dead ends out of circuits of edges; by decomposition, take out what the circuit is better without
            (``circuits.prune``).
        checkpoint: a file that keeps what is done, and from which the same call goes on; for ``"patch"``, ``"cd-t"``
            and the edge methods.
        progress: show bars.
        options: of ``mk.edges``, such as ``steps=5``, for the edge methods; of ``mk.decompose``, such as
            ``reference="mean"``, for ``"cd-t"``.

    Returns:
        The circuit, its nodes or edges in order of the size of their score, with the scores of all.

    Raises:
        OptionError: an unknown or unfitting option, or one outside its range.
        SiteError, TaskError, MetricError, UnsupportedError: as of the function that measures.
    """
    started = time.perf_counter()
    width = width if width is not None else _WIDTHS.get(method, 1)
    _check(method, level, selection, size, min_share, width, threshold, options)
    largest = size or _SIZES[level]
    share = min_share if min_share is not None else {"node": 0.2, "edge": 0.0}[level]
    words = sites if isinstance(sites, str) else " ".join(map(str, sites))  # type: ignore[arg-type]
    if method != "patch" and sorted(words.replace(",", " ").split()) not in _PARTS:
        raise OptionError(f"sites = {words!r} for {method!r}", expected='"heads", "mlps" or "heads mlps"')
    if checkpoint and method in ("path", "acdc"):
        raise OptionError(f"A checkpoint for {method!r}", expected="none: it is made of many short sweeps")
    way = direction or ("denoise" if method == "patch" else "noise")
    chosen: list[Site] | list[Edge]
    scores: Scores | EdgeScores
    if method == "patch":
        scores = patch(model, task, sites, direction=way, checkpoint=checkpoint, progress=progress)
        chosen = _largest(scores, largest, share)
    elif method == "path":
        if level == "node":
            chosen, scores = backwards.by_nodes(
                model, task, words, largest, width, share, direction=way, progress=progress
            )
        else:
            chosen, scores = backwards.by_edges(model, task, largest, width, share, direction=way, progress=progress)
    elif method == "acdc":
        if level == "node":
            parts = read_patchable(model, words)
            chosen, scores = acdc.by_nodes(model, task, parts, threshold, ablation, progress)
        else:
            chosen, scores = acdc.by_edges(model, task, threshold, ablation, progress)
    elif method == "cd-t":
        chosen, scores = search.by_nodes(model, task, words, largest, width, share, checkpoint, progress, **options)
        chosen = greedily_pruned(model, task, chosen, ablation) if prune else chosen
    else:
        every = score_edges(model, task, method, direction=way, checkpoint=checkpoint, progress=progress, **options)
        if level == "edge":
            chosen, scores = chosen_edges(every, largest, selection, share), every
        else:
            scores = _of_sites(every.nodes(), model, words)
            chosen = _reached(every, scores, largest) if selection == "greedy" else _largest(scores, largest, share)
    meta = provenance(
        model,
        task,
        f"discover: {method}",
        time.perf_counter() - started,
        level=level,
        sites=words,
        size=largest,
        min_share=share,
        selection=selection,
        direction=way,
        **({"width": width} if method in _WIDTHS else {}),
        **({"threshold": threshold} if method == "acdc" else {}),
        **({"ablation": ablation} if method in ("acdc", "cd-t") else {}),
        **options,
    )
    with suppress(UnsupportedError):  # of a family that only activation patching serves
        meta["parallel"] = model.backend.parallel
    if level == "node":
        return Circuit(tuple(one for one in chosen if isinstance(one, Site)), scores, meta)
    assert isinstance(scores, EdgeScores)
    circuit = Circuit.of_edges([one for one in chosen if isinstance(one, Edge)], scores, meta)
    return circuit.pruned() if prune else circuit


def _check(
    method: str,
    level: str,
    selection: str,
    size: int | None,
    min_share: float | None,
    width: int,
    threshold: float,
    options: dict[str, Any],
) -> None:
    allowed = {"method": (method, METHODS), "level": (level, tuple(_SIZES)), "selection": (selection, SELECTIONS)}
    for name, (value, known) in allowed.items():
        if value not in known:
            raise OptionError(f"{name} = {value!r}", expected="one of " + ", ".join(known))
    if method in ("patch", "cd-t") and level == "edge":
        raise OptionError(f'level = "edge" for {method!r}', expected="a method that scores edges")
    if selection == "greedy" and method not in _BY_EDGES:
        raise OptionError(f"selection = 'greedy' for {method!r}", expected="one of " + ", ".join(_BY_EDGES))
    if size is not None and (not isinstance(size, int) or size < 1):
        raise OptionError(f"size = {size!r}", expected="a whole number from 1")
    if min_share is not None and not 0 <= min_share <= 1:
        raise OptionError(f"min_share = {min_share!r}", expected="a share from 0 to 1")
    if not isinstance(width, int) or width < 1:
        raise OptionError(f"width = {width!r}", expected="a whole number from 1")
    if not threshold > 0:
        raise OptionError(f"threshold = {threshold!r}", expected="a fraction of the gap above 0")
    if size is not None and method == "acdc":
        raise OptionError(f"size = {size} for 'acdc'", expected="none", fix="Its threshold sets how much it keeps")
    if options and method not in (*_BY_EDGES, "cd-t"):
        raise OptionError(
            f"{', '.join(options)} for {method!r}",
            expected='options of mk.edges for the edge methods, of mk.decompose for "cd-t"',
        )


def _largest(scores: Scores, size: int, min_share: float) -> list[Site]:
    effect = dict(zip(scores.frame["site"], scores.frame["score"].abs(), strict=True))
    least = min_share * max(effect.values())
    return [node for node in scores.ranked()[:size] if effect[str(node)] >= least]


def _of_sites(scores: Scores, model: Model, words: str) -> Scores:
    """The scores of the parts to choose from."""
    wanted = {str(one) for one in read_patchable(model, words)}
    frame = scores.frame.loc[scores.frame["site"].isin(wanted)].reset_index(drop=True)
    return Scores(frame, scores.unit, scores.meta)


def _reached(every: EdgeScores, scores: Scores, size: int) -> list[Site]:
    """The parts in the order in which a greedy search over the edges reaches them."""
    order = dict.fromkeys(one.source for one in chosen_edges(every, len(every), "greedy"))
    wanted = set(scores.frame["site"])
    return [node for node in order if str(node) in wanted][:size]
