"""The reproductions of papers as they stand in the repository: run, small, and each ends in its table.

``make papers`` runs them anew, which takes a while; here it is looked at what was written.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks" / "papers"
SOURCES = sorted(FOLDER.glob("*.py"))
COLUMNS = ("claim", "the paper reports", "this model shows", "control", "reproduced")
LARGEST = 500_000  # bytes


def notebook(source: Path) -> dict:
    return json.loads(source.with_suffix(".ipynb").read_text())


def test_there_are_enough_of_them():
    assert len(SOURCES) >= 16


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_is_run_and_small(source):
    import jupytext

    cells = notebook(source)["cells"]
    written = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == written, "make papers"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a picture"
    assert source.with_suffix(".ipynb").stat().st_size < LARGEST


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_ends_in_what_was_reported_and_what_is_shown(source):
    cells = notebook(source)["cells"]
    assert "".join(cells[0]["source"]).startswith("# ")
    assert "arXiv" in "".join(cells[0]["source"])
    last = [cell for cell in cells if cell["cell_type"] == "code"][-1]
    assert last["source"][-1].strip() == "summary"
    [html] = ["".join(one["data"]["text/html"]) for one in last["outputs"] if "text/html" in one.get("data", {})]
    for column in COLUMNS:
        assert f"<th>{column}</th>" in html, column
    assert html.count("<tr>") >= 2
    assert cells[-1]["cell_type"] == "markdown"


def test_every_one_is_in_the_list():
    text = (FOLDER / "README.md").read_text()
    assert [source.stem for source in SOURCES if f"({source.stem}.ipynb)" not in text] == []
