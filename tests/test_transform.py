"""The edit that multiplies by a matrix and adds a vector, at every site that has a width."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny, tiny_task, untouched
from reference import patching as literal
from torch.testing import assert_close

import mechkit as mk
from mechkit.errors import EditError, OptionError

TOKENS = tiny_task().clean
every_family = pytest.mark.parametrize("family", FAMILIES)


def sites_of(model: mk.Model) -> list[mk.Site]:
    keys = "1.kv0.k 2.kv0.v" if model.info.grouped else "1.1.k 2.0.v"
    return list(mk.sites.sites(f"0.1 1.0.q m1 resid.2 resid.3 embed {keys}"))


def drawn(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(width, width, generator=draw) / width**0.5, torch.randn(width, generator=draw)


@every_family
def test_the_identity_changes_nothing(family):
    model = tiny(family)
    before = model.run(TOKENS).logits
    for site in sites_of(model):
        width = model.d_model if site.head is None else model.d_head
        for shift in (None, torch.zeros(width)):
            run = model.run(TOKENS, edits=[mk.transform([site], torch.eye(width), shift)])
            assert_close(run.logits, before, atol=1e-5, rtol=0)


@every_family
def test_it_is_the_same_as_patching_the_transformed_values_in(family):
    model = tiny(family)
    for site in sites_of(model):
        own = model.run(TOKENS, site)[site]
        matrix, shift = drawn(own.shape[-1])
        for added in (None, shift):
            new = own @ matrix if added is None else own @ matrix + added
            for positions in (None, [2, -1]):
                edit = mk.transform([site], matrix, added, positions)
                run = model.run(TOKENS, site, [edit])
                given = new if positions is None else new[:, positions]
                expected = model.run(TOKENS, site, [mk.patch_in([site], given, positions)])
                assert_close(run.logits, expected.logits, atol=1e-5, rtol=1e-5, msg=f"{site} {positions}")
                assert_close(run[site], expected[site], atol=1e-5, rtol=1e-5)


@every_family
def test_it_is_the_same_as_a_plain_hook_on_the_hubs_own_model(family):
    model, (matrix, shift) = tiny(family), drawn(tiny(family).d_head)

    def change(z: torch.Tensor) -> torch.Tensor:
        z[:, :, 2] = z[:, :, 2] @ matrix + shift
        return z

    expected = literal.run_changed(untouched(family), TOKENS, {("z", 1): change})
    run = model.run(TOKENS, edits=[mk.transform("1.2", matrix, shift)])
    assert_close(run.logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(run.logits, model.run(TOKENS).logits, atol=1e-3)


def test_one_after_the_other_is_the_product():
    model = tiny("llama")
    (a, c), (b, d) = drawn(8, 1), drawn(8, 2)
    both = model.run(TOKENS, edits=[mk.transform("1.1 1.2", a, c), mk.transform("1.1 1.2", b, d)]).logits
    once = model.run(TOKENS, edits=[mk.transform("1.1 1.2", a @ b, c @ b + d)]).logits
    other = model.run(TOKENS, edits=[mk.transform("1.1 1.2", b, d), mk.transform("1.1 1.2", a, c)]).logits
    assert_close(both, once, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both, other, atol=1e-3)


def test_multiples_of_the_identity_are_scaling_and_a_shift_alone_is_steering():
    model, vector = tiny("llama"), drawn(8)[1]
    for one, other in (
        (mk.transform("1.1", -0.5 * torch.eye(8)), mk.scale("1.1", -0.5)),
        (mk.transform("1.1", torch.zeros(8, 8)), mk.ablate("1.1")),
        (mk.transform("1.1", torch.eye(8), 2 * vector), mk.steer("1.1", vector, 2.0)),
    ):
        first, second = (model.run(TOKENS, edits=[edit]).logits for edit in (one, other))
        assert_close(first, second, atol=1e-5, rtol=0)


def test_generating_is_running_the_whole_text_again():
    model, prompts, (matrix, shift) = tiny("qwen2"), TOKENS[:, :6], drawn(8)
    plainly = model.generate(prompts, 6, eos_token_id=None)
    for positions in (None, [1, 7], [-1]):

        def run(text: torch.Tensor, positions=positions) -> torch.Tensor:
            reached = positions and [p for p in positions if p < text.shape[1]]
            return model.run(text, edits=[mk.transform("1.1", 3 * matrix, shift, reached)]).logits

        edit = mk.transform("1.1", 3 * matrix, shift, positions)
        made = model.generate(prompts, 6, edits=[edit], eos_token_id=None)
        assert torch.equal(made, literal.continue_by_rerunning(run, prompts, 6))
        assert not torch.equal(made, plainly)


@pytest.mark.parametrize(
    ("make", "kind", "names"),
    [
        (lambda: mk.transform("1.1", torch.ones(8, 7)), EditError, r"\[8, 7\]"),
        (lambda: mk.transform("1.1", torch.ones(8)), EditError, r"\[8\]"),
        (lambda: mk.transform("1.1", torch.ones(1, 8, 8)), EditError, r"\[1, 8, 8\]"),
        (lambda: mk.transform("1.1", torch.eye(8), torch.ones(7)), EditError, r"\[7\]"),
        (lambda: mk.transform("1.1", torch.eye(8), torch.ones(1, 8)), EditError, r"\[1, 8\]"),
        (lambda: mk.transform("1.1.pattern", torch.eye(8)), EditError, r"mk\.attend"),
        (lambda: mk.transform("1.1 1.1.scores", torch.eye(8)), EditError, r"mk\.attend"),
        (lambda: mk.transform("1.1.result", torch.eye(32)), EditError, "cannot be edited"),
        (lambda: mk.transform("", torch.eye(8)), EditError, "no sites"),
        (lambda: mk.transform("1.1", torch.eye(8), positions=1.5), OptionError, "positions"),
        (lambda: mk.transform("1.1", torch.eye(7)), EditError, "Expected width 8"),
        (lambda: mk.transform("m1", torch.eye(8)), EditError, "Expected width 32"),
        (lambda: mk.transform("1.1 m1", torch.eye(8)), EditError, "Expected width 32"),
    ],
)
def test_bad_input_is_named(make, kind, names):
    with pytest.raises(kind, match=names):
        tiny("llama").run(TOKENS, edits=[make()])
