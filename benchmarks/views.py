"""Exported attention views in a browser, beside CircuitsVis: ``python -m benchmarks.views``.

Random causal patterns, no model: pages as ``view.to_html`` writes them, and what CircuitsVis gives a notebook that has
no network, its bundle in the page. All are opened from disk in one headless Chromium that draws in software and has no
network. How each number is taken:

1. size: the page's bytes.
2. opened: from the beginning of navigation until painted. Painted: every canvas has ink (those of the grid and of the
   large map; of CircuitsVis, every head's and the large one's), and two more frames have begun.
3. drawn: the same end, from the call that renders: the page's data is there, and scripts are evaluated.
4. over the grid, over the map, a key: the pointer moves over the grid from head to head, or over the large map from row
   to row, or an arrow key moves the focus. From the event's own time stamp until the page has made the next frame, and
   those right after it that come late (more than two frames of 60 Hz apart); the median of 30, and the worst.

A frame counts once its script, style and layout are done. CircuitsVis shows a head large when the pointer is over its
thumbnail; mechkit tells its name then, and shows it large by a key or a click.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from mechkit.view.attention_view import AttentionMap, AttentionView
from tests.browser.lab import CHROMIUM

from .measure import machine

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page  # pyright: ignore[reportMissingImports]

SIZES = ((1, 12, 64), (30, 9, 64), (32, 32, 128))  # layers, heads of each, tokens
SAMPLES = 30
PATIENCE = 120_000  # ms
HEAD = (
    "| page | heads × tokens | size, MB | opened, s | drawn, s | over the grid, ms | over the map, ms | a key, ms |\n"
    "|---|---|---|---|---|---|---|---|"
)
CLOCK = """
const begun = () => new Promise((done) => requestAnimationFrame(done));
const made = async () => {
  await begun();
  const { port1, port2 } = new MessageChannel();
  const over = new Promise((done) => (port1.onmessage = () => done(performance.now())));
  port2.postMessage(null);
  return over;
};
const inked = ({ width, height }, context) =>
  width > 0 && height > 0 && context.getImageData(0, 0, width, height).data.some((byte) => byte > 0);
