"""Contextual decomposition (CD-T): how much of what arrives at a target comes from a source?

1. A source's activation is relevant as far as it differs from its reference; all else is not.
2. One pass carries what is relevant to many sources through the model (``split_pass``), by one rule an operation
   (``rules``): every activation is its relevant part and the rest, and their sum is the model's own.
3. At the logits, the score is the metric of the relevant part. At a site it is the share of what is there.

Nothing is changed in the model, so that no run is one that it would never make; but who gets what two parts make
together is a convention (``activation``), and with frozen patterns a source's effect on where heads look is not in its
score: ask for it with the queries and keys of heads as targets.

Hsu et al. 2024 (arXiv 2407.00886), section 3.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ..errors import OptionError, SiteError
from ..patching.cells import Place, PositionsLike, read_patchable, read_places
from ..patching.effects import or_interrupted
from ..prompts import check_task
from ..results import Scores, provenance
from ..sites import Site, SitesLike
from ..sites import sites as read_sites
from ..tasks.task import Task
from .runs import Found, Work, run
from .split import Rules
from .split_pass import begins, key_of, place

if TYPE_CHECKING:
    from ..model import Model

_SOURCES = ("z", "mlp", "embed")
_TARGETS = ("q", "k", "v", "z", "mlp", "resid", "logits")


def decompose(
    model: Model,
    task: Task,
    sources: SitesLike | Sequence[SitesLike] = "heads",
    targets: SitesLike = "logits",
    *,
    positions: PositionsLike = "all",
    target_positions: str | int | None = None,
    together: bool = False,
    reference: Literal["corrupt", "mean", "zero"] | Task = "corrupt",
    attention: Literal["frozen", "product"] = "frozen",
    activation: Literal["remainder", "shapley"] = "remainder",
    biases: Literal["shared", "irrelevant"] = "shared",
    stabilise: bool = True,
    relevance: Literal["signed", "size"] = "signed",
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Scores:
    """How much of what arrives at targets comes from each source, on the clean prompts.

    Args:
        model: a local model.
        task: prompts and metric.
        sources: ``"heads"``, ``"mlps"``, ``"embed"`` (the input tokens), several of these words, or addresses, each by
            itself. A list of lists: the sites of each list are one source.
        targets: ``"logits"``; or addresses: ``"9.9.q"``, ``.k``, ``.v``, a head's output ``"9.9"``, ``"m9"``,
            ``"resid.9"``; each by itself.
        positions: of the sources: ``"all"`` at once; ``"each"`` by itself; a span of the task; a position; or several,
            each by itself.
        target_positions: where targets other than the logits are read: a span, or a position; left out: everywhere.
        together: all sources are one.
        reference: what is not relevant of a source: its value in the prompt's own ``"corrupt"`` twin; its ``"mean"``
            over the task's corrupt prompts of the same template, position by position (published; another ``Task``:
            over that one's); or ``"zero"``.
        attention: ``"frozen"``: patterns are the model's own; ``"product"``: what is relevant of queries and keys makes
            a pattern of its own (the published form for GPT-2).
        activation: of what both parts make only together, the relevant part gets all (``"remainder"``, the published
            form) or half (``"shapley"``).
        biases: ``"shared"`` by the sizes of the parts (published), or ``"irrelevant"``.
        stabilise: inside MLPs and after blocks, where the parts have opposite signs, the larger gets all (published).
            Without it parts can grow past all bounds in deep models.
        relevance: which measure of a site is its score: ``"signed"``, ``r . d / d . d`` with ``d`` the target's own
            deviation from its reference; or ``"size"``, ``|r| / (|r| + |i|)`` (published). Both are columns.
        checkpoint: a file that keeps what is done; the same call with the same file goes on from there.
        progress: show a bar.

    Returns:
        One row a source (and position, and target): columns ``sender``, ``receiver``, and those of every ``Scores``.
        To the logits, in the metric's unit; else shares, with columns ``signed`` and ``size``.

    Raises:
        SiteError: an address that this model does not have, or that cannot be a source or target; a source that
            comes before no target.
        OptionError: an unknown option.
        UnsupportedError: a model that runs elsewhere, or with an operation that no rule is for: it is named, and where.
        TaskError, PromptError, StorageError, CapacityError, Interrupted: as of ``mk.patch``.
    """
    started = time.perf_counter()
    work = read_work(
        model,
        task,
        Rules(attention, activation, biases, stabilise),
        sources,
        targets,
        positions=positions,
        target_positions=target_positions,
        together=together,
        reference=reference,
    )
    if relevance not in ("signed", "size"):
        raise OptionError(f"relevance = {relevance!r}", expected="'signed' or 'size'")
    found = run(work, checkpoint, progress)
    frames = [table(work, found, aim, positions != "all", relevance) for aim in work.targets]
    meta = provenance(
        model,
        task,
        "decompose",
        time.perf_counter() - started,
        sources=" ".join("+".join(map(str, some)) for some in dict.fromkeys(work.sources)),
        targets=" ".join(map(str, work.targets)),
        positions=positions if isinstance(positions, str | int) else list(positions),
        target_positions=target_positions,
        relevance=relevance,
        **told(work),
    )
    unit = task.metric.name if work.targets[0].kind == "logits" else "share of the target"
    scores = Scores(pd.concat(frames, ignore_index=True), unit, meta)
    return or_interrupted(scores, found.done, "parts", checkpoint is not None)


def read_work(
    model: Model,
    task: Task,
    rules: Rules,
    sources: SitesLike | Sequence[SitesLike],
    targets: SitesLike = "logits",
    *,
    positions: PositionsLike = "all",
    target_positions: str | int | None = None,
    together: bool = False,
    reference: str | Task = "corrupt",
) -> Work:
    """What ``decompose`` is asked, checked; arguments and errors are its own."""
    if not isinstance(reference, Task) and reference not in ("mean", "corrupt", "zero"):
        raise OptionError(f"reference = {reference!r}", expected='"mean", "corrupt", "zero", or a task')
    check_task(model, task)
    aims = _targets(model, targets)
    chosen = _sources(model, sources, together, aims)
    pairs = [(some, where) for some in chosen for where in read_places(task, positions)]
    at: Place = None if target_positions is None else read_places(task, target_positions)[0]
    against = task if isinstance(reference, str) and reference == "mean" else reference
    return Work(model, task, [some for some, _ in pairs], [where for _, where in pairs], aims, at, against, rules)


def told(work: Work) -> dict[str, Any]:
    """The options, for provenance."""
    against = work.reference if isinstance(work.reference, str) else work.reference.name
    return {"reference": "mean" if work.reference is work.task else against, **work.rules.options}


def table(work: Work, found: Found, aim: Site, with_position: bool, relevance: str) -> pd.DataFrame:
    """A row a source that comes before a target."""
    done = found.done.numpy()
    measured = found.values[:, :, work.targets.index(aim)].double().numpy()  # [sources, n, 2]
    values = np.where(done[..., None], measured, np.nan)
    of_logits = aim.kind == "logits"
    chosen = values[..., 0 if of_logits or relevance == "signed" else 1]
    n, rows = done.sum(1), []
    for i, (some, where) in enumerate(zip(work.sources, work.where, strict=True)):
        if not n[i] or not any(arrives(one, aim) for one in some):
            continue
        name, single = "+".join(map(str, some)), some[0] if len(some) == 1 else None
        mean = np.nanmean(values[i], 0)
        rows.append(
            {
                "sender": name,
                "receiver": str(aim),
                "site": name,
                "layer": some[0].layer,
                "head": single.head if single else None,
                "kind": single.kind if single else "set",
                **({"position": where} if with_position else {}),
                "score": np.nanmean(chosen[i]),
                **({} if of_logits else {"signed": mean[0], "size": mean[1]}),
                "se": np.nanstd(chosen[i], ddof=1) / np.sqrt(n[i]) if n[i] > 1 else np.nan,
                "n": n[i],
            }
        )
    columns = ["sender", "receiver", "site", "layer", "head", "kind", *(["position"] if with_position else [])]
    columns += ["score", *([] if of_logits else ["signed", "size"]), "se", "n"]
    return pd.DataFrame(rows, columns=columns).astype({"head": "Int64"})


def arrives(source: Site, target: Site) -> bool:
    """Whether a source is there before a target is read."""
    if target.kind == "logits":
        return True
    here, there = place(key_of(source)), place(key_of(target))
    return here < there if source.kind != "embed" else there > (0, 0)


def _targets(model: Model, wanted: SitesLike) -> tuple[Site, ...]:
    found = tuple(dict.fromkeys(model.info.shared(model.info.check(one)) for one in read_sites(wanted)))
    if not found:
        raise SiteError("No targets", expected='"logits", or addresses such as "9.9.q"')
    for one in found:
        if one.kind not in _TARGETS:
            raise SiteError(f'"{one}" as a target', expected='"logits", "9.9.q", .k, .v, "9.9", "m9" or "resid.9"')
    if len(found) > 1 and any(one.kind == "logits" for one in found):
        raise OptionError(
            "The logits together with other targets", expected="one or the other, whose scores have different units"
        )
    return found


def _sources(model: Model, wanted: Any, together: bool, targets: Sequence[Site]) -> list[tuple[Site, ...]]:
    several: Any = () if isinstance(wanted, str | Site) else wanted
    nested = any(isinstance(one, Sequence) and not isinstance(one, str | Site) for one in several)
    if nested:
        sets = [tuple(read_patchable(model, one)) for one in several]
    else:
        every = read_patchable(model, wanted)
        sets = [tuple(every)] if together else [(one,) for one in every]
    if together and nested:
        sets = [tuple(dict.fromkeys(one for some in sets for one in some))]
    for one in (one for some in sets for one in some):
        if one.kind not in _SOURCES:
            raise SiteError(f'"{one}" as a source', expected='heads such as "9.9", MLPs such as "m9", or "embed"')
    words = isinstance(wanted, str) and {*wanted.replace(",", " ").split()} <= {"heads", "mlps", "embed"}
    reaching = [some for some in sets if any(arrives(one, target) for one in some for target in targets)]
    if not reaching or (len(reaching) < len(sets) and not words):
        late = next(some for some in sets if some not in reaching)
        raise SiteError(
            f'The source "{"+".join(map(str, late))}" comes before none of the targets',
            expected=f"a part before {' '.join(map(str, targets))}",
        )
    if unreached := [t for t in targets if not any(arrives(one, t) for some in reaching for one in some)]:
        raise SiteError(f'The target "{unreached[0]}" comes after none of the sources', expected="a later target")
    return sorted(reaching, key=begins)
