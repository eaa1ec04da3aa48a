"""Addresses, sets of heads, and edits."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny, tiny_task, untouched
from hypothesis import given
from hypothesis import strategies as st
from reference import patching as literal

import mechkit as mk
from mechkit.errors import EditError, MechkitWarning, OptionError, SiteError
from mechkit.sites import GROUP_KINDS, HEAD_KINDS, HeadSet, Site, site, sites

numbers = st.integers(0, 200)
addresses = st.one_of(
    st.builds(Site, numbers, numbers, st.sampled_from(HEAD_KINDS)),
    st.builds(Site, numbers, numbers, st.sampled_from(GROUP_KINDS), st.just(True)),
    st.builds(Site, numbers, st.none(), st.sampled_from(["mlp", "resid"])),
    st.sampled_from([Site(-1, None, "embed"), Site(-1, None, "logits")]),
)
head_sets = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12).map(lambda heads: HeadSet(heads, 6))


@given(addresses)
def test_what_is_written_reads_back_the_same(address):
    assert site(str(address)) == address
    assert site(address) is address


@given(head_sets, head_sets)
def test_set_algebra_is_that_of_sets(a, b):
    for result, expected in ((a | b, set(a) | set(b)), (a & b, set(a) & set(b)), (a - b, set(a) - set(b))):
        assert set(result) == expected
        assert result.heads_per_layer == 6
    assert set(a ^ b) == set(a) ^ set(b)
    assert list(a | b)[: len(a)] == list(a)
    assert sites(str(a)) == tuple(a)


@given(head_sets, st.integers(0, 99))
def test_random_sets_have_as_many_heads_in_each_layer(heads, seed):
    drawn = heads.random_like(seed)
    assert drawn.per_layer() == heads.per_layer()
    assert drawn == heads.random_like(seed)
    assert all(head.head < 6 for head in drawn)


def test_random_draws_are_even_over_the_heads_of_a_layer():
    counts = torch.zeros(4)
    for seed in range(2000):
        counts[next(iter(HeadSet("3.0", 4).random_like(seed))).head] += 1
    assert counts.min() > 430


def test_sets_hold_addresses_in_any_form():
    heads = mk.heads("9.9, 9.6 10.0") | mk.heads([(10, 7)])
    assert str(heads) == "9.9 9.6 10.0 10.7"
    assert "9.6" in heads
    assert (10, 7) in heads
    assert "0.0" not in heads
    assert heads.per_layer() == {9: 2, 10: 2}


@pytest.mark.parametrize(
    "bad",
    ["9", "9.", "a.b", "9.9.x", "9.kv2", "9.kv2.q", "resid", "m", "m-1", "-1.0", "", 3, (1,), (1, "a"), None, 2.5],
)
def test_what_is_no_address_is_named(bad):
    with pytest.raises(SiteError, match=r"address|pair|group|head"):
        site(bad)


def test_a_set_of_unknown_width_cannot_be_drawn_like():
    with pytest.raises(OptionError, match="heads_per_layer"):
        mk.heads("0.0").random_like()
    with pytest.raises(OptionError, match="3 heads in layer 0"):
        mk.heads("0.0 0.1 0.2").random_like(heads_per_layer=2)
    with pytest.raises(SiteError, match=r"0\.0\.q"):
        mk.heads("0.0.q")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ablating_a_head_at_some_positions_is_zeroing_its_z_there(family):
    model, tokens = tiny(family), tiny_task().clean

    def zeroed(z: torch.Tensor) -> torch.Tensor:
        z[:, [2, -1], 1] = 0
        return z

    expected = literal.run_changed(untouched(family), tokens, {("z", 1): zeroed})
    got = model.run(tokens, edits=[mk.ablate("1.1", positions=[2, -1])]).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_edits_are_carried_out_in_order():
    model, tokens = tiny("llama"), tiny_task().clean
    ones = torch.ones(model.d_head)
    first = model.run(tokens, record="1.1", edits=[mk.patch_in("1.1", ones), mk.scale("1.1", 3.0)])["1.1"]
    second = model.run(tokens, record="1.1", edits=[mk.scale("1.1", 3.0), mk.patch_in("1.1", ones)])["1.1"]
    assert (first == 3).all()
    assert (second == 1).all()


def test_recorded_result_and_mlps_add_up_to_the_residual():
    model, tokens = tiny("llama"), tiny_task().clean
    names = [f"1.{head}.result" for head in range(model.n_heads)]
    run = model.run(tokens, record=[*names, "m1", "resid.1", "resid.2"])
    parts = sum(run[name] for name in names) + run["m1"]
    torch.testing.assert_close(run["resid.1"] + parts, run["resid.2"], atol=1e-4, rtol=1e-4)


def test_mean_and_resample_take_their_values_from_the_corrupt_prompts():
    model, task = tiny("gpt2"), tiny_task(n=4)
    corrupt = model.run(task.corrupt, record="1.1")["1.1"]
    run = model.run(task, record="1.1", edits=[mk.ablate("1.1", "mean", reference=task)])
    torch.testing.assert_close(run["1.1"], corrupt.mean(0, keepdim=True).expand_as(corrupt))
    run = model.run(task, record="1.1", edits=[mk.ablate("1.1", "resample", reference=task)])
    torch.testing.assert_close(run["1.1"], corrupt)
    free = model.run(task.clean[0, :5], record="1.1", edits=[mk.ablate("1.1", reference=task)])["1.1"]
    torch.testing.assert_close(free, corrupt.mean((0, 1)).expand_as(free))


@pytest.mark.parametrize(
    ("edit", "error", "names"),
    [
        (lambda: mk.ablate("7.0"), SiteError, "7.0"),
        (lambda: mk.ablate("0.5"), SiteError, "0.5"),
        (lambda: mk.scale("0.kv2.k", 2), SiteError, "2 key/value groups"),
        (lambda: mk.scale("0.1", 2, positions=[40]), EditError, "40"),
        (lambda: mk.patch_in("0.1", torch.zeros(3)), EditError, r"\[3\]"),
        (lambda: mk.patch_in("0.1", {"0.2": torch.zeros(8)}), EditError, "0.1, 0.2"),
        (lambda: mk.scale("0.1.result", 2), EditError, "result"),
        (lambda: mk.scale("logits", 2), EditError, "logits"),
        (lambda: mk.scale("", 2), EditError, "no sites"),
        (lambda: mk.scale("0.1", 2, positions=[]), OptionError, "positions"),
        (lambda: mk.ablate("0.1", "mean"), EditError, "reference"),
        (lambda: mk.ablate("0.1", "melt"), OptionError, "melt"),  # type: ignore[arg-type]
        (lambda: mk.ablate("0.1", "resample", reference=tiny_task(n=2)), EditError, "broadcasts|Resampling"),
    ],
)
def test_an_edit_that_cannot_be_made_says_why(edit, error, names):
    with pytest.raises(error, match=names):
        tiny("llama").run(tiny_task().clean, edits=[edit()])


def test_asking_for_what_was_not_recorded_says_how_to_record_it():
    with pytest.raises(SiteError, match=r'record=\["1.1"\]'):
        tiny("llama").run(tiny_task().clean)["1.1"]


def test_a_query_heads_key_is_that_of_its_group_and_this_is_said():
    model, tokens = tiny("llama"), tiny_task().clean
    with pytest.warns(MechkitWarning, match=r'"0.1.k" edits "0.kv0.k"'):
        asked = model.run(tokens, edits=[mk.scale("0.0.k 0.1.k", 2)]).logits
    assert torch.equal(asked, model.run(tokens, edits=[mk.scale("0.kv0.k", 2)]).logits)
    with pytest.warns(MechkitWarning), pytest.raises(EditError, match="Several values"):
        model.run(tokens, edits=[mk.patch_in("0.0.k 0.1.k", {"0.0.k": torch.ones(8), "0.1.k": torch.zeros(8)})])


def test_positions_from_the_end_are_each_prompts_own():
    model = tiny("llama")
    short, long = tiny_task(n=1, length=6).clean, tiny_task(n=1, length=9, seed=1).clean
    task = mk.Task.join([tiny_task(n=1, length=6), tiny_task(n=1, length=9, seed=1)])
    together = model.run(task, edits=[mk.ablate("1.1", positions=-1)]).logits
    spanned = model.run(task, edits=[mk.ablate("1.1", positions="END")]).logits
    for row, tokens in enumerate((short, long)):
        alone = model.run(tokens, edits=[mk.ablate("1.1", positions=-1)]).logits
        torch.testing.assert_close(together[row : row + 1, : tokens.shape[1]], alone, atol=1e-5, rtol=0)
    assert torch.equal(together, spanned)


def test_means_at_a_span_are_those_of_the_span():
    model, task = tiny("llama"), tiny_task(n=4)
    corrupt = model.run(task.corrupt, record="1.1")["1.1"]
    for positions in ("END", -1, [8]):
        edit = mk.ablate("1.1", "mean", reference=task, positions=positions)
        value = model.run(task, record="1.1", edits=[edit])["1.1"]
        torch.testing.assert_close(value[:, -1], corrupt[:, -1].mean(0).expand(4, -1))
        torch.testing.assert_close(value[:, :-1], model.run(task, record="1.1")["1.1"][:, :-1])


def test_hidden_keys_stay_hidden_whatever_is_done_to_the_scores():
    model, tokens = tiny("mistral"), tiny_task().clean
    hidden = model.run(tokens, record="1.1.scores")["1.1.scores"] < -1e30
    for edit in (mk.scale("1.1.scores", 0.0), mk.ablate("1.1.scores"), mk.scale("1.1.scores", -1.0)):
        pattern = model.run(tokens, record="1.1.pattern", edits=[edit])["1.1.pattern"]
        assert not pattern[hidden].any()


def test_attention_edits_compose_in_the_order_given():
    model, tokens = tiny("llama"), tiny_task().clean
    mask, even = mk.attend("1.1", mask=[0]), mk.ablate("1.1", "uniform")
    pattern = model.run(tokens, record="1.1.pattern", edits=[mask, even])["1.1.pattern"]
    assert not pattern[:, :, 0].any()
    torch.testing.assert_close(pattern[0, 3], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0, 0]))
    torch.testing.assert_close(
        model.run(tokens, record="1.1.pattern", edits=[even, mk.scale("1.1.pattern", 0.5)])["1.1.pattern"][0, 0, 0],
        torch.tensor(0.5),
    )
