"""Path patching equals its definition: two whole forward passes a sender, with every other head held by a hook."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny, tiny_task, untouched
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference.paths import path_patch as literal

import mechkit as mk
from mechkit.errors import MetricError, OptionError, SiteError

TOLERANCE = 1e-4
SENDERS = "heads mlps embed"
RECEIVERS = (
    "logits",
    "1.1.q 2.3.q",
    "2.0.k",
    "1.2.v 2.1.k 2.1.q",
    "2.2.pattern",
    "1.3 2.0",
    "m1 2.0.q",
    "m2 1.0.pattern 2.0.v",
)
every_family = pytest.mark.parametrize("family", FAMILIES)


def parts(model: mk.Model, receivers: str) -> list[tuple]:
    found = [model.info.shared(one) for one in mk.sites.sites(receivers)]
    last = ("resid", model.n_layers, None)
    return [last if one.kind == "logits" else (one.kind, one.layer, one.head) for one in found]


def part(sender: str) -> tuple:
    one = mk.site(sender)
    return one.kind, max(one.layer, 0), one.head


def expected(family, task, sender, receivers, through_mlps, where=slice(None), known=None, direction="noise"):
    runs = (task.clean, task.corrupt) if direction == "noise" else (task.corrupt, task.clean)
    to = parts(tiny(family), receivers)
    logits = literal(untouched(family), *runs, part(sender), to, through_mlps, where, known)
    return float(mk.metrics.logit_diff(logits, task).mean())


@every_family
@pytest.mark.parametrize("through_mlps", [True, False])
def test_every_sender_to_every_kind_of_receiver_equals_the_definition(family, through_mlps):
    model, task, known = tiny(family), tiny_task(n=2), {}
    for receivers in RECEIVERS:
        frame = mk.path_patch(model, task, receivers, SENDERS, through_mlps, progress=False).frame
        assert set(frame.sender) >= {"embed", "0.0", "m0"}
        for row in frame.itertuples():
            value = expected(family, task, row.sender, receivers, through_mlps, known=known)
            assert row.metric == pytest.approx(value, abs=TOLERANCE), (row.sender, receivers)


@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(
    family=st.sampled_from(FAMILIES),
    sender=st.sampled_from(["0.1", "1.2", "m0", "m1", "embed"]),
    receivers=st.sampled_from(["logits", "2.1.q", "2.0.k 2.3.v", "2.2", "2.1.pattern 2.0.q", "m2"]),
    position=st.integers(0, 8),
    first=st.integers(0, 8),
    seed=st.integers(0, 1000),
    through_mlps=st.booleans(),
    direction=st.sampled_from(["denoise", "noise"]),
)
def test_one_sender_at_one_position_equals_the_definition(
    family, sender, receivers, position, first, seed, through_mlps, direction
):
    model, task = tiny(family), tiny_task(n=2, seed=seed, first=first)
    frame = mk.path_patch(model, task, receivers, sender, through_mlps, position, direction, progress=False).frame
    value = expected(family, task, sender, receivers, through_mlps, position, direction=direction)
    assert frame.metric[0] == pytest.approx(value, abs=TOLERANCE)
    assert frame.position[0] == position


@every_family
@pytest.mark.parametrize("through_mlps", [True, False])
def test_each_receiver_by_itself_is_a_call_for_each(family, through_mlps):
    model, task = tiny(family), tiny_task(n=2)
    receivers = "1.1.q 2.3.q 2.0.k m1 2.2.pattern 1.0"
    options = {"senders": SENDERS, "through_mlps": through_mlps, "progress": False}
    frame = mk.path_patch(model, task, receivers, each=True, **options).frame
    assert not frame.duplicated(["sender", "receiver"]).any()
    for receiver, rows in frame.groupby("receiver"):
        alone = mk.path_patch(model, task, str(receiver), **options).frame.set_index("sender")
        assert set(rows.sender) == set(alone.index)
        for row in rows.itertuples():
            assert row.metric == pytest.approx(alone.metric[row.sender], abs=TOLERANCE), (row.sender, receiver)


@every_family
def test_prompts_of_several_lengths_and_every_position(family):
    model = tiny(family)
    tasks = [tiny_task(n=2, length=9, seed=3), tiny_task(n=3, length=7, seed=4, first=1)]
    for receivers in ("logits", "2.1.q 2.0.v"):
        frame = mk.path_patch(model, tasks, receivers, "0.1 m1", positions="each", progress=False).frame
        for row in frame.itertuples():
            position, total = int(row.position), 0.0
            for task in tasks:
                if position < task.clean.shape[1]:
                    total += expected(family, task, row.sender, receivers, True, position) * len(task)
                else:
                    total += float(mk.metrics.logit_diff(model.run(task.clean).logits, task).sum())
            assert row.metric == pytest.approx(total / 5, abs=TOLERANCE)


@every_family
def test_the_embedding_with_every_path_open_is_the_source_run(family):
    """With one block there is nothing to hold between the embedding and the block's own heads."""
    model, task = tiny(family), tiny_task(n=2)
    heads = " ".join(f"0.{head}.q 0.{head}.k 0.{head}.v" for head in range(model.n_heads))
    run = model.run(task.corrupt, record=[f"0.{head}.{kind}" for head in range(model.n_heads) for kind in "qkv"])
    values = {one: run[one] for one in dict.fromkeys(model.info.shared(site) for site in mk.sites.sites(heads))}
    patched = model.run(task.clean, edits=[mk.patch_in(list(values), values)])
    frame = mk.path_patch(model, task, heads, "embed", progress=False).frame
    metric = float(mk.metrics.logit_diff(patched.logits, task).mean())
    assert frame.metric[0] == pytest.approx(metric, abs=TOLERANCE)


