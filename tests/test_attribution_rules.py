"""Edge attribution of grouped queries, and by the rules of AtP* and RelP: against literal forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import plain, tiny, tiny_task
from reference import attribution as literal
from reference.relevance import by_relevance
from test_attribution import GROUPED, IN_SINGLE, check, every_family, exact, gap_of, measure, without_groups

import mechkit as mk
from mechkit.errors import UnsupportedError
from mechkit.patching.edges import edges

# -- grouped queries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("correction", [None, "atp*"])
def test_query_heads_of_a_group_sum_to_the_group(family, correction):
    if correction and family == "olmo2":
        return  # refused: see below
    model, task = tiny(family), tiny_task(n=2)
    apart = edges(model, task, ungroup=True, correction=correction, progress=False)
    whole = edges(model, task, correction=correction, progress=False)
    assert len(apart) > len(whole)
    total = np.zeros(whole.graph.exists.shape)
    for j, target in enumerate(apart.graph.targets):
        total[:, whole.graph.target_index[model.info.shared(target)]] += np.nan_to_num(apart.matrix()[:, j])
    np.testing.assert_allclose(total, np.nan_to_num(whole.matrix()), atol=1e-5 * max(1.0, np.nanmax(np.abs(total))))


@pytest.mark.parametrize("correction", [None, "atp*"])
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_ungrouped_scores_are_those_of_a_model_without_groups(method, correction):
    if correction and method != "eap":
        return
    task, copied = tiny_task(n=3), without_groups()
    separate = mk.load((copied, None), device="cpu")
    assert not separate.info.grouped
    here = edges(tiny("llama"), task, method, ungroup=True, correction=correction, progress=False)
    there = edges(separate, task, method, correction=correction, progress=False)
    assert list(here.frame["target"]) == list(there.frame["target"])
    np.testing.assert_allclose(here.frame["score"], there.frame["score"], atol=1e-5)


# -- AtP* -------------------------------------------------------------------------------------------------------------


@every_family
def test_corrected_scores_are_those_of_one_run_an_edge(family):
    task, hub = tiny_task(n=2, length=7), exact(family)
    if family == "olmo2":
        with pytest.raises(UnsupportedError, match="one norm over the queries of all heads"):
            edges(tiny(family), task, correction="atp*", progress=False)
        return
    expected = literal.edge_scores(hub, task.clean, task.corrupt, measure(task), patterns=True)
    found = edges(tiny(family), task, correction="atp*", progress=False)
    check(found, expected, gap_of(hub, task, measure(task)))


def test_the_correction_sees_what_a_saturated_softmax_hides():
    model = mk.load((plain("gpt2"), None), device="cpu")
    with torch.no_grad():
        for block in model.hf.transformer.h:
            block.attn.c_attn.weight[:, :64] *= 60  # queries and keys: every pattern is all or nothing
    task = tiny_task(n=4)
    into = [target.kind in ("q", "k") for target in model.graph().targets]
    plainly, corrected = (
        np.nan_to_num(edges(model, task, correction=correction, progress=False).matrix())[:, into]
        for correction in (None, "atp*")
    )
    assert np.abs(corrected).sum() > 3 * np.abs(plainly).sum()


# -- RelP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["eap", "eap-ig"])
def test_relevance_is_that_of_rules_written_into_the_model(family, method):
    task, hub = tiny_task(n=3), by_relevance(exact(family))
    torch.testing.assert_close(hub(task.clean).logits, exact(family)(task.clean).logits, atol=1e-5, rtol=0)
    points = None if method == "eap" else literal.between_inputs(hub, task.clean, task.corrupt, 2)
    expected = literal.edge_scores(hub, task.clean, task.corrupt, measure(task), points)
    found = edges(tiny(family), task, method, steps=2, gradients="relp", progress=False)
    check(found, expected, gap_of(hub, task, measure(task)))
    ordinary = edges(tiny(family), task, method, steps=2, progress=False)
    assert np.nanmax(np.abs(found.matrix() - ordinary.matrix())) > 1e-2


@every_family
def test_relevance_keeps_every_value_or_is_refused(family):
    model, task = tiny(family), tiny_task(n=2)
    if family in IN_SINGLE:
        with pytest.raises(UnsupportedError, match=r"activations|products"):
            edges(model, task, gradients="relp", progress=False)
        return
    found, ordinary = (edges(model, task, gradients=how, progress=False) for how in ("relp", "plain"))
    for end in ("base_metric", "source_metric"):
        assert found.meta["options"][end] == pytest.approx(ordinary.meta["options"][end], abs=1e-5)
