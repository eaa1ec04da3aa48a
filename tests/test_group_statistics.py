"""Differences between groups are those of the formulas, and of what is known."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from mechkit.errors import OptionError
from mechkit.evidence.groups import compare_groups


def _groups(seed=0, n=(12, 9), measures=5, shift=0.0):
    draw = np.random.default_rng(seed)
    return draw.normal(shift, 1, (n[0], measures)), draw.normal(0, 2, (n[1], measures))


def test_d_by_hand():
    a, b = np.array([[1.0], [2.0], [3.0]]), np.array([[2.0], [4.0], [6.0], [8.0]])
    # Means 2 and 5; squares about them 2 and 20; pooled variance 22 / 5.
    found = compare_groups(a, b).frame.iloc[0]
    assert found.d == pytest.approx(-3 / (22 / 5) ** 0.5)
    assert (found.mean_a, found.mean_b, found.n_a, found.n_b) == (2, 5, 3, 4)


def test_d_of_pairs_by_hand():
    a, b = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0], [0.0], [3.0]])
    found = compare_groups(a, b, paired=True).frame.iloc[0]
    assert found.d == pytest.approx(2.0)  # differences 1, 2, 3: mean 2, standard deviation 1
    assert found.p == pytest.approx(2 * stats.t.sf(2 * 3**0.5, 2))


def test_welch_written_out():
    a, b = _groups(shift=0.7)
    frame = compare_groups(a, b).frame
    for i, p in enumerate(frame.p):
        va, vb = a[:, i].var(ddof=1) / len(a), b[:, i].var(ddof=1) / len(b)
        t = (a[:, i].mean() - b[:, i].mean()) / (va + vb) ** 0.5
        freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
        assert p == pytest.approx(2 * stats.t.sf(abs(t), freedom))


def test_d_of_simulated_normals():
    draw = np.random.default_rng(0)
    found = compare_groups(draw.normal(0.8, 1, (20_000, 2)), draw.normal(0, 1, (20_000, 2))).frame
    assert found.d.tolist() == pytest.approx([0.8, 0.8], abs=0.04)


@pytest.mark.parametrize("paired", [False, True])
def test_every_permutation(paired):
    draw = np.random.default_rng(1)
    a, b = draw.normal(1, 1, (4, 3)), draw.normal(0, 1, (4, 3))
    own = a.mean(0) - b.mean(0)
    both, found = np.concatenate([a, b]), []
    if paired:
        for signs in itertools.product([1, -1], repeat=4):
            found.append((np.array(signs)[:, None] * (a - b)).mean(0))
    else:
        for some in itertools.combinations(range(8), 4):
            rest = [i for i in range(8) if i not in some]
            found.append(both[list(some)].mean(0) - both[rest].mean(0))
    wanted = (np.abs(found) >= np.abs(own) - 1e-9).mean(0)
    assert compare_groups(a, b, paired=paired, test="permutation").frame.p.tolist() == pytest.approx(wanted.tolist())


def test_many_permutations_are_near_welch_and_repeat():
    a, b = _groups(n=(40, 40), shift=0.5)
    one, again = (compare_groups(a, b, test="permutation", seed=3).frame.p for _ in range(2))
    assert one.tolist() == again.tolist()
    assert one.tolist() == pytest.approx(compare_groups(a, b).frame.p.tolist(), abs=0.03)


def test_benjamini_hochberg_worked(monkeypatch):
    """The p of five measures, one after another times 5 / rank, and never above those after it."""
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.5])
    # Ranks 2, 4, 3, 1, 5: 0.025, 0.05, 0.05, 0.025, 0.5.
    monkeypatch.setattr("mechkit.evidence.groups._p", lambda *_: p)
    found = compare_groups(*_groups())
    assert found.frame.q.tolist() == pytest.approx([0.025, 0.05, 0.05, 0.025, 0.5])
    assert found.significant(0.04).measure.tolist() == ["0", "3"]


def test_what_has_no_difference_is_seldom_found():
    draw = np.random.default_rng(5)
    a, b = draw.normal(size=(30, 400)), draw.normal(size=(30, 400))
    a[:, :20] += 3.0
    found = set(map(int, compare_groups(a, b).significant().measure))
    assert found >= set(range(20))
    assert len(found) <= 25


def test_a_constant_measure_is_said():
    table = pd.DataFrame({"moves": [1.0, 2.0, 3.5], "stays": [0.1, 0.1, 0.1]})
    other = pd.DataFrame({"moves": [4.0, 6.0, 5.5], "stays": [0.1, 0.1, 0.1]})
    for test in ("welch", "permutation"):
        found = compare_groups(table, other, test=test, names=("odd", "even"))  # type: ignore[arg-type]
        row = found.frame.set_index("measure").loc["stays"]
        assert np.isnan([row.d, row.p, row.q]).all()
        assert "stays" in found.notes[0]
        assert "odd and even" in repr(found)
        assert "stays" in found._repr_html_()
    alone = compare_groups(table[["moves"]], other[["moves"]]).frame
    assert compare_groups(table, other).frame.q[0] == pytest.approx(alone.q[0])
    pairs = compare_groups(table, table + 1.0, paired=True)
    assert pairs.frame.d.isna().all()
    assert "same in every pair" in pairs.notes[0]


def test_tensors_and_tables_are_the_same():
    a, b = _groups()
    table = compare_groups(pd.DataFrame(a), pd.DataFrame(b)).frame
    assert compare_groups(torch.tensor(a), torch.tensor(b)).frame.equals(table)
    assert compare_groups(a, b).top(2).d.abs().tolist() == sorted(table.d.abs(), reverse=True)[:2]


def test_bad_input():
    a, b = _groups()
    table = pd.DataFrame(a, columns=list("vwxyz"))
    for given, words in (
        ((a[:1], b), "Group a has 1 rows"),
        ((a, b[:, :4]), "other measures"),
        ((a[0], b), r"Group a of shape \[5\]"),
        ((table, pd.DataFrame(b, columns=list("zyxwv"))), "in another order"),
        ((table.assign(v="x"), table), 'Measure "v" of group a is'),
        ((a, np.where(np.arange(45).reshape(9, 5) == 7, np.nan, b)), 'Measure "2" of group b is not finite in row 1'),
        ((a[:, :0], b[:, :0]), "no measures"),
        (([["x"]], b), "no array of numbers"),
    ):
        with pytest.raises(OptionError, match=words):
            compare_groups(*given)
    with pytest.raises(OptionError, match="Pairs of 12 and 9 rows"):
        compare_groups(a, b, paired=True)
    with pytest.raises(OptionError, match="test = 'anova'"):
        compare_groups(a, b, test="anova")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="names"):
        compare_groups(a, b, names=("one",))  # type: ignore[arg-type]
