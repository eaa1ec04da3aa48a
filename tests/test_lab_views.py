"""Every view in JupyterLab, every action by keys alone; then the saved notebook without its kernel: ``make browser``.

A notebook shows each view of a tiny model, and the explorer. What keys do must be seen in the page and in Python.
Nothing may be asked of any other machine, and the notebook's own keys must stay out of it. The saved notebook is opened
again, untrusted: there must be a picture for each view.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from browser.lab import CHROMIUM, Opened, opened, scrolled_to, served, written

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make browser")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: make browser")

MADE = f"""\
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import mechkit as mk
from families import tiny, tiny_task
model, task = tiny("llama"), tiny_task(n=6)
scores = mk.patch(model, task, "heads", progress=False)
circuit = mk.Circuit(tuple(scores.ranked()[:5]), scores, scores.meta)
attention = mk.view.attention(model, task[[0]], scores=scores)
attention"""
VIEWS = (
    "shown = scores.show(); shown",
    "graph = circuit.show(model, task); graph",
    'words = mk.view.tokens(["Zeile", "\\n", " שלום", " 👩‍🚀"], [1.0, -0.5, 0.25, 0.0]); words',
    "explorer = mk.explore(model, task, size=5, progress=False); explorer",
)
TOLD = """\
print("SEEN", dict(
    heads=attention.selection, edits=[(one["head"], one["how"], one.get("alpha")) for one in attention.changes],
    token=attention.token, order=attention.order, map=attention.map, layer=attention.layer, column=attention.column,
    scores=shown.selection, site=shown.site, ranked=[str(one) for one in scores.ranked()],
    size=graph.size, cuts=[str(one) for one in graph.cuts], groups=graph.groups, word=words.token,
    linked=[one.selection for one in explorer.views], focus=[explorer.scores.site, explorer.attention.head]))"""
LAST = 1 + len(VIEWS)  # the cell that tells


class Views:
    """The open notebook, by keys."""

    def __init__(self, lab: Opened):
        self.page, self.lab = lab.page, lab

    def keys(self, cell: int, box: str, *keys: str) -> None:
        """Press keys with the focus on something in a cell's output."""
        where = self.page.locator(".jp-CodeCell").nth(cell).locator(box).first
        scrolled_to(where)
        where.focus()
        for key in keys:
            self.page.keyboard.press(key)

    def text(self, cell: int, what: str) -> str:
        return self.page.locator(".jp-CodeCell").nth(cell).locator(what).first.inner_text()

    def until(self, cell: int, what: str, test: str) -> None:
        """Until something in a cell's output has a text that passes a test in JavaScript, of ``text``."""
        found = self.page.locator(".jp-CodeCell").nth(cell).locator(what).first.element_handle()
        script = f"one => {{ const text = one.innerText; return ({test}) && !one.classList.contains('mk-running'); }}"
        self.page.wait_for_function(script, arg=found, timeout=30_000)

    def told(self) -> dict:
        """What Python has."""
        cell = self.page.locator(".jp-CodeCell").nth(LAST)
        number = cell.locator(".jp-InputArea-prompt").first
        before = number.inner_text()
        cell.locator(".jp-InputArea-editor").click()
        self.page.keyboard.press("Control+Enter")
        ran = "([one, before]) => one.innerText !== before && !one.innerText.includes('*')"
        self.page.wait_for_function(ran, arg=[number.element_handle(), before], timeout=30_000)
        out = cell.locator(".jp-OutputArea-output pre")
        return ast.literal_eval(out.inner_text().split("SEEN ", 1)[1].strip())


