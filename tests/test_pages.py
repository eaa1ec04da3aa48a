"""Exported pages in a real browser, from disk; and the JavaScript's pure functions under Node."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from importlib import import_module
from pathlib import Path

import pytest
import torch
from families import tiny

import mechkit as mk

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="there is no Node")
def test_pure_functions():
    done = subprocess.run(["node", "--test", "tests/js"], cwd=HERE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(NODE is None, reason="there is no Node")
@pytest.mark.parametrize("name", ["attention_view.AttentionView", "circuit_view.CircuitView", "scores_view.ScoresView",
                                  "tokens_view.TokensView"])  # fmt: skip
def test_what_a_host_loads_is_one_module(tmp_path, name):
    module, view = name.split(".")
    text = getattr(import_module(f"mechkit.view.{module}"), view)._esm
    path = tmp_path / "view.mjs"
    path.write_text(text)
    assert 'from "./' not in text
    done = subprocess.run([str(NODE), "--check", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def used(page: Path, size: str = "1200,900") -> dict:
    """What a reader saw who used the page, the network cut."""
    text = page.read_text()
    steps = (HERE / "browser" / "attention_steps.js").read_text()
    page.write_text(text.replace("</body>", f"<script>{steps}</script></body>"))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=15000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert found, done.stdout[:500] + done.stderr[-1500:]
    return json.loads(unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("size", ["1200,900", "500,900"])
def test_the_attention_page_works_from_disk(tmp_path, size):
    prompts = torch.tensor([[5, 9, 12, 30, 8], [7, 9, 40, 30, 8]])
    view = mk.view.attention(tiny("llama"), prompts[:1], prompts[1:])
    seen = used(view.to_html(tmp_path / "page.html"), size)
    assert seen["errors"] == []
    assert seen["title"] == view.about["title"]
    assert seen["words"] == ["5", "9", "12", "30", "8"]
    assert seen["gridColours"] > 20
    assert seen["largeColours"] > 5
    assert seen["first"].startswith("Head 0.0")
    assert seen["moved"].startswith("Head 1.1")
    assert "Chosen: 1.1" in seen["chosen"]
    assert "Chosen" not in seen["none"]
    assert seen["locked"] == 1
    assert seen["clicked"].startswith("Head 0.0")
    assert seen["map"] == "difference"
    assert seen["repainted"]
    assert seen["wide"]  # nothing sticks out at the side
