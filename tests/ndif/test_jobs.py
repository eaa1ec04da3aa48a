"""Work that is sent without waiting, and how a running NDIF says it is."""

from __future__ import annotations

import subprocess
import sys

import elsewhere
import pytest
from service import HOST, running, tiny

import mechkit as mk
from mechkit.errors import SiteError, TooLongError

pytestmark = [running, pytest.mark.usefixtures("up")]


@pytest.fixture(scope="module")
def up() -> None:
    """Work that nobody waits for is not sent again: the models must be up."""
    for family in ("llama", "neox"):
        tiny(family)[0].run(elsewhere.TASK().clean)


def test_a_job_is_picked_up_later():
    far, own = tiny("llama")
    job = mk.remote.submit(mk.patch, far, elsewhere.TASK(), "heads", progress=False)
    elsewhere.same(job.result(timeout=120), mk.patch(own, elsewhere.TASK(), "heads", progress=False))
    assert job.state == "completed"


def test_by_another_process(tmp_path):
    far, own = tiny("neox")
    job = mk.remote.submit(mk.path_patch, far, elsewhere.TASK(), "2.0.q", progress=False)
    text = f"""
import mechkit as mk
far = mk.load({far.source["model"]!r}, remote={HOST!r})
mk.remote.job({job.id!r}, far).result(timeout=120).save({str(tmp_path / "scores.csv")!r})
"""
    subprocess.run([sys.executable, "-c", text], check=True)
    ours = mk.Scores.load(tmp_path / "scores.csv")
    theirs = mk.path_patch(own, elsewhere.TASK(), "2.0.q", progress=False)
    assert ours.frame.score.to_numpy() == pytest.approx(theirs.frame.score.to_numpy(), abs=1e-4)


def test_what_went_wrong_with_it():
    far, _ = tiny("llama")
    with pytest.raises(SiteError):  # before it is sent
        mk.remote.submit(mk.patch, far, elsewhere.TASK(), "7.7")
    task = elsewhere.TASK().with_metric(lambda logits, task: 0 * logits[:, 0])
    job = mk.remote.submit(mk.patch, far, task, "heads", progress=False)
    with pytest.raises(mk.errors.MetricError, match="alike"):
        job.result(timeout=120)


def test_one_that_is_not_done_yet():
    def slow(logits, task):
        import time

        time.sleep(2)
        return logits[:, 0] - logits[:, 1]

    far, _ = tiny("llama")
    job = mk.remote.submit(mk.patch, far, elsewhere.TASK().with_metric(slow), "mlps", progress=False)
    with pytest.raises(TooLongError, match="It goes on"):
        job.result(timeout=0.1)
    assert len(job.result(timeout=120)) == 3


def test_status():
    far, _ = tiny("llama")
    far.run(elsewhere.TASK().clean)
    table = mk.remote.status(HOST)
    (row,) = table[table.model == far.source["model"]].to_dict("records")
    assert row["state"] == "running"
    assert row["replicas"] >= 1
    assert mk.remote.status(far, "nobody/nothing").state.tolist() == ["unknown"]
    assert mk.remote.status(far).equals(table)


def test_versions():
    table = mk.remote.versions(HOST).set_index("package")
    assert table.there["nnsight"].startswith("0.8")
    differing = table[~table.same]
    assert (differing.matters != "").all()
    assert (table[table.same].matters == "").all()
