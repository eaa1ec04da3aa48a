"""Is anything missing from a circuit, and does it need all that it has?

F(S) is the mean metric with everything outside S ablated, C the circuit, M the whole model; both tables are in shares
of the gap F(M) - F(nothing).

1. Completeness: for every part K of the circuit, |F(C without K) - F(M without K)| should be small. If the model does
   better without K than the circuit does, something outside the circuit does what K did.
2. K is tried at random, each member with chance 1/2; and greedily: from nothing, add to K of some members of the
   circuit drawn at random the one that makes the difference largest, again and again.
3. Minimality: for every member v there should be a K with large |F(C without K and v) - F(C without K)|; the table has
   the largest that was found. K is nothing, and some parts of the circuit drawn at random, the same for all v.

Both find bounds, not the worst case: what more K would find, they do not know.

Wang et al. 2022 (arXiv 2211.00593), sections 4.1 and 4.2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from ..errors import OptionError
from ..graph import Edge
from ..results import Table, provenance
from ..sites import Site
from .curve import keeper_of
from .keep import EdgeKeeper
from .statistics import faithfulness

if TYPE_CHECKING:
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task
    from .circuit import Circuit

Member: TypeAlias = "Site | Edge"
_UNIT = "share of the metric gap"


def completeness(
    circuit: Circuit,
    model: Model,
    task: Task,
    *,
    ablation: Ablation = "mean",
    reference: Task | None = None,
    random: int = 10,
    greedy: int = 1,
    steps: int = 4,
    candidates: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Table:
    """How far the circuit and the model come apart when the same members are taken out of both.

    Costs 2 + 2 ``random`` + 2 ``greedy`` ``steps`` ``candidates`` runs of the task.

    Args:
        circuit: of nodes or of edges.
        model: the model it was found in.
        task: held-out prompts.
        ablation: what happens to everything that is out: ``"mean"``, ``"zero"`` or ``"resample"``.
        reference: whose corrupt prompts give the values; left out: ``task``.
        random: number of parts K drawn at random.
        greedy: how often K is built up greedily.
        steps: members in each of these at the end.
        candidates: members that are tried at each step.
        seed: of all draws.
        progress: show bars.

    Returns:
        A row a K: ``how`` (``"none"``, ``"random"``, ``"greedy"``), ``size``, ``removed`` (as text), ``circuit`` and
        ``model`` (mean raw metric of each without K), ``score`` (their distance, in shares of the gap).

    Raises:
        OptionError: a number below 0, or below 1 of steps or candidates.
        MetricError: the model does no better than with everything ablated.
    """
    _check(random=random, greedy=greedy)
    _check(1, steps=steps, candidates=candidates)
    measure = _Measure(circuit, model, task, ablation, reference, seed, progress)
    members = measure.members
    rows = [("none", [])] + [("random", measure.half()) for _ in range(random)]
    pairs = measure.both([taken for _, taken in rows])
    for _ in range(greedy):
        taken: list[Member] = []
        for _ in range(min(steps, len(members))):
            rest = [one for one in members if one not in taken]
            tried = [[*taken, rest[i]] for i in measure.draw.permutation(len(rest))[:candidates].tolist()]
            found = measure.both(tried)
            best = int(np.abs(found[0] - found[1]).argmax())
            taken = tried[best]
            rows.append(("greedy", taken))
            pairs = np.concatenate([pairs, found[:, best : best + 1]], 1)
    frame = pd.DataFrame(
        {
            "how": [how for how, _ in rows],
            "size": [len(taken) for _, taken in rows],
            "removed": [" ".join(map(str, taken)) for _, taken in rows],
            "circuit": pairs[0],
            "model": pairs[1],
            "score": np.abs(pairs[0] - pairs[1]) / measure.gap,
        }
    )
    return measure.table(frame, "completeness", random=random, greedy=greedy, steps=steps, candidates=candidates)


def minimality(
    circuit: Circuit,
    model: Model,
    task: Task,
    *,
    ablation: Ablation = "mean",
    reference: Task | None = None,
    sets: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Table:
    """What each member of a circuit adds to the rest of it.

    Costs 3 + |C| + ``sets`` (1 + |C| / 2) runs of the task, |C| the number of members.

    Args:
        circuit, model, task, ablation, reference, seed, progress: as of ``completeness``.
        sets: number of parts K drawn at random.

    Returns:
        A row a member: ``member``, ``alone`` (the signed change when it alone is taken out of the circuit), ``score``
        (the largest change in size, over all K), ``removed`` (the K that gave it); in shares of the gap.

    Raises:
        OptionError: a number of sets below 0.
        MetricError: the model does no better than with everything ablated.
    """
    _check(sets=sets)
    measure = _Measure(circuit, model, task, ablation, reference, seed, progress)
    out = [[], *(measure.half() for _ in range(sets))]
    members = {one: number for number, one in enumerate(measure.members)}
    tried = [(k, v) for k, taken in enumerate(out) for v, one in enumerate(measure.members) if one not in taken]
    values = measure.of_circuit([*out, *([*out[k], measure.members[v]] for k, v in tried)])
    change = np.full((len(out), len(members)), np.nan)
    for (k, v), value in zip(tried, values[len(out) :], strict=True):
        change[k, v] = (values[k] - value) / measure.gap
    largest = np.nanargmax(np.abs(change), 0) if len(members) else np.zeros(0, int)
    frame = pd.DataFrame(
        {
            "member": [str(one) for one in members],
            "score": np.abs(change[largest, np.arange(len(members))]),
            "alone": change[0],
            "removed": [" ".join(map(str, out[k])) for k in largest],
        }
    )
    return measure.table(frame, "minimality", sets=sets)


class _Measure:
    """What both share: F of the circuit and of the model, with some members taken out of them, and their table."""

    def __init__(
        self,
        circuit: Circuit,
        model: Model,
        task: Task,
        ablation: Ablation,
        reference: Task | None,
        seed: int,
        progress: bool,
    ):
        self._started = time.perf_counter()
        self.members: list[Member] = [*circuit.members]
        self.draw = np.random.default_rng(seed)
        self._model, self._task, self._options = model, task, {"ablation": ablation, "seed": seed}
        self._keeper, self._progress = keeper_of(circuit.scores, model, task, ablation, reference), progress
        full, empty = self._keeper.model_metric, self._metric([[]], [[]])[0]
        faithfulness(full, full, empty)  # fails where there is no gap
        self.gap = abs(float(full.mean() - empty.mean()))

    def half(self) -> list[Member]:
        """Members of the circuit drawn with chance 1/2 each."""
        drawn = self.draw.random(len(self.members)) < 0.5
        return [one for one, out in zip(self.members, drawn, strict=True) if out]

    def of_circuit(self, taken: Sequence[Sequence[Member]]) -> np.ndarray:
        """Mean metric ``[sets]`` of the circuit without each set."""
        return self._metric([self.members] * len(taken), taken).mean(1)

    def both(self, taken: Sequence[Sequence[Member]]) -> np.ndarray:
        """Mean metric of the circuit, and of the model, without each set ``[2, sets]``."""
        of = [self.members] * len(taken) + [None] * len(taken)
        return self._metric(of, [*taken, *taken]).mean(1).reshape(2, -1)

    def table(self, frame: pd.DataFrame, method: str, **options: int) -> Table:
        """The rows with their unit and provenance."""
        seconds = time.perf_counter() - self._started
        return Table(frame, _UNIT, provenance(self._model, self._task, method, seconds, **self._options, **options))

    def _metric(self, of: Sequence[Sequence[Any] | None], taken: Sequence[Sequence[Any]]) -> np.ndarray:
        """Metric of each prompt ``[sets, n]``, with what is left of some members (None: of the model) kept."""
        keeper = self._keeper
        if isinstance(keeper, EdgeKeeper):
            masks = keeper.masks([() if one is None else one for one in of])
            masks[[one is None for one in of]] = keeper.graph.exists
            return keeper.metric(masks & ~keeper.masks(taken), self._progress)
        every = [keeper.parts if one is None else one for one in of]
        kept = [[one for one in some if one not in out] for some, out in zip(every, taken, strict=True)]
        return keeper.metric(kept, self._progress)


def _check(least: int = 0, **numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < least:
            raise OptionError(f"{name} = {number!r}", expected=f"a whole number from {least}")
