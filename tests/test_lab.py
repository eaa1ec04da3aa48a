"""The attention view in JupyterLab, used by keyboard in a real browser: ``make browser``.

1. JupyterLab runs a notebook whose only cell shows the view of a tiny model.
2. Keys move over the heads and edit them; the table of next tokens must change, and Python must see the same edits.
3. Nothing may be asked of any other machine.
4. The saved notebook is opened again, untrusted and without its kernel: a picture must be there.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make browser")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: make browser")

CELL = """\
import sys
sys.path.insert(0, {tests!r})
import torch, mechkit as mk
from families import tiny
prompts = torch.tensor([[5, 9, 12, 30, 8], [7, 9, 40, 30, 8]])
view = mk.view.attention(tiny("llama"), prompts[:1], prompts[1:])
view"""
ASKED = 'print("SEEN", [one["head"] for one in view.changes], view.selection, view.head)'


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab on loopback with one notebook; gives its address."""
    import nbformat

    cells = [nbformat.v4.new_code_cell(one) for one in (CELL.format(tests=str(Path(__file__).parent)), ASKED)]
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "live.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/lab", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        yield address
    finally:
        server.terminate()
        server.wait(20)


def _saved(path: Path) -> dict:
    """A notebook, once its outputs are on the disk."""
    for _ in range(100):
        notebook = json.loads(path.read_text())
        if notebook["cells"][1].get("outputs"):
            return notebook
        time.sleep(0.1)
    raise AssertionError("the notebook was not saved with its outputs")


def test_used_by_keyboard_and_opened_again(lab, tmp_path):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1500, "height": 1000})
            away, wrong = [], []
            local = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")
            page.on("request", lambda request: None if request.url.startswith(local) else away.append(request.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.goto(f"{lab}/lab/tree/live.ipynb")
            page.wait_for_selector(".jp-Notebook", timeout=90_000)
            page.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=90_000)
            page.click(".lm-MenuBar-itemLabel >> text=Run")
            page.click("text=Run All Cells")
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
            page.click(".jp-CodeCell >> nth=1")
            page.keyboard.press("Shift+Enter")
            page.wait_for_selector("text=SEEN ['1.1', '2.1'] ['2.1'] 2.1", timeout=20_000)
            page.keyboard.press("Control+s")
            saved = _saved(tmp_path / "live.ipynb")
            assert not away
            assert not wrong
            (shown,) = (one["data"] for one in saved["cells"][0]["outputs"])
            assert "image/png" in shown
            (tmp_path / "again.ipynb").write_text(json.dumps({**saved, "metadata": {}}))  # no kernel, and not trusted
            page.goto(f"{lab}/lab/tree/again.ipynb")
            page.wait_for_selector(".jp-OutputArea-output img", timeout=60_000)
        finally:
            browser.close()
