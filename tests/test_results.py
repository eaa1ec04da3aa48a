"""Scores, their files, and the pictures made of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from families import tiny, tiny_task

import mechkit as mk
from mechkit.errors import OptionError, StorageError


@pytest.fixture(scope="module")
def scores() -> mk.Scores:
    return mk.patch(tiny("llama"), tiny_task(n=5), progress=False)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_saved_and_loaded_is_the_same(scores, tmp_path, suffix):
    again = mk.Scores.load(scores.save(tmp_path / f"scores{suffix}"))
    exact = suffix == ".parquet"  # text of a number may lose its last bit
    pd.testing.assert_frame_equal(again.frame, scores.frame, check_exact=exact, rtol=1e-12, check_dtype=exact)
    assert again.unit == scores.unit
    assert again.meta == scores.meta


def test_rows_are_tidy_and_carry_their_provenance(scores):
    assert list(scores.frame.columns) == ["site", "layer", "head", "kind", "score", "metric", "se", "n"]
    assert len(scores) == 12
    assert {"model", "weights", "n_layers", "task", "method", "options", "versions", "seconds"} <= set(scores.meta)
    assert scores.meta["options"]["direction"] == "denoise"
    each = mk.patch(tiny("llama"), tiny_task(n=5), "0.1", positions="each", progress=False).frame
    assert each.position.tolist() == list(range(9))


def test_top_is_by_size_and_by_sign(scores):
    assert scores.top(3).score.abs().is_monotonic_decreasing
    assert scores.top(3, "positive").score.iloc[0] == scores.frame.score.max()
    assert scores.top(3, "negative").score.iloc[0] == scores.frame.score.min()
    assert str(scores.heads(2)) == " ".join(scores.top(2).site)
    with pytest.raises(OptionError, match="sideways"):
        scores.top(3, "sideways")  # type: ignore[arg-type]


def test_standard_error_is_that_of_the_mean_over_prompts(scores):
    task, model = tiny_task(n=5), tiny("llama")
    row = scores.frame.iloc[5]
    alone = [mk.patch(model, task[i], row.site, progress=False) for i in range(5)]
    gaps = [one.meta["options"]["source_metric"] - one.meta["options"]["base_metric"] for one in alone]
    shares = np.array([one.frame.score[0] * gap for one, gap in zip(alone, gaps, strict=True)]) / np.mean(gaps)
    assert row.score == pytest.approx(shares.mean(), abs=1e-4)
    assert row.se == pytest.approx(shares.std(ddof=1) / 5**0.5, abs=1e-4)


def test_the_grid_has_every_head_where_it_belongs(scores):
    grid = scores.grid()
    assert grid.shape == (3, 4)
    for row in scores.frame.itertuples():
        assert grid[row.layer, row.head] == row.score


@pytest.mark.parametrize(("name", "error"), [("scores.txt", OptionError), ("file/scores.csv", StorageError)])
def test_a_place_that_cannot_be_written_is_named(scores, tmp_path, name, error):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(error, match=r"txt|file"):
        scores.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_holds_no_scores_is_refused(tmp_path):
    (tmp_path / "scores.csv").write_text("a,b\n1,2\n")
    for name in ("scores.csv", "missing.parquet"):
        with pytest.raises(StorageError, match=name):
            mk.Scores.load(tmp_path / name)


def test_pictures_are_drawn_and_show_their_numbers(scores):
    from mechkit.view import figures

    drawn = figures.svg(scores.plot(), "the map")
    assert drawn.startswith("<svg")
    assert scores.plot()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    assert 'aria-label="the map"' in drawn
    assert f"{scores.top(1).score[0]:.2f}".replace("0.", ".") in drawn
    circuit = mk.discover(tiny("llama"), tiny_task(n=5), size=3, progress=False)
    curve = circuit.evaluate(tiny("llama"), tiny_task(n=5, seed=1), controls=3, progress=False).plot()
    assert f"+{circuit.nodes[0]}" in figures.svg(curve, "the curve")
    assert "<table" in scores._repr_html_()
    assert "<table" in circuit._repr_html_()


@pytest.mark.parametrize(("token", "shown"), [(" to", "to"), ("\n", "⏎"), ("  ", "␣␣"), ("$x$", r"\$x\$"), ("", "␣")])
def test_tokens_can_be_read_on_an_axis(token, shown):
    from mechkit.view.figures import visible

    assert visible(token) == shown


def test_the_grid_is_of_one_kind():
    model, task = tiny("llama"), tiny_task(n=3)
    scores = mk.patch(model, task, "q patterns mlps k", progress=False)
    with pytest.raises(OptionError, match="one of q, pattern, mlp, k"):
        scores.grid()
    assert scores.grid("pattern").shape == (3, 4)
    assert scores.grid("k").shape == (3, 2)
    assert scores.grid("mlp").shape == (3, 1)
    row = scores.frame[scores.frame.site == "2.kv1.k"].iloc[0]
    assert scores.grid("k")[2, 1] == row.score


def test_the_grid_of_the_residual_has_positions_across():
    scores = mk.patch(tiny("llama"), tiny_task(n=3), "resid", positions="each", progress=False)
    grid = scores.grid()
    assert grid.shape == (4, 9)
    for row in scores.frame.itertuples():
        assert grid[row.layer, row.position] == row.score
    assert len(scores.plot().axes[0].images[0].get_array()) == 9
    with pytest.raises(OptionError, match="several positions a head"):
        mk.patch(tiny("llama"), tiny_task(n=3), "heads", positions="each", progress=False).grid()
