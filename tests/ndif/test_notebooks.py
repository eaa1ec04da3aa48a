"""The notebooks, unchanged but for one argument, with the model on a running NDIF."""

from __future__ import annotations

from pathlib import Path

import pytest
from service import HOST, running

pytestmark = [running, pytest.mark.real_model]
ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted([*ROOT.glob("tutorials/*.py"), *ROOT.glob("notebooks/*.py")])
_LOAD = 'mk.load("smollm2-135m")'


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_argument_changed(notebook, tmp_path, monkeypatch):
    text = notebook.read_text()
    assert text.count(_LOAD) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)
    exec(compile(text.replace(_LOAD, f'mk.load("smollm2-135m", remote={HOST!r})'), notebook.name, "exec"), {})
