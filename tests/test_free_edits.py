"""What of an edit can be fitted, its gradients, and the same edit at other sites."""

from __future__ import annotations

import pytest
import torch
from families import plain, tiny
from test_more_edits import FAMILIES, HEADS, POS, TOKENS, N, drawn, logits_of, some_families, vectors
from torch.testing import assert_close

import mechkit as mk
from mechkit import edits as e
from mechkit.backends.change import functions_of
from mechkit.backends.gradients import plain_tensors, without_parameters
from mechkit.backends.lens import local_backend
from mechkit.backends.window import Window
from mechkit.errors import EditError
from mechkit.head_scores.top_heads import top_heads


def fittable(model: mk.Model) -> list[e.Edit]:
    given = vectors(model, "0.1 1.2.q m1 resid.2")
    places = list(given)
    recorded = model.run(TOKENS, "1.2")["1.2"][0, -1]  # of a run without gradients
    return [
        e.steer(places),
        e.steer(places, given, 0.5),
        e.scale(places),
        e.scale(places, 1.5, positions=[2, -1]),
        e.scale("1.2.pattern 0.1.scores"),
        e.scale(places, given),
        e.inject("1.2", recorded),
        e.inject(places, given, dict.fromkeys(places, 0.3), positions=[-1]),
        e.inject(places, given, torch.full((1,), 0.3)),
        e.attend(HEADS, bias=0.5, keys=[0, 3]),
        e.attend("0.1 1.0", bias={"0.1": 0.5, "1.0": -1.0}, keys=0, outside=True),
        e.attend("1.2", bias=drawn(POS, POS)),
        e.transform("0.1 1.2", drawn(model.d_head, model.d_head)),
        e.transform("m1 resid.1", torch.eye(model.d_model), drawn(model.d_model)),
    ]


@pytest.mark.parametrize("family", [one for one in FAMILIES if one != "gpt-oss"])  # small steps choose other experts
def test_an_edit_is_differentiable_in_its_tensors(family):
    """The gradient along a direction is what a small step in that direction gives.

    In double precision but for the norms and softmaxes that some families take in float32.
    """
    dtype, step, off = torch.float64, 1e-3, 0.02
    model = mk.load((plain(family, dtype=dtype), None), device="cpu")
    backend, window = local_backend(model, "Gradients of"), Window(torch.full((N,), POS))
    out = drawn(N, POS, model.info.d_vocab).to(dtype)

    def measured(edits: list[e.Edit]) -> torch.Tensor:
        with backend.hooks(functions_of(edits, model.info, window)):
            return (backend.hf(input_ids=TOKENS, use_cache=False).logits * out).sum()

    # Others before and after it write to the same tensors.
    around = [mk.scale("0.1 m1 resid.2 1.2.q", 0.9), mk.attend("0.1 1.2", sharpen=0.8), e.redistribute("0.1", 0, None)]
    with plain_tensors(), torch.enable_grad(), without_parameters(backend.hf):
        for edit in fittable(model):
            tensors = [one.start.to(dtype).requires_grad_() for one in e.free(edit, model.info)]
            grads = torch.autograd.grad(measured([*around, e.with_tensors(edit, tensors), *around]), tensors)
            steps = [step * drawn(*one.shape, seed=i).to(dtype) for i, one in enumerate(tensors)]
            with torch.no_grad():
                less, more = (
                    float(measured([*around, e.with_tensors(edit, at), *around]))
                    for at in ([t + sign * by for t, by in zip(tensors, steps, strict=True)] for sign in (-1, 1))
                )
            along = sum(float((grad * by).sum()) for grad, by in zip(grads, steps, strict=True))
            assert along == pytest.approx((more - less) / 2, rel=off, abs=off * step), edit
            assert all(bool(grad.any()) for grad in grads), edit


@some_families
def test_the_gradient_of_a_bias_on_a_key_is_that_of_the_softmax(family):
    model, out = tiny(family), drawn(N, POS, POS)
    backend, window, kept = local_backend(model, "Gradients of"), Window(torch.full((N,), POS)), []
    bias = torch.tensor(0.5, requires_grad=True)
    functions = dict(functions_of([e.attend("0.1", bias={"0.1": bias}, keys=2)], model.info, window))
    functions["pattern", 0] = lambda pattern: kept.append(pattern[:, 1])
    with plain_tensors(), torch.enable_grad(), without_parameters(backend.hf), backend.hooks(functions):
        backend.hf(input_ids=TOKENS, use_cache=False)
    grad = torch.autograd.grad((kept[0] * out).sum(), bias)[0]
    pattern = kept[0].detach()
    moved = pattern * ((torch.arange(POS) == 2).float() - pattern[..., [2]])
    assert_close(grad, (moved * out).sum(), atol=1e-5, rtol=1e-4)


