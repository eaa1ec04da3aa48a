"""Draws, intervals, areas and AUROC, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import edge_scores
from families import tiny, tiny_task

import mechkit as mk
from mechkit.circuits import statistics
from mechkit.edge_scores import EdgeScores
from mechkit.errors import OptionError, SiteError


def test_draws_are_those_of_prompts_drawn_again():
    draw = np.random.default_rng(3)
    model, empty, circuits = draw.normal(3, 1, 8), draw.normal(0, 1, 8), draw.normal(1, 1, (2, 8))
    found = statistics.drawn_faithfulness(model, circuits, empty, seed=5)
    assert found.shape == (statistics.DRAWS, 2)
    counts = np.random.default_rng(5).multinomial(8, np.full(8, 1 / 8), size=statistics.DRAWS)
    for number in (0, 17, 9_999):
        rows = np.repeat(np.arange(8), counts[number])
        for i, one in enumerate(circuits):
            expected = statistics.faithfulness(model[rows], one[rows], empty[rows])
            assert found[number, i] == pytest.approx(expected)
    assert np.isnan(statistics.drawn_faithfulness(model[:1], circuits[:, :1], empty[:1], 0)).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draw, held = np.random.default_rng(0), 0
    for seed in range(60):
        circuit = draw.normal(0.6, 0.5, (1, 40))
        draws = statistics.drawn_faithfulness(np.ones(40), circuit, np.zeros(40), seed)
        low, high = statistics.interval(draws)[:, 0]
        held += low <= 0.6 <= high
    assert 50 <= held <= 60


def test_areas_of_known_curves():
    x = np.array([0.0, 0.5, 1.0])
    assert statistics.areas(x, np.ones(3)) == (1, 0)
    assert statistics.areas(x, x) == (0.5, 0.5)
    assert statistics.areas(x, np.array([0.0, 3.0, 1.0])) == (1.75, 1.25)  # above 1 counts, nothing is clipped


@pytest.mark.parametrize("by", ["size", "signed"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_auroc_is_the_share_of_pairs_that_are_in_order(by, level):
    model, draw = tiny("llama"), np.random.default_rng(0)
    scores = edge_scores(model)
    scores = scores.nodes() if level == "node" else scores
    rounded = scores.frame.assign(score=scores.frame.score.round(0))  # many ties
    scores = type(scores)(rounded, scores.unit, scores.meta)
    parts = scores.edges if isinstance(scores, EdgeScores) else [mk.site(text) for text in scores.frame.site]
    true = draw.random(len(parts)) < 0.3
    values = rounded.score.abs() if by == "size" else rounded.score
    pairs = [(a > b) + (a == b) / 2 for a in values[true] for b in values[~true]]
    found = statistics.auroc(scores, [one for one, yes in zip(parts, true, strict=True) if yes], by=by)
    assert found == pytest.approx(np.mean(pairs))


def test_auroc_reads_addresses_and_names_what_it_cannot_use():
    model = tiny("llama")
    scores = edge_scores(model)
    best = scores.ranked()[:5]
    assert statistics.auroc(scores, map(str, best)) == 1
    assert statistics.auroc(scores, ["embed->0.1.k"]) == statistics.auroc(scores, ["embed->0.kv0.k"])
    with pytest.raises(SiteError):
        statistics.auroc(scores, ["2.1->0.1.q"])
    with pytest.raises(OptionError, match="0 of"):
        statistics.auroc(scores, [])
    with pytest.raises(OptionError, match="not scored"):
        statistics.auroc(scores.only(best), ["embed->0.1.q", best[0]])
    with pytest.raises(OptionError, match="loudness"):
        statistics.auroc(scores, best, by="loudness")  # type: ignore[arg-type]
    each = mk.patch(model, tiny_task(), "0.1", positions="each", progress=False)
    with pytest.raises(OptionError, match="several rows"):
        statistics.auroc(each, ["0.1"])
    broken = EdgeScores(scores.frame.assign(score=np.nan), "effect", scores.meta)
    with pytest.raises(OptionError, match="not numbers"):
        statistics.auroc(broken, best)
