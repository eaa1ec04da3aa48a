"""Faithfulness, its intervals and areas, and how well scores tell what is true.

1. faithfulness = (circuit - empty) / (model - empty), means of the metric over prompts; never clipped.
2. Intervals are bootstrap percentile intervals, 95%, over 10,000 draws of prompts: each draw is how often it has each
   prompt, so that the means of all draws are one product of matrices.
3. Areas are by the trapezoid rule over the fraction of edges, or nodes: CPR = area under faithfulness, CMD = area of
   |1 - faithfulness|.
4. AUROC: the chance that something true has a larger score than something that is not, ties counting half.

Mueller et al. 2025 (arXiv 2504.13151), section 3; for 4, Mann and Whitney 1947.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..errors import MetricError, OptionError
from ..graph import ARROW, EdgeLike
from ..sites import SiteLike

if TYPE_CHECKING:
    from ..edge_scores import EdgeScores
    from ..results import Scores

DRAWS = 10_000
_LEVELS = (2.5, 97.5)


def faithfulness(model: np.ndarray, circuit: np.ndarray, empty: np.ndarray) -> float:
    """(circuit - empty) / (model - empty), means over prompts ``[n]``.

    Raises:
        MetricError: the model is no better than the empty circuit.
    """
    gap = float(model.mean() - empty.mean())
    if abs(gap) < 1e-6:
        raise MetricError(
            f"The metric is {float(model.mean()):.4g} with everything left in and with none of it",
            expected="a task that what was ablated does",
        )
    return float(circuit.mean() - empty.mean()) / gap


def drawn_faithfulness(model: np.ndarray, circuits: np.ndarray, empty: np.ndarray, seed: int) -> np.ndarray:
    """Faithfulness of circuits ``[circuits, n]`` in draws of the prompts: ``[draws, circuits]``; NaN of one prompt."""
    n = len(model)
    if n < 2:
        return np.full((DRAWS, len(circuits)), np.nan)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS) / n
    full, low = counts @ model.astype(float), counts @ empty.astype(float)
    return (counts @ circuits.T.astype(float) - low[:, None]) / (full - low)[:, None]


def interval(draws: np.ndarray) -> np.ndarray:
    """Its 95% percentile interval: ``[draws, ...]`` to ``[2, ...]``."""
    return np.percentile(draws, _LEVELS, axis=0)


def areas(fractions: np.ndarray, faithful: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Areas under faithfulness and under |1 - faithfulness|, of ``[..., fractions]``."""
    from scipy.integrate import trapezoid

    return trapezoid(faithful, fractions), trapezoid(np.abs(1 - faithful), fractions)


def auroc(
    scores: Scores | EdgeScores,
    truth: Iterable[SiteLike | EdgeLike],
    by: Literal["size", "signed"] = "size",
) -> float:
    """How well scores tell the nodes, or edges, of the true circuit from all others that were scored.

    Args:
        scores: one score a node, or one an edge.
        truth: the true nodes or edges, as those of ``scores``.
        by: rank by the size of scores, whatever their sign, or by the scores themselves.

    Returns:
        Area under the ROC curve: 1 when everything true is ranked before everything else, 0.5 at chance.

    Raises:
        OptionError: nothing that is true or nothing that is not, something true that was not scored, a node that has
            several scores, or a score that is not a number.
        SiteError: something that is no address.
    """
    from scipy.stats import rankdata

    sizes: dict[str, Callable[[np.ndarray], np.ndarray]] = {"size": np.abs, "signed": np.asarray}
    if by not in sizes:
        raise OptionError(f"by = {by!r}", expected="one of " + ", ".join(sizes))
    texts, wanted = _names(scores), _true(scores, truth)
    if len({*texts}) < len(texts):
        raise OptionError(
            "Scores with several rows of the same node", expected="one a node", fix="Take those of one position"
        )
    if missing := wanted - {*texts}:
        raise OptionError(f"True but not scored: {', '.join(sorted(missing)[:5])}", expected="rows of .frame")
    values = sizes[by](scores.frame["score"].to_numpy(float))
    if not np.isfinite(values).all():
        raise OptionError(f"{int((~np.isfinite(values)).sum())} scores are not numbers", expected="finite scores")
    true = np.array([text in wanted for text in texts])
    if true.all() or not true.any():
        raise OptionError(f"{int(true.sum())} of {len(true)} are true", expected="some that are and some that are not")
    positive, negative = int(true.sum()), int((~true).sum())
    return float((rankdata(values)[true].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _names(scores: Scores | EdgeScores) -> list[str]:
    frame = scores.frame
    return (frame["source"] + ARROW + frame["target"] if "source" in frame else frame["site"]).tolist()


def _true(scores: Scores | EdgeScores, truth: Iterable[SiteLike | EdgeLike]) -> set[str]:
    from ..edge_scores import EdgeScores
    from ..sites import site

    if not isinstance(scores, EdgeScores):
        return {str(site(one)) for one in truth}  # type: ignore[arg-type]
    graph = scores.graph
    return {str(graph.check(one)) for one in truth}  # type: ignore[arg-type]
