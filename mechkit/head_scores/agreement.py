"""Do two scores of the same heads say the same?

1. Spearman's rank correlation over the sites that both have, with a bootstrap percentile interval over sites (10,000
   draws, 95%).
2. Of the k largest in size of each: how many are the same, beside what chance gives, with the hypergeometric tail as p.

Ranks are of the scores with their signs; the top k are by size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..errors import OptionError, RankingError
from ..results import as_html

if TYPE_CHECKING:
    from ..results import Scores

_DRAWS = 10_000


@dataclass(frozen=True)
class Agreement:
    """How far two scores agree.

    Attributes:
        rho: Spearman's rank correlation.
        interval: its 95% bootstrap interval over sites.
        n: sites that both have.
        k: how many of each are compared.
        shared: how many of the k largest in size are the same.
        by_chance: how many would be by chance.
        p: the chance of that many or more.
    """

    rho: float
    interval: tuple[float, float]
    n: int
    k: int
    shared: int
    by_chance: float
    p: float

    @property
    def frame(self) -> pd.DataFrame:
        """One row: every number."""
        low, high = self.interval
        row = {"rho": self.rho, "low": low, "high": high, "n": self.n, "k": self.k, "shared": self.shared}
        return pd.DataFrame([{**row, "by_chance": self.by_chance, "p": self.p}])

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"Agreement: rank correlation {self.rho:.2f} (95% interval {low:.2f} to {high:.2f}) over {self.n} sites; "
            f"{self.shared} of the top {self.k} are the same, by chance {self.by_chance:.1f} (p = {self.p:.2g})"
        )

    def _repr_html_(self) -> str:
        return as_html(self.frame, "Agreement")


def agreement(a: Scores, b: Scores, k: int = 10, seed: int = 0) -> Agreement:
    """See ``Scores.compare``, whose errors it raises."""
    from scipy.stats import hypergeom, rankdata

    both = pd.concat([_by_site(one) for one in (a, b)], axis=1, join="inner").dropna()
    n = len(both)
    if n < 3:
        raise OptionError(f"Scores with {n} sites in common", expected="at least 3 sites that both have a score of")
    if not 1 <= k <= n:
        raise OptionError(f"k = {k}", expected=f"1 to {n}")
    left, right = both.to_numpy().T
    for name, values in (("first", left), ("second", right)):
        if np.ptp(values) == 0:
            raise RankingError(f"The {name} scores are {values[0]:.4g} at every site", expected="scores that differ")
    draws = np.random.default_rng(seed).integers(n, size=(_DRAWS, n))
    ranks = [rankdata(values[draws], axis=1) for values in (left, right)]
    x, y = (one - one.mean(1, keepdims=True) for one in ranks)
    with np.errstate(invalid="ignore"):  # a draw of one site, again and again
        drawn = (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))
    low, high = np.nanpercentile(drawn, (2.5, 97.5)).tolist()
    tops = [set(np.argsort(-np.abs(values), kind="stable")[:k]) for values in (left, right)]
    shared = len(tops[0] & tops[1])
    return Agreement(
        rho=float(np.corrcoef(rankdata(left), rankdata(right))[0, 1]),
        interval=(low, high),
        n=n,
        k=k,
        shared=shared,
        by_chance=k * k / n,
        p=float(hypergeom.sf(shared - 1, n, k, k)),
    )


def _by_site(scores: Scores) -> pd.Series:
    scores.ranked()  # refuses where there is no ranking
    by_site = scores.frame.set_index("site").score
    if by_site.index.duplicated().any():
        raise OptionError("Scores with several rows of the same site", expected="one a site")
    return by_site
