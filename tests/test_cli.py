"""The command: what it prints, what it writes, what it says when it cannot."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser

import pytest
import ready
import words

import mechkit as mk
from mechkit import cli
from mechkit.circuits.discover import METHODS, discover


@pytest.fixture
def small(monkeypatch) -> mk.Model:
    """Every model that is asked for is the tiny one."""
    model = words.model()  # made before the way to make it is replaced
    monkeypatch.setattr("mechkit.sources.load", lambda name, **_: model)
    return model


def _mechkit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mechkit.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


class _Outside(HTMLParser):
    """Collects everything a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        for name, value in attrs:
            linked = name in ("src", "href", "xlink:href", "srcset") and not (value or "").startswith(("#", "data:"))
            if linked or tag in ("script", "link", "iframe"):
                self.fetched.append(f"{tag} {value}")


def test_discover_writes_what_it_says(small, tmp_path, capsys):
    out = tmp_path / "runs" / "ioi"
    assert cli.main(["discover", "ioi", "--n", "16", "--controls", "3", "--size", "4", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["circuit.json", "report.html", "scores.parquet"]
    circuit = mk.Circuit.from_json(out / "circuit.json")
    assert 1 <= len(circuit) <= 4
    assert circuit.meta["task"]["n"] == 8
    assert len(mk.Scores.load(out / "scores.parquet")) == 8
    printed = capsys.readouterr().out
    assert all(str(node) in printed for node in circuit.nodes)
    assert "faithfulness" in printed
    assert "3 random sets" in printed


@pytest.mark.filterwarnings("ignore:.*not clearly above chance:mechkit.errors.MechkitWarning")  # of random weights
@pytest.mark.parametrize("name", cli.TASKS)
def test_every_ready_made_task_is_measured_by_its_own_metric(name, monkeypatch, tmp_path, capsys):
    model = words.model() if name == "ioi" else ready.model()
    monkeypatch.setattr("mechkit.sources.load", lambda *_, **__: model)
    if name == "capitals_conflict":  # of which random weights know none
        monkeypatch.setattr(mk.tasks, name, partial(mk.tasks.capitals_conflict, known=False))
    assert cli.main(["discover", name, "--n", "8", "--size", "2", "--controls", "1", "--out", str(tmp_path)]) == 0
    assert mk.Circuit.from_json(tmp_path / "circuit.json").meta["task"]["name"] == name
    task = getattr(mk.tasks, name)(model, n=8)
    rows = mk.metrics.answer_rows(model.run(task).logits, task)
    rows = rows.gather(1, task.answers) if task.metric.reads == "answers" else rows
    told = f"whole model: mean {task.metric.name} {task.metric(rows, task).mean():+.2f}"
    assert told in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", cli.METHODS)
def test_every_method_finds_what_it_finds_in_python(small, method, tmp_path, capsys):
    size = [] if method == "acdc" else ["--size", "3"]
    arguments = ["discover", "ioi", "--method", method, *size, "--n", "8", "--controls", "2", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    found_on = mk.tasks.ioi(small, n=8, seed=0).split(0.5, seed=0)[0]
    expected = discover(small, found_on, method, size=3 if size else None, progress=False)
    assert mk.Circuit.from_json(tmp_path / "circuit.json").nodes == expected.nodes
    assert len(mk.Scores.load(tmp_path / "scores.parquet")) == len(expected.scores)
    printed = capsys.readouterr().out
    assert all(str(node) in printed for node in expected.nodes)
    assert "nan" not in printed
    page = (tmp_path / "report.html").read_text()
    assert all(f"<td>{node}</td>" in page for node in expected.nodes)
    assert ("by itself is set" in page) == (method == "patch")
    assert (f"by the method {method}," in page) == (method != "patch")


def test_no_head_at_all_is_told(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("mechkit.circuits.discover.discover", partial(discover, threshold=1e9))
    assert cli.main(["discover", "ioi", "--method", "acdc", "--n", "8", "--out", str(tmp_path)]) == 2
    assert "acdc finds no head" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_command_knows_every_task_and_method():
    assert {*cli.TASKS} == {*mk.tasks.__all__} - {"Task", "known_capitals"}
    assert cli.METHODS == METHODS


def test_the_report_needs_nothing_else(small, tmp_path):
    cli.main(["discover", "ioi", "--n", "16", "--controls", "3", "--out", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    parser = _Outside()
    parser.feed(page)
    assert parser.fetched == []
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", page)
    circuit = mk.Circuit.from_json(tmp_path / "circuit.json")
    assert page.count("<figure>") == min(6, len(circuit.heads))
    for node in circuit.nodes:
        assert f"<td>{node}</td>" in page
    for claim in ("Map of the effect of every head", "random sets", "not found on", "What was run on what", "torch"):
        assert claim in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["discover", "ioi", "--n", "0"], "--n 0"),
        (["discover", "ioi", "--n", "1"], "--n 1"),
        (["discover", "ioi", "--n", "many"], "'many'"),
        (["discover", "ioi", "--n", "8", "--size", "0"], "size = 0"),
        (["discover", "ioi", "--method", "acdc", "--size", "5"], "size = 5 for 'acdc'"),
        (["discover", "ioi", "--method", "guessing"], "'guessing'"),
        (["discover", "nothing"], "'nothing'"),
        (["discover", "greater_than", "--n", "8"], "nouns are single tokens"),
        (["discover", "ioi", "--model", "./nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(arguments, says, tmp_path, capsys, request):
    if "--model" not in arguments:
        request.getfixturevalue("small")
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("mechkit: ")
    assert says in said
    assert "Traceback" not in said
    assert not any((tmp_path / "out").glob("*"))


def test_an_out_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("mechkit.sources.load", lambda *_, **__: pytest.fail("work was begun"))
    assert cli.main(["discover", "ioi", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "--out" in capsys.readouterr().err


def test_models_and_version_are_told():
    assert _mechkit("--version").stdout.strip() == f"mechkit {mk.__version__}"
    told = _mechkit("models").stdout
    assert "smollm2-135m" in told
    assert "MECHKIT_CACHE" in told


def test_help_and_import_load_nothing_heavy():
    heavy = "import sys; print([m for m in ('torch', 'transformers', 'pandas', 'numpy') if m in sys.modules])"
    for code in ("import mechkit", "import mechkit.cli; mechkit.cli._parser()"):
        done = subprocess.run([sys.executable, "-c", f"{code}; {heavy}"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
    started = time.perf_counter()
    assert "discover" in _mechkit("--help").stdout
    assert time.perf_counter() - started < 5  # a hang, not a benchmark


def test_every_public_name_is_there():
    for name in mk.__all__:
        assert getattr(mk, name) is not None
    assert set(mk.__all__) <= set(dir(mk))
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        mk.nothing_of_that_name  # noqa: B018
