"""JupyterLab on loopback, with a notebook in Chromium: for tests of live views.

1. ``written`` makes a notebook of cells; ``served`` runs a JupyterLab in its folder, and ends that process.
2. ``opened`` opens it in a browser, and notes every request that leaves the machine and every error of the page.
3. Cells are done when each has a number: JupyterLab's own model of the notebook is asked, as cells that are out of
   sight may not be in the page.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOCAL = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:", "file:", "about:")
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
_CELLS = "jupyterapp.shell.currentWidget.content.widgets.map(one => one.model).filter(one => one.type === 'code')"


def written(path: Path, *cells: str) -> Path:
    """A notebook with these cells of code; its kernel is named, or JupyterLab asks which one."""
    import nbformat

    made = [nbformat.v4.new_code_cell(one) for one in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": KERNEL}), path)
    return path


@contextmanager
def served(folder: Path, state: Path | None = None, **environment: str) -> Iterator[str]:
    """A JupyterLab in a folder; gives its address.

    Args:
        folder: what it shows.
        state: where its settings and workspaces go (default: in the folder).
        environment: more for it and for kernels.
    """
    state = state or folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"JUPYTER_CONFIG_DIR": str(state / "config"), "JUPYTER_DATA_DIR": str(state / "data"), **environment}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--expose-app-in-browser"]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, env={**os.environ, **own}, stdout=quiet, stderr=quiet)
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
        server.terminate()  # it ends its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:  # one of them does not answer; without a parent it ends too
            server.kill()
            server.wait(20)


@dataclass
class Opened:
    """A page of JupyterLab.

    Attributes:
        page: Playwright's.
        address: of the server.
        away: addresses that were asked for on other machines.
        wrong: errors of the page.
    """

    page: Page
    address: str
    away: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def go(self, name: str) -> None:
        """To a notebook, by its name in the folder."""
        self.page.goto(f"{self.address}/lab/tree/{name}")
        self.page.wait_for_selector(".jp-Notebook", timeout=90_000)

    def run_all(self) -> None:
        """Run every cell, once there is a kernel; does not wait until they are done."""
        self.page.wait_for_selector("text=Python 3 (ipykernel) | Idle", timeout=90_000)
        self.menu("Run", "Run All Cells")

    def run_cell(self, number: int) -> None:
        """Run one cell, from 0."""
        self.page.click(f".jp-CodeCell >> nth={number}")
        self.page.keyboard.press("Shift+Enter")

    def menu(self, *labels: str) -> None:
        """Choose from the menus."""
        self.page.click(f".lm-MenuBar-itemLabel >> text={labels[0]}")
        for label in labels[1:]:
            self.page.click(f".lm-Menu-itemLabel >> text={label}")

    def accept(self) -> None:
        """Say yes to what JupyterLab asks, or tells."""
        self.page.click(".jp-Dialog button.jp-mod-accept", timeout=20_000)

    def wait_done(self, first: int | None = None, timeout: float = 120) -> None:
        """Until the first so many cells, or all of them, have run since the notebook was opened (seconds)."""
        done = f"n => {{ const all = {_CELLS}.slice(0, n ?? undefined);"
        done += " return all.length > 0 && all.every(one => one.executionState === 'idle' && one.executionCount); }"
        self.page.wait_for_function(done, arg=first, timeout=1000 * timeout)

    def saved(self, path: Path, cell: int) -> dict:
        """Save, and give the notebook once that cell's outputs are on the disk."""
        self.page.keyboard.press("Control+s")
        for _ in range(100):
            notebook = json.loads(path.read_text())
            if notebook["cells"][cell].get("outputs"):
                return notebook
            time.sleep(0.1)
        raise AssertionError("the notebook was not saved with its outputs")


def scrolled_to(where: Any, tries: int = 5) -> None:
    """Bring what a locator finds into view; JupyterLab may make the cell anew in the middle of it."""
    from playwright.sync_api import Error

    for left in reversed(range(tries)):
        try:
            where.scroll_into_view_if_needed()
            return
        except Error as error:
            if not left or "not attached" not in str(error):
                raise


@contextmanager
def opened(address: str, name: str, width: int = 1500, height: int = 1000) -> Iterator[Opened]:
    """A notebook of a JupyterLab in Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            lab = Opened(page, address)
            page.on("request", lambda one: None if one.url.startswith(LOCAL) else lab.away.append(one.url))
            page.on("pageerror", lambda error: lab.wrong.append(str(error)))
            lab.go(name)
            yield lab
        finally:
            browser.close()
