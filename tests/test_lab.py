"""The attention view in JupyterLab, used by keyboard in a real browser: ``make browser``.

1. JupyterLab runs a notebook whose only cell shows the view of a tiny model.
2. Keys move over the heads and edit them; the table of next tokens must change, and Python must see the same edits.
3. Nothing may be asked of any other machine.
4. The saved notebook is opened again, untrusted and without its kernel: a picture must be there.
5. The kernel goes while an edit runs: what needs none must go on working, and the view must say so.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
from browser.lab import CHROMIUM, Opened, opened, served, written

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make browser")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: make browser")

CELL = f"""\
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, mechkit as mk
from families import tiny
prompts = torch.tensor([[5, 9, 12, 30, 8], [7, 9, 40, 30, 8]])
view = mk.view.attention(tiny("llama"), prompts[:1], prompts[1:])
view"""
ASKED = 'print("SEEN", [one["head"] for one in view.changes], view.selection, view.head)'
SLOW = """\
import os, time
view._run = lambda changes: time.sleep(120)
print("PID", os.getpid(), "END")"""


def test_used_by_keyboard_and_opened_again(tmp_path):
    notebook = written(tmp_path / "live.ipynb", CELL, ASKED)
    with served(tmp_path) as address, opened(address, notebook.name) as lab:
        page = lab.page
        lab.run_all()
        page.wait_for_selector(".mk-grid canvas", timeout=120_000)
        before = page.inner_text(".mk-result")
        page.focus(".mk-grid")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert page.inner_text(".mk-caption").startswith("Head 1.1")
        page.keyboard.press("a")
        changed = "before => document.querySelector('.mk-result').innerText !== before"
        page.wait_for_function(changed, arg=before, timeout=20_000)
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.keyboard.press("p")
        page.wait_for_function("() => document.querySelectorAll('.mk-edits li').length === 2", timeout=20_000)
        lab.run_cell(1)
        page.wait_for_selector("text=SEEN ['1.1', '2.1'] ['2.1'] 2.1", timeout=20_000)
        saved = lab.saved(notebook, cell=1)
        assert not lab.away
        assert not lab.wrong
        (shown,) = (one["data"] for one in saved["cells"][0]["outputs"])
        assert "image/png" in shown
        (tmp_path / "again.ipynb").write_text(json.dumps({**saved, "metadata": {}}))  # no kernel, and not trusted
        lab.go("again.ipynb")
        page.wait_for_selector(".jp-OutputArea-output img", timeout=60_000)


def _ends(lab: Opened, how: str) -> None:
    """End the kernel of the notebook."""
    if how == "killed":
        told = lab.page.inner_text(".jp-OutputArea-output >> text=/PID \\d+ END/")
        os.kill(int(re.findall(r"\d+", told)[0]), signal.SIGKILL)
        lab.accept()  # "appears to have died"; it restarts by itself
    elif how == "restarted":
        lab.menu("Kernel", "Restart Kernel…")
        lab.accept()
    else:
        lab.menu("Kernel", "Shut Down Kernel")
        lab.page.wait_for_function("() => !jupyterapp.shell.currentWidget.sessionContext.session", timeout=20_000)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("how", ["killed", "restarted", "shut down"])
def test_the_kernel_goes_while_an_edit_runs(tmp_path, how):
    notebook = written(tmp_path / "live.ipynb", CELL, SLOW)
    with served(tmp_path) as address, opened(address, notebook.name) as lab:
        page = lab.page
        lab.run_all()
        lab.wait_done()
        page.focus(".mk-grid")
        page.keyboard.press("a")
        page.wait_for_selector(".mk-result.mk-running", timeout=20_000)
        _ends(lab, how)
        page.focus(".mk-grid")
        for key, head in ("ArrowRight", "0.1"), ("ArrowDown", "1.1"), ("Home", "1.0"):
            page.keyboard.press(key)
            assert page.inner_text(".mk-caption").startswith(f"Head {head}")
        page.keyboard.press("a")
        assert not lab.wrong
        said = "() => /kernel/i.test(document.querySelector('.mk-result').dataset.told ?? '')"
        page.wait_for_function(said, timeout=10_000)
        if how != "shut down":  # amid a restart the server would not end
            page.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=30_000)
