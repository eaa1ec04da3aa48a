"""A model on a running NDIF gives what it gives here."""

from __future__ import annotations

import elsewhere
import pytest
from service import running, smollm2, tiny

import mechkit as mk

pytestmark = running


@pytest.mark.parametrize("check", elsewhere.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", elsewhere.FAMILIES)
def test_the_same_there_and_here(family, check):
    check(*tiny(family), elsewhere.TASK())


@pytest.mark.real_model
def test_the_default_model():
    far, own = smollm2()
    task = mk.tasks.ioi(own, n=2, seed=11)
    elsewhere.run(far, own, task)
    elsewhere.generate(far, own, task)
    for measure in (
        lambda model: mk.patch(model, task, "heads resid", progress=False),
        lambda model: mk.path_patch(model, task, progress=False),
        lambda model: mk.path_patch(model, task, "23.3.q", "mlps", progress=False),
        lambda model: mk.edges(model, task, progress=False),
        lambda model: mk.decompose(model, task, "23.3 29.1 m10", progress=False),
        lambda model: mk.svd(model, "23.3 24.4"),
    ):
        elsewhere.same(measure(far), measure(own))


@pytest.mark.real_model
def test_a_sweep_is_a_few_requests(monkeypatch):
    far, own = smollm2()
    sent = []
    ask = type(far.backend.line).ask
    monkeypatch.setattr(type(far.backend.line), "ask", lambda *given, **more: sent.append(1) or ask(*given, **more))
    scores = mk.patch(far, mk.tasks.ioi(own, n=16, seed=3), "heads", progress=False)
    assert len(scores) == 270
    assert len(sent) <= 3


@pytest.mark.real_model
def test_only_numbers_come_back(monkeypatch):
    far, own = smollm2()
    sizes = []
    ask = type(far.backend.line).ask

    def weighed(*given, **more):
        answer = ask(*given, **more)
        sizes.append(len(answer))
        return answer

    monkeypatch.setattr(type(far.backend.line), "ask", weighed)
    task = mk.tasks.ioi(own, n=16, seed=3)
    mk.patch(far, task, "mlps", progress=False)
    mk.edges(far, task, progress=False)  # two sums, of 8 bytes for each of its pairs of a source and a target
    assert sum(sizes[:1]) < 100_000
    assert max(sizes) < 3 * 8 * far.graph().exists.size