@some_families
def test_what_is_free_begins_as_the_edit_is_and_is_neutral_where_it_says(family):
    model, before = tiny(family), tiny(family).run(TOKENS).logits
    for edit in fittable(model):
        found = e.free(edit, model.info)
        assert len(found) == len(edit.sites) * (2 if isinstance(edit, e.Transform) else 1)
        assert all(one.start.dtype == one.neutral.dtype == torch.float32 for one in found)
        assert all(one.unit == isinstance(edit, e.Inject) for one in found)
        neutral = e.with_tensors(edit, [one.neutral for one in found])
        assert_close(logits_of(model, neutral), before, atol=1e-5, rtol=0, msg=str(edit))
        starting = e.with_tensors(edit, [one.start for one in found])
        if edit.missing is None:
            assert_close(logits_of(model, starting), logits_of(model, edit), atol=1e-5, rtol=1e-5, msg=str(edit))
        elif isinstance(edit, e.Inject):
            expected = logits_of(model, e.inject(edit.sites, edit.values, 0.5))
            assert_close(logits_of(model, starting), expected, atol=1e-5, rtol=0)
        else:
            assert_close(logits_of(model, starting), before, atol=1e-5, rtol=0)
    for edit in (mk.ablate("0.1"), mk.patch_in("0.1", drawn(8)), mk.attend("0.1", sharpen=2.0)):
        assert e.free(edit, model.info) == []
        assert e.with_tensors(edit, []) is edit


def test_the_names_and_widths_of_what_is_free():
    model = tiny("gemma2")
    found = e.free(e.scale("0.1 m1 1.kv0.k"), model.info)
    assert [(str(one.site), one.name, list(one.start.shape)) for one in found] == [
        ("0.1", "alpha", [16]),
        ("m1", "alpha", [32]),
        ("1.kv0.k", "alpha", [16]),
    ]
    both = e.free(e.transform("0.1 0.2", torch.zeros(16, 16)), model.info)
    assert [(str(one.site), one.name) for one in both] == [
        ("0.1", "matrix"),
        ("0.1", "shift"),
        ("0.2", "matrix"),
        ("0.2", "shift"),
    ]
    assert torch.equal(both[0].neutral, torch.eye(16))


def test_an_edit_moves_with_its_values():
    model, given = tiny("gpt2"), vectors(tiny("gpt2"), "0.1 1.2")
    a, b, c, d = mk.sites.sites("0.1 1.2 2.0 2.3")
    value = {c: given[a], d: given[b]}
    for edit, expected in (
        (e.steer([a, b], given), e.steer([c, d], value)),
        (e.steer([a, b], given[a]), e.steer([c, d], given[a])),
        (e.inject([a, b], given, dict.fromkeys(given, 0.2), [1]), e.inject([c, d], value, 0.2, [1])),
        (mk.patch_in([a, b], given), mk.patch_in([c, d], value)),
        (mk.ablate([a, b]), mk.ablate([c, d])),
    ):
        moved = e.moved(edit, {a: c, b: d})
        assert moved.sites == expected.sites
        assert torch.equal(logits_of(model, moved), logits_of(model, expected)), edit
    half = e.moved(e.scale([a, b], {a: 0.5, b: 2.0}), {b: d, c: a})
    assert (half.sites, half.alpha) == ((a, d), {a: 0.5, d: 2.0})
    pattern, other = mk.sites.sites("0.1.pattern 2.3.pattern")
    biased = e.moved(e.attend("0.1", bias={"0.1": 3.0}, keys=0), {pattern: other})
    assert torch.equal(logits_of(model, biased), logits_of(model, e.attend("2.3", bias=3.0, keys=0)))
    with pytest.raises(EditError, match="kind 'z'"):
        e.moved(mk.ablate("0.1"), {a: mk.site("2.0.q")})
    with pytest.raises(EditError, match="Several values"):
        e.moved(e.steer([a, b], given), {a: b})
    with pytest.raises(EditError, match=r"mk\.top_heads"):
        e.moved(top_heads(model, 1, "0.1"), {a: c})