globalThis.painted = async (selector, count, patience) => {
  const done = new Set();
  while (done.size < count) {
    await begun();
    if (performance.now() > patience) throw Error(`${done.size} of ${count} canvases are painted`);
    for (const one of document.querySelectorAll(selector)) {
      if (!done.has(one) && inked(one, one.getContext("2d"))) done.add(one);
    }
  }
  await begun();
  await begun();
  const now = performance.now();
  return [now, now - performance.getEntriesByName("render")[0].startTime];
};
globalThis.arm = (type, patience) => {
  globalThis.took = new Promise((done, failed) => {
    setTimeout(() => failed(Error(`no ${type}`)), patience);
    addEventListener(type, async ({ timeStamp }) => {
      let [last, end] = [0, 0];
      for (let calm = -1; calm < 2; ) {
        const now = await made();
        if (calm < 0 || now - last > 34) end = now;
        calm = calm >= 0 && now - last > 34 ? 0 : calm + 1;
        last = now;
      }
      done(end - timeStamp);
    }, { capture: true, once: true });
  });
};
"""


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.views", description=__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each event (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    rows = []
    with chromium() as browser:
        about = {"machine": machine(), "browser": f"Chromium {browser.version}, headless, software rendering"}
        print(f"{about}\n\n{HEAD}", flush=True)
        for layers, heads, tokens in SIZES:
            rows.append(measured(browser, ours(patterns(layers, heads, tokens)), options.samples))
            print(line(rows[-1]), flush=True)
        rows.append(measured(browser, circuitsvis(patterns(*SIZES[0])), options.samples))
        print(line(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def patterns(layers: int, heads: int, tokens: int) -> np.ndarray:
    """Random causal attention ``[layers, heads, query, key]``."""
    drawn = np.exp(np.random.default_rng(0).normal(size=(layers, heads, tokens, tokens)).astype(np.float32))
    causal = np.tril(drawn)
    return causal / causal.sum(-1, keepdims=True)


def ours(values: np.ndarray) -> dict[str, Any]:
    """The page of an attention view, and where its parts are."""
    view = AttentionView("Random attention", _words(values), [AttentionMap("pattern", values)])
    return {
        "name": "mechkit",
        "shape": values.shape,
        "html": _marked(str(view.to_html()), "modules[one.code].default.render("),
        "canvases": (".mk-grid canvas:not(.mk-marks), .mk-large canvas", 2),
        "grid": ".mk-grid",
        "map": ".mk-large canvas",
        "keys": ".mk-grid",
    }


def circuitsvis(values: np.ndarray) -> dict[str, Any]:
    """The same of CircuitsVis, for one layer of heads; it asks for the network when it is shown."""
    from circuitsvis.attention import attention_heads
    from circuitsvis.utils import render

    with mock.patch.object(render, "internet_on", return_value=False):
        shown = attention_heads(attention=values[0], tokens=_words(values))._repr_html_()
    head = "<!doctype html><html><head><meta charset='utf-8'></head><body>"
    return {
        "name": "CircuitsVis",
        "shape": values.shape,
        "html": _marked(f"{head}{shown}</body></html>", "CircuitsVis.render(\n"),
        "canvases": ("canvas", values.shape[1] + 1),
        "grid": [f"canvas >> nth={head}" for head in range(values.shape[1])],
        "map": "canvas >> nth=-1",
        "keys": None,
    }


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a network or a GPU."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def measured(browser: Browser, of: dict[str, Any], samples: int) -> dict[str, Any]:
    """One page's numbers: megabytes, seconds, and milliseconds of each event."""
    layers, heads, tokens, _ = of["shape"]
    page = browser.new_page(viewport={"width": 1500, "height": 1000}, offline=True)
    page.set_default_timeout(PATIENCE)
    page.add_init_script(CLOCK)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "page.html"
            path.write_text(of["html"], encoding="utf-8")
            page.goto(path.as_uri(), wait_until="commit")
            opened, drawn = page.evaluate("of => painted(...of)", [*of["canvases"], PATIENCE])
        draw = np.random.default_rng(1)
        to_heads = _over(page, of["grid"], draw)
        to_map = _over(page, of["map"], draw)
        return {
            "name": of["name"],
            "heads": layers * heads,
            "tokens": tokens,
            "bytes": len(of["html"].encode()),
            "opened_s": opened / 1000,
            "drawn_s": drawn / 1000,
            "grid_ms": _events(page, "pointermove", to_heads, samples),
            "map_ms": _events(page, "pointermove", to_map, samples),
            "key_ms": None if of["keys"] is None else _events(page, "keydown", _keys(page, of["keys"]), samples),
        }
    finally:
        page.close()


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def told(times: Sequence[float] | None) -> str:
        return "–" if times is None else f"{statistics.median(times):.0f} ({max(times):.0f})"

    events = " | ".join(told(row[name]) for name in ("grid_ms", "map_ms", "key_ms"))
    times = f"{row['bytes'] / 1e6:.2f} | {row['opened_s']:.2f} | {row['drawn_s']:.2f}"
    return f"| {row['name']} | {row['heads']} × {row['tokens']} | {times} | {events} |"


def _words(values: np.ndarray) -> list[str]:
    return [f"t{i}" for i in range(values.shape[-1])]


def _marked(html: str, call: str) -> str:
    """The page, with a mark set right before it renders."""
    before, found, after = html.rpartition(call)
    if not found:
        raise ValueError(f"the page does not call {call!r}")
    return f'{before}performance.mark("render"); {found}{after}'


def _events(page: Page, kind: str, act: Callable[[int], None], samples: int) -> list[float]:
    """Milliseconds until the frame after each event; the first event is to warm up."""
    times = []
    for i in range(samples + 1):
        page.evaluate("of => arm(...of)", [kind, PATIENCE])
        act(i)
        times.append(page.evaluate("took"))
    return times[1:]


def _over(page: Page, where: str | list[str], draw: np.random.Generator) -> Callable[[int], None]:
    """Moves the pointer over an element, or from one to the next of several, as far as it is in sight."""
    sight = page.viewport_size or {"width": 0, "height": 0}

    def move(i: int) -> None:
        at: Locator = page.locator(where if isinstance(where, str) else where[i % len(where)]).first
        box = at.bounding_box()
        assert box is not None
        right, low = min(sight["width"], box["x"] + box["width"]), min(sight["height"], box["y"] + box["height"])
        page.mouse.move(draw.uniform(box["x"] + 4, right - 4), draw.uniform(box["y"] + 4, low - 4))

    return move


def _keys(page: Page, where: str) -> Callable[[int], None]:
    """Arrow keys, to and fro."""
    page.focus(where)
    return lambda i: page.keyboard.press("ArrowLeft" if i % 2 else "ArrowRight")


if __name__ == "__main__":
    main()