def test_a_stopped_sweep_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    from mechkit.backends.replay import LensReplay

    model, task = tiny("llama"), tiny_task()
    monkeypatch.setattr(LensReplay, "rows", lambda *_, **__: 8)  # several batches
    for options in ({"receivers": "logits"}, {"receivers": "2.1.q 2.0.k", "each": True}):
        path = tmp_path / f"{options['receivers'][:3]}.npz"
        whole = mk.path_patch(model, task, positions="each", progress=False, **options).frame
        own, calls = LensReplay.via, []

        def stopping(self, *args, own=own, calls=calls):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return own(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(LensReplay, "via", stopping)
            with pytest.raises(KeyboardInterrupt) as stopped:
                mk.path_patch(model, task, positions="each", progress=False, checkpoint=path, **options)
        assert 0 < len(stopped.value.scores) < len(whole)
        again = mk.path_patch(model, task, positions="each", progress=False, checkpoint=path, **options).frame
        torch.testing.assert_close(torch.tensor(again.score), torch.tensor(whole.score), atol=0, rtol=0)


@pytest.mark.parametrize("metric", ["prob", "loss", "kl"])
def test_metrics_of_the_whole_vocabulary(metric):
    model, task = tiny("qwen2"), tiny_task().with_metric(metric)
    clean = model.run(task.clean).logits
    for receivers in ("logits", "2.1.q"):
        frame = mk.path_patch(model, task, receivers, "1.0 m0", progress=False).frame
        for row in frame.itertuples():
            runs = (task.clean, task.corrupt)
            logits = literal(untouched("qwen2"), *runs, part(row.sender), parts(model, receivers), True)
            measure = getattr(mk.metrics, metric)
            values = measure(logits, task, clean) if metric == "kl" else measure(logits, task)
            assert row.metric == pytest.approx(float(values.mean()), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "kind", "names"),
    [
        ({"receivers": ""}, SiteError, "No receivers"),
        ({"receivers": "9.0.q"}, SiteError, "9.0.q"),
        ({"receivers": "0.9.q"}, SiteError, "0.9.q"),
        ({"receivers": "resid.1"}, SiteError, "resid.1"),
        ({"receivers": "1.0.scores"}, SiteError, "scores"),
        ({"receivers": "1.0.result"}, SiteError, "result"),
        ({"receivers": "logits 1.0.q"}, OptionError, "logits together"),
        ({"senders": "1.0.q"}, SiteError, r"1\.0\.q as senders"),
        ({"senders": "resid.0"}, SiteError, "resid.0"),
        ({"senders": "9.9"}, SiteError, "9.9"),
        ({"receivers": "1.0.q", "senders": "2.1"}, SiteError, '"2.1" comes before none'),
        ({"receivers": "1.0.q", "senders": "1.1"}, SiteError, '"1.1" comes before none'),
        ({"receivers": "1.0.q", "senders": "0.1 1.1"}, SiteError, '"1.1" comes before none'),
        ({"receivers": "0.0.q", "senders": "heads"}, SiteError, "comes before none"),
        ({"receivers": "m1", "senders": "m1"}, SiteError, "comes before none"),
        ({"direction": "up"}, OptionError, "up"),
        ({"positions": 99}, OptionError, "99"),
    ],
)
def test_bad_input_is_named(options, kind, names):
    with pytest.raises(kind, match=names):
        mk.path_patch(tiny("llama"), tiny_task(), progress=False, **options)


def test_a_metric_without_a_gap_is_refused():
    flat = tiny_task().with_metric(lambda logits, task: torch.zeros(len(task)))
    with pytest.raises(MetricError, match="alike"):
        mk.path_patch(tiny("llama"), flat, progress=False)


def test_a_family_whose_parts_are_not_what_they_are_taken_to_be_is_refused(monkeypatch):
    from families import plain

    from mechkit.backends.branches import Branches
    from mechkit.errors import UnsupportedError

    monkeypatch.setattr(Branches, "norm", lambda self, layer, stream: stream * 1.1)
    with pytest.raises(UnsupportedError, match="is not what mechkit takes it to be"):
        mk.path_patch(mk.load((plain("llama"), None), device="cpu"), tiny_task(), progress=False)
