"""Do two groups of prompts differ, measure by measure? Sizes of the differences, and what is left of many tests.

1. Cohen's d: the difference of the means over the pooled standard deviation, sqrt(((n_a - 1) s_a^2 + (n_b - 1) s_b^2) /
   (n_a + n_b - 2)). Of pairs, d_z: the mean difference over the standard deviation of the differences.
2. p, two-sided: Welch's t-test, of pairs the paired t-test; or a permutation test of the difference of means, groups
   changed about, or of pairs their sides (at most 9,999 permutations; all of them where there are fewer).
3. q: p adjusted for the number of measures after Benjamini and Hochberg. Taking what has q < 0.05 makes, of what is
   taken, 5% wrong on average.
4. A measure that is constant has no d and no p, and does not count among the measures.

Cohen 1988; Benjamini and Hochberg 1995; used of matrix measures in arXiv 2604.12128. Measures that grow with the length
of a prompt (entropies, effective ranks) differ between groups of other lengths: compare prompts of one length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from ..errors import OptionError
from ..results import as_html

if TYPE_CHECKING:
    from torch import Tensor

Group: TypeAlias = "pd.DataFrame | np.ndarray | Tensor | Sequence"
TESTS = ("welch", "permutation")
_PERMUTATIONS = 9999
_CONSTANT = 1e-12  # a spread beside the values that is none but rounding


@dataclass(frozen=True, eq=False, repr=False)
class GroupComparison:
    """How two groups differ.

    Attributes:
        frame: a row a measure: ``measure``, ``mean_a``, ``mean_b``, ``d`` (Cohen's, a less b; of pairs d_z), ``p``,
            ``q``, ``n_a``, ``n_b``.
        notes: measures without d and p.
        meta: test, paired, names, seed.
    """

    frame: pd.DataFrame
    notes: tuple[str, ...]
    meta: Mapping[str, Any]

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k measures with the largest d in size."""
        order = self.frame["d"].abs().sort_values(ascending=False, kind="stable").index[:k]
        return self.frame.loc[order].reset_index(drop=True)

    def significant(self, q: float = 0.05) -> pd.DataFrame:
        """The measures with a q below this."""
        return self.frame.loc[self.frame["q"] < q].reset_index(drop=True)

    def _told(self) -> str:
        a, b = self.meta["names"]
        tested = int(self.frame["p"].notna().sum())
        found = len(self.significant())
        text = f"GroupComparison of {a} and {b}: {found} of {tested} measures differ (q < 0.05)"
        return " ".join([text + ".", *self.notes])

    def __repr__(self) -> str:
        return self._told() + "\n" + self.top(10).to_string(index=False)

    def _repr_html_(self) -> str:
        return as_html(self.top(10), self._told())


def compare_groups(
    a: Group,
    b: Group,
    *,
    paired: bool = False,
    test: Literal["welch", "permutation"] = "welch",
    names: tuple[str, str] | None = None,
    seed: int = 0,
) -> GroupComparison:
    """Compare two groups of prompts, measure by measure.

    Args:
        a, b: a row a prompt, a column a measure: tables with the same columns, or arrays ``[n, measures]``.
        paired: row i of both belongs together, such as minimal pairs.
        test: ``"welch"`` (of pairs, the paired t-test) or ``"permutation"``.
        names: of the groups.
        seed: of the permutations.

    Raises:
        OptionError: an unknown test; other than two names; measures that differ, are none, or are not finite numbers;
            fewer than two rows; pairs of another number of rows.
    """
    if test not in TESTS:
        raise OptionError(f"test = {test!r}", expected="one of " + ", ".join(TESTS))
    called = ("a", "b") if names is None else tuple(names)
    if len(called) != 2 or isinstance(names, str):
        raise OptionError(f"names = {names!r}", expected="two names")
    first, second = (_table(one, name) for one, name in zip((a, b), called, strict=True))
    if list(first.columns) != list(second.columns):
        odd = [str(one) for one in first.columns.symmetric_difference(second.columns, sort=False)]
        raise OptionError(
            f"Groups with other measures: {', '.join(odd[:5]) or 'in another order'}",
            expected="the same columns in both",
        )
    if paired and len(first) != len(second):
        raise OptionError(f"Pairs of {len(first)} and {len(second)} rows", expected="as many in both, pair by pair")
    one, other = first.to_numpy(float), second.to_numpy(float)
    spread = _spread(one, other, paired)
    size = np.maximum(np.abs(one).max(0), np.abs(other).max(0))
    varies = spread > _CONSTANT * np.maximum(size, np.finfo(float).tiny)
    d, p, q = (np.full(one.shape[1], np.nan) for _ in range(3))
    if varies.any():
        d[varies] = (one - other if paired else one.mean(0) - other.mean(0)).reshape(-1, one.shape[1]).mean(0)[varies]
        d[varies] /= spread[varies]
        p[varies] = _p(one[:, varies], other[:, varies], paired, test, seed)
        from scipy.stats import false_discovery_control

        q[varies] = false_discovery_control(p[varies])
    constant = [str(name) for name, moves in zip(first.columns, varies, strict=True) if not moves]
    what = "Differences that are the same in every pair" if paired else "Constant in both groups"
    frame = pd.DataFrame(
        {
            "measure": [str(name) for name in first.columns],
            "mean_a": one.mean(0),
            "mean_b": other.mean(0),
            "d": d,
            "p": p,
            "q": q,
            "n_a": len(one),
            "n_b": len(other),
        }
    )
    notes = (f"{what}, so without d and p: {', '.join(constant)}.",) if constant else ()
    return GroupComparison(frame, notes, {"test": test, "paired": paired, "names": called, "seed": seed})


def _spread(one: np.ndarray, other: np.ndarray, paired: bool) -> np.ndarray:
    if paired:
        return (one - other).std(0, ddof=1)
    squares = (len(one) - 1) * one.var(0, ddof=1) + (len(other) - 1) * other.var(0, ddof=1)
    return np.sqrt(squares / (len(one) + len(other) - 2))


def _p(one: np.ndarray, other: np.ndarray, paired: bool, test: str, seed: int) -> np.ndarray:
    from scipy import stats

    if test == "welch":
        found: Any = stats.ttest_rel(one, other) if paired else stats.ttest_ind(one, other, equal_var=False)
        return np.asarray(found.pvalue)

    def apart(x: np.ndarray, y: np.ndarray, axis: int = 0) -> np.ndarray:
        return x.mean(axis=axis) - y.mean(axis=axis)

    kind = "samples" if paired else "independent"
    drawn: dict[str, Any] = {"random_state": np.random.default_rng(seed)}  # "rng" since SciPy 1.15, which takes both
    found = stats.permutation_test(
        (one, other),
        apart,
        permutation_type=kind,
        vectorized=True,
        n_resamples=_PERMUTATIONS,
        batch=max(1, 10_000_000 // max(1, one.size + other.size)),
        axis=0,
        **drawn,
    )
    return np.asarray(found.pvalue)


def _table(group: Any, name: str) -> pd.DataFrame:
    """A group as a table of numbers."""
    if not isinstance(group, pd.DataFrame):
        try:
            values = np.asarray(group.detach().cpu() if hasattr(group, "detach") else group, dtype=float)
        except (TypeError, ValueError):
            raise OptionError(f"Group {name} is no array of numbers", expected="[n, measures]") from None
        if values.ndim != 2:
            raise OptionError(f"Group {name} of shape {list(values.shape)}", expected="[n, measures]")
        group = pd.DataFrame(values)
    if not len(group.columns):
        raise OptionError(f"Group {name} has no measures", expected="a column or more")
    if len(group) < 2:
        raise OptionError(f"Group {name} has {len(group)} rows", expected="two at least", fix="Measure more prompts")
    for column, kind in group.dtypes.items():
        if not pd.api.types.is_numeric_dtype(kind):
            raise OptionError(f'Measure "{column}" of group {name} is {kind}', expected="numbers", fix="Leave it out")
    wrong = ~np.isfinite(group.to_numpy(float, na_value=np.nan))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise OptionError(
            f'Measure "{group.columns[column]}" of group {name} is not finite in row {row}', expected="finite numbers"
        )
    return group
