"""Make the pictures of docs/pictures anew: ``python docs/pictures.py`` (needs ``make browser``'s packages, Chromium).

1. Views of SmolLM2-135M are exported as pages, and opened in Chromium with the network cut: each light and dark, on a
   desk and on a phone.
2. The explorer is run in JupyterLab, where a head is ablated and a line cut.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from browser.lab import CHROMIUM, opened, served, written  # noqa: E402

SIZES = {"desk": (1280, 800), "phone": (400, 800)}
CELL = """\
import mechkit as mk

model = mk.load("smollm2-135m")
explorer = mk.explore(model, mk.tasks.ioi(model, n=16, seed=0), progress=False)
explorer"""


def views() -> dict[str, Any]:
    """The views, by name."""
    import mechkit as mk

    model = mk.load("smollm2-135m")
    task = mk.tasks.ioi(model, n=16, seed=0)
    explorer = mk.explore(model, task, progress=False)
    explorer.selection = "23.3 20.0"
    explorer.circuit.group("read the name", "23.3 20.0")
    assert explorer.tokens is not None
    named = {"scores": explorer.scores, "attention": explorer.attention, "circuit": explorer.circuit}
    return {**named, "tokens": explorer.tokens, "explorer": explorer}


def photographed(browser: Any, page: Path, picture: Path, size: str, scheme: str) -> None:
    """A page as a picture, as long as it is."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True, device_scale_factor=1
    )
    shown = context.new_page()
    shown.goto(page.as_uri())
    shown.wait_for_selector(".mk-view canvas, .mk-word")
    shown.wait_for_timeout(400)
    shown.screenshot(path=picture, full_page=True)
    context.close()


def used(page: Page) -> None:
    """Ablate a head, and cut a line."""
    page.focus(".mk-attention .mk-grid")
    page.keyboard.press("a")
    page.wait_for_selector(".mk-attention .mk-edits li")
    page.focus(".mk-circuit .mk-map")
    page.keyboard.press("]")
    page.keyboard.press("x")
    page.wait_for_selector(".mk-circuit .mk-edits li")
    page.wait_for_function("() => !document.querySelector('.mk-running')", timeout=60_000)


def in_lab(picture: Path, act: Callable[[Page], None]) -> None:
    """The explorer in JupyterLab, after something was done with it."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = written(Path(folder) / "explorer.ipynb", CELL)
        with served(Path(folder)) as address, opened(address, notebook.name, 1400, 2150) as lab:
            lab.run_all()
            lab.wait_done(timeout=300)
            lab.page.wait_for_selector(".mk-circuit canvas")
            lab.page.add_style_tag(content=".Toastify { display: none }")  # JupyterLab's own questions
            act(lab.page)
            lab.page.wait_for_timeout(500)
            lab.page.locator(".jp-OutputArea").first.screenshot(path=picture)


def main() -> None:
    """Every picture."""
    out = HERE / "pictures"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, view in views().items():
            page = Path(folder) / f"{name}.html"
            view.to_html(page)
            for size in SIZES:
                for scheme in ("light", "dark"):
                    photographed(browser, page, out / f"{name}-{size}-{scheme}.png", size, scheme)
        browser.close()
    in_lab(out / "explorer-live.png", used)


if __name__ == "__main__":
    main()