def test_every_action_by_keyboard(tmp_path):
    notebook = written(tmp_path / "views.ipynb", MADE, *VIEWS, TOLD)
    with served(tmp_path) as address, opened(address, notebook.name, 1500, 1200) as lab:
        lab.run_all()
        lab.wait_done(timeout=240)
        page, views = lab.page, Views(lab)
        cells = page.locator(".jp-Cell").count()
        ranked = views.told()["ranked"]

        # Attention: move, choose, lock, edit, scale, patch, undo; menus by their own keys.
        views.keys(0, ".mk-grid", "Home", "PageUp", "ArrowRight", "ArrowDown", " ", "]", "]", "a")
        views.until(0, ".mk-result", "text.includes('→')")
        assert views.text(0, ".mk-caption").startswith("Head 1.1")
        views.keys(0, ".mk-grid", "Escape", "ArrowRight", "-", "-")
        views.until(0, ".mk-edits", "text.includes('1.2 × 0.50')")
        views.keys(0, ".mk-grid", "ArrowRight", "p")
        views.until(0, ".mk-edits", "text.includes('1.3 from the other prompt')")
        told = views.told()
        assert told["edits"] == [("1.1", "ablate", None), ("1.2", "scale", 0.5), ("1.3", "patch", None)]
        assert (told["heads"], told["token"]) == ([], -1)
        views.keys(0, ".mk-grid", "u", " ", "]")
        views.until(0, ".mk-edits", "!text.includes('1.3')")
        views.keys(0, ".mk-choices select[aria-label=map]", "ArrowDown", "ArrowDown")
        views.keys(0, ".mk-choices select[aria-label=layers]", "ArrowDown", "ArrowDown")
        views.keys(0, ".mk-choices select[aria-label=heads]", "ArrowDown")
        views.keys(0, ".mk-choices select[aria-label=order]", "ArrowDown")
        views.keys(0, ".mk-actions input[type=range]", "End")
        views.until(0, ".mk-edits", "text.includes('1.3 × 2.00')")
        told = views.told()
        assert (told["map"], told["layer"], told["column"], told["order"]) == ("difference", 1, 0, "score")
        assert (told["heads"], told["token"]) == (["1.3"], 0)
        views.keys(0, ".mk-grid", "0")
        views.until(0, ".mk-edits", "text === ''")

        # Scores: by rank, by arrows, choose.
        views.keys(1, ".mk-map", "[", "[", "]", " ", "]", " ")
        told = views.told()
        assert told["scores"] == ranked[1:3]
        views.keys(1, ".mk-map", "Home", "PageUp")
        assert views.told()["site"] == "0.0"
        views.keys(1, ".mk-map", "Escape")
        assert views.told()["scores"] == []

        # Circuit: lines, cuts, size, groups.
        views.keys(2, ".mk-map", "]", "x")
        views.until(2, ".mk-result", "text.includes('→')")
        told = views.told()
        assert len(told["cuts"]) >= 1
        assert all("->" in one for one in told["cuts"])
        views.keys(2, ".mk-map", "x", "Escape", "x")
        views.until(2, ".mk-edits", f"text.startsWith('{ranked[0]} cut')")
        assert views.told()["cuts"] == [ranked[0]]
        views.keys(2, ".mk-map", "u", "-", "-")
        views.until(2, ".mk-actions output", "text === '3 of 5'")
        views.keys(2, ".mk-actions input[type=range]", "ArrowRight")
        views.until(2, ".mk-actions output", "text === '4 of 5'")
        views.keys(2, ".mk-map", " ", "ArrowDown", " ")
        chosen = views.text(2, ".mk-caption").split("Chosen: ")[1].rstrip(".").split()
        assert len(chosen) == 2
        views.keys(2, ".mk-name", *"both", "Enter")
        told = views.told()
        assert told["groups"] == [{"name": "both", "sites": chosen}]
        assert (told["size"], told["cuts"]) == (4, [])
        assert views.text(2, ".mk-caption").startswith("both (")
        views.keys(2, ".mk-map", "g", "Escape")
        assert views.told()["groups"] == []

        # Tokens: move, lock.
        views.keys(3, ".mk-word", "ArrowRight", "ArrowRight", " ")
        assert views.told()["word"] == 2
        assert "שלום" in views.text(3, ".mk-caption")

        # The explorer: what is done in one view is done in the others.
        views.keys(4, ".mk-scores .mk-map", "[", "]", " ")
        told = views.told()
        assert told["focus"] == [ranked[1]] * 2
        assert told["linked"] == [[ranked[1]]] * 3
        views.keys(4, ".mk-attention .mk-grid", "Escape")
        assert views.told()["linked"] == [[]] * 3

        assert page.locator(".jp-Cell").count() == cells  # keys of the notebook made or cut none
        assert not lab.away
        assert not lab.wrong
        saved = lab.saved(notebook, cell=LAST)
        for cell in saved["cells"][:LAST]:
            data = next(one["data"] for one in cell["outputs"] if "data" in one)
            assert {"image/png", "text/plain"} <= {*data}
        (tmp_path / "again.ipynb").write_text(json.dumps({**saved, "metadata": {}}))  # no kernel, and not trusted
        lab.go("again.ipynb")
        for number in range(LAST):
            cell = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell").nth(number)
            scrolled_to(cell)
            cell.locator(".jp-OutputArea-output img").wait_for(timeout=60_000)
