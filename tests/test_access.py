"""Exported pages under axe-core, in a real browser with the network cut, light and dark: ``make browser``.

Each view is opened as it was exported, and with the controls that it has beside a kernel; its lists are unfolded, a
token is locked and something chosen, so that what these colour is read too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from browser.lab import CHROMIUM
from families import tiny, tiny_task

import mechkit as mk

if TYPE_CHECKING:
    from mechkit.view.widget import LiveView

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: make browser")


def _circuit() -> mk.Circuit:
    scores = mk.patch(tiny("llama"), tiny_task(n=6), "heads", progress=False)
    return mk.Circuit(tuple(scores.ranked()[:5]), scores, scores.meta)


PROMPTS = torch.tensor([[5, 9, 12, 30, 8], [7, 9, 40, 30, 8]])
VIEWS: dict[str, Callable[[], LiveView]] = {
    "attention": lambda: mk.view.attention(tiny("llama"), PROMPTS[:1], PROMPTS[1:]),
    "scores": lambda: _circuit().node_scores.show(),
    "circuit": lambda: _circuit().show(tiny("llama"), tiny_task(n=6)),
    "tokens": lambda: mk.view.tokens(["one", "\n", " two"], [1.0, -0.5, 0.1]),
}
USED = """() => {
    for (const one of document.querySelectorAll("details")) one.open = true;
    const keyed = document.querySelector("[role=application][tabindex]");
    for (const key of ["ArrowRight", "Enter", "]", "]", "a"]) {
        keyed?.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    }
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        cut = "--host-resolver-rules=MAP * ~NOTFOUND"
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", cut])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("live", [False, True], ids=["exported", "live"])
@pytest.mark.parametrize("name", VIEWS)
def test_no_serious_violation(browser, tmp_path, name, live, scheme):
    view = VIEWS[name]()
    if live:
        view._for_page = lambda trait: getattr(view, trait)  # the page then has the controls, and no kernel
    page = browser.new_page(color_scheme=scheme, offline=True, viewport={"width": 1200, "height": 1000})
    try:
        page.goto(view.to_html(tmp_path / "page.html").as_uri())
        page.wait_for_selector(".mk-scored, canvas")
        page.wait_for_function("() => [...document.querySelectorAll('canvas')].every(one => one.width > 0)")
        page.evaluate(USED)
        found = axe.Axe().run(page).response["violations"]
    finally:
        page.close()
    told = [
        f"{one['id']} ({one['impact']}): {node['target']} {node['failureSummary']}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
    assert not told, "\n".join(told)
