"""The benchmarks compare the same work, and say what they measured."""

from __future__ import annotations

import json

import pytest
import torch
from browser.lab import CHROMIUM
from families import plain, tiny, tiny_task

from benchmarks import measure, patching, views

SLICES = [(layer, head, slice(None)) for layer in range(3) for head in range(4)]


def test_all_three_ways_do_the_same_work():
    model, task = tiny("llama"), tiny_task(n=1)
    ours = patching._ours(model, task, "heads").float()
    torch.testing.assert_close(ours, patching._lens_heads(model, task), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, patching._literal(plain("llama"), task, "z", SLICES), atol=1e-4, rtol=0)
    layers = [f"resid.{layer}" for layer in range(3)]
    places = [(layer, None, where) for layer in range(3) for where in range(9)]
    ours = patching._ours(model, task, layers, positions="each").float()
    torch.testing.assert_close(ours, patching._lens_resid(model, task), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, patching._literal(plain("llama"), task, "resid", places), atol=1e-4, rtol=0)


def test_a_row_has_ratios_with_their_spread_and_the_largest_difference(tmp_path):
    rows: list[measure.Row] = []
    one, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.5])
    measure.compare("work", 3, lambda: one, {"other": lambda: other}, "cpu", rows)
    assert len(rows[0].ratios) == 3
    assert rows[0].difference == 0.5
    assert measure.table(rows).count("\n") == 2
    measure.save(rows, tmp_path / "rows.json", model="tiny")
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["rows"][0]["what"] == "work"
    assert {"processor", "threads", "gpu", "torch"} <= set(saved["machine"])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_views_are_timed_in_a_browser():
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make browser")
    values = views.patterns(1, 3, 6)
    with views.chromium() as browser:
        rows = [views.measured(browser, page(values), 2) for page in (views.ours, views.circuitsvis)]
    for row in rows:
        assert 0 < row["drawn_s"] < row["opened_s"]
        assert len(row["grid_ms"]) == len(row["map_ms"]) == 2
        assert views.line(row).count("|") == views.HEAD.splitlines()[0].count("|")
