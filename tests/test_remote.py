"""Sent, read back and run on this machine: what a service would run gives what the model here gives."""

from __future__ import annotations

import functools
import pickle
import threading

import elsewhere
import pytest
import torch
from families import FAMILIES, tiny_task

import mechkit as mk
from mechkit.errors import LoadError, OptionError, ParcelError, SiteError, UnreachableError, UnsupportedError
from mechkit.remote import parcel


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    parent = tmp_path_factory.mktemp("models")

    @functools.cache
    def both(family: str) -> tuple[mk.Model, mk.Model]:
        place = elsewhere.folder(parent, family)
        return mk.load(place, remote="local"), mk.load(place, device="cpu")

    return both


@pytest.mark.parametrize("check", elsewhere.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", elsewhere.FAMILIES)
def test_the_same_here_and_there(models, family, check):
    check(*models(family), elsewhere.TASK())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(models, family):
    elsewhere.run(*models(family), elsewhere.TASK())
    ours, theirs = (mk.patch(one, elsewhere.TASK(), "heads", progress=False) for one in models(family))
    elsewhere.same(ours, theirs)


def test_a_metric_of_ones_own(models):
    shift = 3.0

    def mine(logits: torch.Tensor, task: mk.Task) -> torch.Tensor:
        return logits.gather(1, task.correct[:, None].to(logits.device))[:, 0] + shift

    task = elsewhere.TASK().with_metric(mine)
    ours, theirs = (mk.patch(one, task, "mlps", progress=False) for one in models("llama"))
    elsewhere.same(ours, theirs)


def test_a_metric_that_cannot_be_sent(models):
    lock = threading.Lock()
    task = elsewhere.TASK().with_metric(lambda logits, task: (logits[:, 0], lock)[0])
    with pytest.raises(ParcelError, match=r"cannot pickle '_thread.lock' object"):
        mk.patch(models("llama")[0], task, "mlps", progress=False)


def test_errors_of_mechkit_come_back_as_they_are(models):
    far, _ = models("llama")
    with pytest.raises(SiteError, match=r'"9\.9" is in layer 9'):
        mk.patch(far, elsewhere.TASK(), "9.9")
    with pytest.raises(mk.errors.MetricError, match="alike"):
        mk.patch(far, elsewhere.TASK().with_metric(lambda logits, task: 0 * logits[:, 0]), "mlps", progress=False)


def test_errors_of_others_keep_their_text(models):
    def broken(logits: torch.Tensor, task: mk.Task) -> torch.Tensor:
        raise ZeroDivisionError("my own mistake")

    with pytest.raises(mk.errors.ServerError, match=r"ZeroDivisionError: my own mistake") as caught:
        mk.patch(models("llama")[0], elsewhere.TASK().with_metric(broken), "mlps", progress=False)
    assert "in broken" in caught.value.server


def test_a_warning_comes_back(models):
    far, _ = models("llama")
    with pytest.warns(mk.MechkitWarning, match="share their keys"):
        far.run(elsewhere.TASK().clean, edits=[mk.ablate("1.1.k", mode="zero")])


def test_a_checkpoint_stays_here(models, tmp_path):
    far, own = models("llama")
    kept, task = tmp_path / "kept.npz", elsewhere.TASK()
    first = mk.patch(far, task, "heads", checkpoint=kept, progress=False)
    assert kept.is_file()
    elsewhere.same(mk.patch(own, task, "heads", checkpoint=kept, progress=False), first)  # one file, both ways
    with pytest.raises(mk.errors.StorageError, match="of another sweep"):
        mk.patch(far, task, "mlps", checkpoint=kept, progress=False)


def test_what_cannot_be_asked_from_here(models):
    far, _ = models("llama")
    with pytest.raises(UnsupportedError, match="which runs elsewhere"):
        far.backend.start(elsewhere.TASK().clean, 0)
    with pytest.raises(UnsupportedError, match="has no bridge underneath"):
        _ = far.bridge
    with pytest.raises(UnsupportedError, match="which runs elsewhere"):
        mk.edit_weights(far, mk.ablate("0.0", mode="zero"))
    with pytest.raises(OptionError, match="runs here"):
        mk.remote.submit(mk.patch, far, elsewhere.TASK())


def test_no_such_place(tmp_path):
    with pytest.raises(OptionError, match='remote = "ndif"'.replace('"', "'")):
        mk.load("smollm2-135m", remote="ndif")
    with pytest.raises(LoadError, match="made here"):
        mk.load((object(), None), remote="local")
    with pytest.raises(LoadError, match="No configuration"):
        mk.load(tmp_path, remote="local")


def test_nobody_answers(models, monkeypatch):
    monkeypatch.setattr("mechkit.remote.line._WAITS", (0.01,))
    place = models("llama")[1].source["path"]
    far = mk.load(place, remote="http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9 does not answer"):
        far.run(elsewhere.TASK().clean)
    with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9 does not answer"):
        mk.remote.status(far)


def test_the_key_is_nowhere(models, monkeypatch):
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", "a-secret-key")
    far, _ = models("gpt2")
    scores = mk.patch(far, tiny_task(n=2), "mlps", progress=False)
    assert "a-secret-key" not in repr(scores.meta) + repr(vars(far.backend.line)) + repr(far)
    assert b"a-secret-key" not in parcel.packed((scores, far.source))


def test_a_part_of_a_tensor_is_sent_without_the_rest():
    part = torch.zeros(1000, 1000)[3]
    assert len(parcel.packed(part)) < 10_000
    assert torch.equal(parcel.unpacked(parcel.packed(part), None), part)


def test_no_model_is_sent(models):
    far, own = models("llama")
    content = parcel.packed({"model": own, "task": elsewhere.TASK()})
    assert len(content) < 100_000
    assert parcel.unpacked(content, far)["model"] is far
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(content)


def test_one_line_says_how_far_it_is(monkeypatch, capsys):
    from types import SimpleNamespace

    from mechkit.remote import line

    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(line.time, "monotonic", lambda: float(next(clock)))
    with line._Display("http://host", "some-model", True, 100.0) as display:
        for status, text in (("QUEUED", "first"), ("LOG", "mechkit:progress 3 12 patching"), ("LOG", "from a metric")):
            display.update(SimpleNamespace(status=SimpleNamespace(value=status), description=text))
        assert (display._bar.n, display._bar.total) == (3, 12)
    shown = capsys.readouterr()
    assert "queued: first" in shown.err
    assert "running: patching 3 of 12" in shown.err
    assert "from a metric" in shown.out
    monkeypatch.setattr(line.time, "monotonic", lambda: 2000.0)
    with pytest.raises(mk.errors.TooLongError, match=r"Nothing was heard of some-model on http://host for 100 s"):
        display.refresh()
