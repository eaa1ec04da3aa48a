"""Edits with values of each site's own, of the attention that keys get, and of tokens, by their definitions."""

from __future__ import annotations

import dataclasses
import functools
import math

import elsewhere
import pytest
import torch
from families import tiny, tiny_task, untouched
from reference import edits as defined
from reference import patching as literal
from torch.testing import assert_close

import mechkit as mk
from mechkit import edits as e
from mechkit.errors import EditError, OptionError, SiteError
from mechkit.generate import _of_rows
from mechkit.head_scores.top_heads import top_heads

FAMILIES = ("gpt2", "llama", "gemma2", "neox", "gpt-oss", "mistral")
some_families = pytest.mark.parametrize("family", FAMILIES)
TOKENS = tiny_task().clean
N, POS = TOKENS.shape
HEADS = "0.1 1.0 1.3 2.2"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model: mk.Model, *edits: e.Edit) -> torch.Tensor:
    return model.run(TOKENS, edits=edits).logits


def vectors(model: mk.Model, addresses: str) -> dict[mk.Site, torch.Tensor]:
    chosen = mk.sites.sites(addresses)
    widths = [model.d_model if one.head is None else model.d_head for one in chosen]
    return {one: drawn(width, seed=i) for i, (one, width) in enumerate(zip(chosen, widths, strict=True))}


@some_families
def test_neutral_edits_change_nothing(family):
    model, places = tiny(family), "0.1 1.2.q m1 resid.2 embed"
    before, given = logits_of(model), vectors(model, places)
    for edit in (
        e.inject(places, given, gate=0.0),
        e.inject(places, given, gate={one: torch.zeros_like(value) for one, value in given.items()}),
        e.gate(HEADS, torch.ones(POS)),
        e.scale(places, dict.fromkeys(given, 1.0)),
        e.attend(HEADS, bias=dict.fromkeys(HEADS.split(), 0.0)),
        e.attend(HEADS, median=0.0),
        e.redistribute(HEADS, keys=0, to=None, keep=1.0),
        e.redistribute(HEADS, keys=[1, -1], to=[2, 3], keep=1.0),
        e.redistribute(HEADS, keys=[0], to=[0, 1], keep=0.0, most=0.0),
        e.redistribute(HEADS, keys=0, to=[8], keep=0.0, positions=range(8)),  # nothing to give to
        top_heads(model, model.n_heads),
    ):
        assert torch.equal(logits_of(model, edit), before), edit
    for edit in (
        e.steer(places, {one: torch.zeros_like(value) for one, value in given.items()}),
        e.attend(HEADS, toward="previous", alpha=0.0),
    ):
        assert_close(logits_of(model, edit), before, atol=1e-6, rtol=0)


@some_families
def test_values_of_each_site_are_those_of_an_edit_for_each(family):
    model, places = tiny(family), "0.1 1.2.q m1 resid.2 embed"
    given = vectors(model, places)
    sizes = {one: float(i) - 1.5 for i, one in enumerate(given)}
    biases = {"0.1": 1.0, "1.0": torch.tensor(-2.0), "1.3": drawn(POS, POS)}
    for together, apart in (
        (e.steer(places, given, 2.0), [e.steer([one], value, 2.0) for one, value in given.items()]),
        (e.scale(places, given), [e.scale([one], value) for one, value in given.items()]),
        (e.scale(places, sizes), [e.scale([one], value) for one, value in sizes.items()]),
        (e.inject(places, given, 0.3), [e.inject([one], value, 0.3) for one, value in given.items()]),
        (e.attend("0.1 1.0 1.3", bias=biases), [e.attend(one, bias=value) for one, value in biases.items()]),
        (e.gate("0.1 1.0", {"0.1": drawn(POS), "1.0": drawn(N, 1)}),
         [e.gate("0.1", drawn(POS)), e.gate("1.0", drawn(N, 1))]),
    ):  # fmt: skip
        assert torch.equal(logits_of(model, together), logits_of(model, *apart)), together


@some_families
@torch.no_grad()
def test_mixing_gating_and_scaling_are_what_they_say_on_the_hubs_own_model(family):
    model, hf = tiny(family), untouched(family)
    value, wide, gates, share = drawn(model.d_head), drawn(model.d_head, seed=1), drawn(N, POS, seed=2).abs(), 0.3

    def at_one_head(new):
        def change(z: torch.Tensor) -> torch.Tensor:
            z[:, :, 2] = new(z[:, :, 2])
            return z

        return literal.run_changed(hf, TOKENS, {("z", 1): change})

    def only_two(new):
        return lambda z: torch.cat([z[:, :2], new(z[:, [2]]), z[:, 3:-1], new(z[:, [-1]])], 1)

    def mixed(z: torch.Tensor) -> torch.Tensor:
        return (1 - share) * z + share * value

    for edit, new in (
        (e.inject("1.2", value, share), mixed),
        (e.inject("1.2", value, share, positions=[2, -1]), only_two(mixed)),
        (e.inject("1.2", value, part := gates[..., None].clamp(max=1)), lambda z: z + part * (value - z)),
        (e.gate("1.2", gates), lambda z: z * gates[..., None]),
        (e.gate("1.2", gates[:, [2, -1]], positions=[2, -1]),
         lambda z: z * torch.ones(N, POS).index_copy(1, torch.tensor([2, POS - 1]), gates[:, [2, -1]])[..., None]),
        (e.scale("1.2", wide), lambda z: z * wide),
        (e.scale("1.2", wide, positions=[2, -1]), only_two(lambda z: z * wide)),
    ):  # fmt: skip
        assert_close(logits_of(model, edit), at_one_head(new), atol=1e-4, rtol=1e-4, msg=str(edit))
    assert torch.equal(logits_of(model, e.inject("1.2", value, 1.0)), logits_of(model, mk.patch_in("1.2", value)))


@some_families
@torch.no_grad()
def test_edits_of_patterns_are_what_they_say_on_the_hubs_own_model(family):
    """Some families have a sliding window of 4 in layer 0 alone, others in every layer, gpt-oss has sinks."""
    model, hf, every, last = tiny(family), untouched(family), list(range(POS)), POS - 1
    for layer, head in ((0, 2), (1, 1)):
        site = f"{layer}.{head}"
        scores, pattern = (literal.value_of(hf, TOKENS, kind, layer)[:, head] for kind in ("scores", "pattern"))
        to_sink = 1 - pattern.sum(-1) if family == "gpt-oss" else None
        spread = functools.partial(defined.redistributed, pattern)
        for edit, expected in (
            (e.attend(site, toward="previous"), defined.previous(pattern, scores)),
            (e.attend(site, bias=math.log(0.3), keys=0), defined.sink_tuned(pattern, 0.3, to_sink)),
            (e.attend(site, bias={site: math.log(4.0)}, keys=0), defined.sink_tuned(pattern, 4.0, to_sink)),
            (e.redistribute(site, 0, None), spread([0], every, 0.6, 0.0, 1.0, every)),
            (e.redistribute(site, [0, 5], [4, 5, 6, -1], 0.1), spread([0, 5], [4, 5, 6, last], 0.1, 0, 1, every)),
            (e.redistribute(site, [4, 5], [3, 4, 5], 0, 0.3, 0.7), spread([4, 5], [3, 4, 5], 0, 0.3, 0.7, every)),
            (e.redistribute(site, None, [2, 6], 0.5, positions=[3, -1]),
             spread([0, 1, 3, 4, 5, 7, 8], [2, 6], 0.5, 0, 1, [3, last])),
        ):  # fmt: skip

            def change(own: torch.Tensor, expected=expected, head=head) -> torch.Tensor:
                own[:, head] = expected
                return own

            run = model.run(TOKENS, f"{site}.pattern", [edit])
            assert_close(run[f"{site}.pattern"], expected, atol=1e-6, rtol=1e-5, msg=str(edit))
            theirs = literal.run_changed(hf, TOKENS, {("pattern", layer): change})
            assert_close(run.logits, theirs, atol=1e-4, rtol=1e-4, msg=str(edit))
            assert_close(run[f"{site}.pattern"].sum(-1), pattern.sum(-1), atol=1e-6 if to_sink is None else 1, rtol=0)
            assert not torch.allclose(expected, pattern, atol=1e-3), edit


@some_families
@torch.no_grad()
def test_edits_of_scores_are_what_they_say_on_the_hubs_own_model(family):
    model, hf, every = tiny(family), untouched(family), list(range(POS))
    for layer, head in ((0, 2), (1, 1)):
        site, scores = f"{layer}.{head}", literal.value_of(hf, TOKENS, "scores", layer)[:, head]
        raised, seen = scores.clone(), scores > defined.HIDDEN
        raised[:, 5:, [0, 1, 2, 3, 6, 7, 8]] -= 2.0
        hidden = scores.clone()
        hidden[:, 4:, :3] = torch.finfo(scores.dtype).min  # each of these queries sees itself
        for edit, expected in (
            (e.attend(site, median=1.5), defined.with_median(scores, 1.5, every, every)),
            (e.attend(site, median=-2.0, keys=[1, 4, -2], positions=[3, 5, -1]),
             defined.with_median(scores, -2.0, [3, 5, 8], [1, 4, 7])),
            (e.attend(site, bias=-2.0, keys=[4, 5], outside=True, positions=range(5, 9)), raised),
            (e.attend(site, mask=range(3, 9), outside=True, positions=range(4, 9)), hidden),
        ):  # fmt: skip

            def change(own: torch.Tensor, expected=expected, head=head, seen=seen) -> torch.Tensor:
                own[:, head] = torch.where(seen, expected, own[:, head])
                return own

            theirs = literal.run_changed(hf, TOKENS, {("scores", layer): change})
            assert_close(logits_of(model, edit), theirs, atol=1e-4, rtol=1e-4, msg=str(edit))


@some_families
@torch.no_grad()
def test_the_heads_that_write_most_stay_at_each_token(family):
    model, hf = tiny(family), untouched(family)
    written = model.run(TOKENS, [f"1.{head}.result" for head in range(4)])
    written = torch.stack([written[f"1.{head}.result"] for head in range(4)], 2)
    for heads, k, positions in ((None, 1, None), ("1.0 1.2 1.3", 2, None), ("1.0 1.1 1.2 1.3", 2, [2, -1])):
        at = range(POS) if positions is None else positions

        def change(z: torch.Tensor, heads=heads, k=k, at=at) -> torch.Tensor:
            among = [0, 1, 2, 3] if heads is None else [int(name[2:]) for name in heads.split()]
            z[:, at] = defined.only_top(z[:, at], written[:, at], among, k)
            return z

        edit = top_heads(model, k, "1.0 1.1 1.2 1.3" if heads is None else heads, positions)
        theirs = literal.run_changed(hf, TOKENS, {("z", 1): change})
        assert_close(logits_of(model, edit), theirs, atol=1e-4, rtol=1e-4, msg=f"{heads} {k}")
        assert not torch.allclose(theirs, model.run(TOKENS).logits, atol=1e-3)
    kept = model.run(TOKENS, "0.0 0.1 0.2 0.3 2.0 2.1 2.2 2.3", [top_heads(model, 3)])
    for layer in (0, 2):
        silent = torch.stack([kept[f"{layer}.{head}"].abs().sum(-1) == 0 for head in range(4)])
        assert (silent.sum(0) == 1).all()


def every_edit(model: mk.Model, late: int = 7) -> list[list[e.Edit]]:
    """Lists of edits, with a position that only a longer text reaches."""
    given, every = vectors(model, "1.1 resid.1"), [str(head) for head in model.heads()]
    return [
        [e.inject("1.1", given[mk.site("1.1")], 0.7, positions=[-1]), e.steer("1.1 resid.1", given)],
        [e.gate("0.2 1.1", {"0.2": drawn(1, 3), "1.1": drawn(3)}, positions=[1, 2, late])],
        [e.attend("0.0 1.1", bias={"0.0": 2.0, "1.1": -3.0}, keys=[1, late], outside=True)],
        [e.attend("1.1 2.0", toward="previous", alpha=0.7), e.attend("1.0", mask=[0, 2, late], outside=True)],
        [e.attend(every, median=3.0, keys=[0, 2])],
        [e.attend(every, bias=3.0, keys=-1)],
        [e.redistribute("0.0 1.1 2.2", keys=0, to=[2, 3, late], keep=0.1), e.redistribute("1.0", [1, late], None)],
        [e.redistribute(every, keys=[-1], to=None, keep=0.0)],
        [e.redistribute(every, keys=[0, 1], to=[-1, -2], keep=0.0), e.redistribute("1.2", None, 3, 0.2, 0.05, 0.9)],
        [top_heads(model, 2), e.scale("m1", drawn(model.d_model))],
    ]


@some_families
def test_generating_is_running_the_whole_text_again(family):
    model, prompts = tiny(family), TOKENS[:2, :6]

    def within(edit: e.Edit, length: int) -> e.Edit | None:
        """What of the edit a text of this length has reached."""
        reached = {
            name: tuple(p for p in value if p < length)
            for name in ("positions", "keys", "to")
            if isinstance(value := getattr(edit, name, None), tuple)
        }
        if reached.get("positions") == ():
            return None
        if isinstance(edit, e.Scale) and edit.positions:
            rows = len(reached["positions"])
            reached["alpha"] = {one: value[..., :rows, :] for one, value in edit.alpha.items()}
        return dataclasses.replace(edit, **reached)

    changed = 0
    for edits in every_edit(model):

        def run(text: torch.Tensor, edits=edits) -> torch.Tensor:
            reached = [within(edit, text.shape[1]) for edit in edits]
            return model.run(text, edits=[edit for edit in reached if edit is not None]).logits

        made = model.generate(prompts, 6, edits=edits, eos_token_id=None)
        assert torch.equal(made, literal.continue_by_rerunning(run, prompts, 6)), edits
        changed += not torch.equal(made, model.generate(prompts, 6, eos_token_id=None))
    assert changed > len(every_edit(model)) // 2


def test_what_changes_with_the_length_of_a_text_cannot_be_cached():
    for edit, grows in (
        (e.attend("0.1", median=1.0), False),
        (e.attend("0.1", bias={"0.1": 1.0}, keys=[0, 2]), True),
        (e.attend("0.1", bias={"0.1": torch.ones(9)}), False),
        (e.attend("0.1", bias=1.0, keys=[0, -1]), False),
        (e.redistribute("0.1", [0, 1], [2]), True),
        (e.redistribute("0.1", [0, -1], None), False),
        (e.redistribute("0.1", 0, -1), False),
        (e.redistribute("0.1", 0, None, positions=-1), False),
        (e.steer("0.1", {"0.1": torch.ones(8)}), True),
        (e.inject("0.1", torch.ones(8), 0.5, positions=[1, -1]), False),
    ):
        assert edit.grows == grows, edit


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-oss"])
def test_prompts_of_several_lengths_and_spans_are_each_their_own(family):
    model = tiny(family)
    parts = [tiny_task(n=2, length=6), tiny_task(n=2, length=9, seed=1)]
    task = mk.Task.join(parts)
    own = drawn(model.d_head)
    for make in (
        lambda at: e.attend(HEADS, median=2.0, keys=at),
        lambda at: e.attend(HEADS, bias=dict.fromkeys(HEADS.split(), 2.0), keys=at, outside=True),
        lambda at: e.attend(HEADS, mask=at, outside=True),
        lambda at: e.redistribute(HEADS, 0, at, 0.2),
        lambda at: e.redistribute(HEADS, at, [0, 1], 0.2),
        lambda at: e.redistribute(HEADS, None, [0, 1], 0.2, positions=at),
        lambda at: e.inject(HEADS, own, 0.4, positions=at),
        lambda at: e.gate(HEADS, 0.4, positions=at),
        lambda at: top_heads(model, 1, positions=at),
    ):
        spanned, last = (model.run(task, edits=[make(at)]).logits for at in ("END", -1))
        assert torch.equal(spanned, last)
        assert not torch.allclose(last, model.run(task).logits, atol=1e-3)
        for first, part in zip((0, 2), parts, strict=True):
            alone = model.run(part.clean, edits=[make(-1)]).logits
            assert_close(last[first : first + 2, : alone.shape[1]], alone, atol=1e-5, rtol=0)


def test_generating_prompts_of_several_lengths_gives_each_its_own_values():
    model = tiny("llama")
    task = mk.Task.join([tiny_task(n=2, length=6), tiny_task(n=2, length=9, seed=1)])
    gates, seeds = drawn(4, 1), drawn(4, 1, model.d_model) * 3
    edits = [e.gate("1.1", gates, positions="END"), e.steer("resid.1", {"resid.1": seeds})]
    resolved = model.resolved(edits, task)
    some = [_of_rows(edit, torch.tensor([1, 3]), 4) for edit in resolved]
    assert_close(e.of_site(some[0].alpha, mk.site("1.1")), gates[[1, 3], :, None])
    assert_close(e.of_site(some[1].vector, mk.site("resid.1")), seeds[[1, 3]])


def test_those_of_one_kind_are_carried_out_in_order():
    model, own = tiny("llama"), drawn(8)
    twice = logits_of(model, e.redistribute(HEADS, 0, None, 0.5), e.redistribute(HEADS, 0, None, 0.5))
    assert_close(twice, logits_of(model, e.redistribute(HEADS, 0, None, 0.25)), atol=1e-5, rtol=0)
    run = model.run(TOKENS, "1.1", [e.inject("1.1", own, 0.5), mk.scale("1.1", 2.0), e.inject("1.1", own, 1.0)])
    assert torch.equal(run["1.1"], own.expand_as(run["1.1"]))


@pytest.mark.parametrize(
    ("make", "kind", "names"),
    [
        (lambda: e.steer("1.1"), EditError, "no vector yet.*mk.fit"),
        (lambda: e.scale("1.1"), EditError, "no alpha yet.*mk.fit"),
        (lambda: e.inject("1.1", torch.zeros(8)), EditError, "no gate yet.*mk.fit"),
        (lambda: e.steer("1.1 1.2", {"1.1": torch.zeros(8)}), EditError, "1.2"),
        (lambda: e.steer("1.1", {"1.1": None}), EditError, "NoneType"),
        (lambda: e.scale("1.1", {"1.1": 1.0, "1.2": 2.0}), EditError, "1.2"),
        (lambda: e.scale("1.1", "much"), OptionError, "much"),
        (lambda: e.scale("1.1", float("nan")), OptionError, "finite"),
        (lambda: e.scale("1.1", torch.zeros(7)), EditError, r"\[7\]"),
        (lambda: e.inject("1.1", torch.zeros(8), 1.5), OptionError, "from 0 to 1"),
        (lambda: e.inject("1.1", torch.zeros(8), torch.tensor([-0.5, 0.5])), OptionError, "-0.5 to 0.5"),
        (lambda: e.inject("1.1", torch.zeros(8), {"1.2": 0.5}), EditError, "1.1, 1.2"),
        (lambda: e.gate("1.1.q", torch.ones(POS)), SiteError, "1.1.q"),
        (lambda: e.gate("m1", torch.ones(POS)), SiteError, "m1"),
        (lambda: e.gate("1.1", torch.ones(POS + 1)), EditError, r"\[10, 1\]"),
        (lambda: e.attend("1.1", bias={"1.2": 1.0}), EditError, "1.1.pattern, 1.2.pattern"),
        (lambda: e.attend("1.1", bias={}), EditError, "bias"),
        (lambda: e.attend("1.1", bias=1.0, outside=True), EditError, "outside"),
        (lambda: e.attend("1.1", sharpen=1.0, outside=True), EditError, "outside"),
        (lambda: e.attend("1.1", sharpen=1.0, keys=[0]), EditError, "bias or median"),
        (lambda: e.attend("1.1", median="big"), OptionError, "big"),  # type: ignore[arg-type]
        (lambda: e.attend("1.1", median=1.0, keys=[40]), EditError, "40"),
        (lambda: e.attend("1.1", toward="back"), OptionError, "previous"),  # type: ignore[arg-type]
        (lambda: e.redistribute("1.1", None, None), EditError, "every key"),
        (lambda: e.redistribute("1.1", 0, None, keep=1.2), OptionError, "keep"),
        (lambda: e.redistribute("1.1", 0, [40]), EditError, "40"),
        (lambda: e.redistribute("1.1", 0, []), OptionError, "to"),
        (lambda: e.redistribute("1.1", 0, "END"), EditError, "END"),
        (lambda: e.redistribute("m1", 0, None), SiteError, "m1"),
        (lambda: top_heads(tiny("llama"), 0), OptionError, "k = 0"),
        (lambda: top_heads(tiny("llama"), 1, ""), EditError, "no heads"),
        (lambda: top_heads(tiny("llama"), 1, "9.9"), SiteError, "9.9"),
        (lambda: e.with_tensors(e.steer("1.1 1.2"), [torch.zeros(8)]), EditError, "1 tensors"),
        (lambda: e.transform("1.1 1.2", {"1.1": torch.eye(8)}), EditError, "1.2"),
        (lambda: e.transform("1.1", {"1.1": torch.ones(8, 7)}), EditError, r"\[8, 7\]"),
    ],
)
def test_what_cannot_be_made_says_why(make, kind, names):
    with pytest.raises(kind, match=names):
        tiny("llama").run(TOKENS, edits=[make()])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt-oss"])
def test_where_the_model_is_it_is_the_same(family, tmp_path_factory):
    place = elsewhere.folder(tmp_path_factory.mktemp("models"), family)
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    for ours, theirs in zip(every_edit(far), every_edit(own), strict=True):
        within = [[edit for edit in edits if edit.positions != (1, 2, 7)] for edits in (ours, theirs)]
        logits = [model.run(TOKENS, edits=some).logits for model, some in zip((far, own), within, strict=True)]
        assert_close(*logits, atol=1e-4, rtol=1e-4)
        made = [
            model.generate(TOKENS[:2, :6], 3, edits=some)
            for model, some in zip((far, own), (ours, theirs), strict=True)
        ]
        assert torch.equal(*made)


def test_apart_from_the_weights_edits_of_attention_are_refused_and_others_are_the_same():
    from test_envoys import apart

    far, own = apart("llama"), tiny("llama")
    given, seen = vectors(own, "1.1 resid.1"), 0
    for edit in (
        e.inject("1.1", given[mk.site("1.1")], 0.7, positions=[-1]),
        e.steer("1.1 resid.1", given),
        e.gate("0.2 1.1", drawn(N, POS)),
        top_heads(own, 2),
        e.attend("1.1", median=1.0),
        e.redistribute("1.1", 0, None),
    ):
        if edit.sites[0].kind == "pattern":
            with pytest.raises(mk.errors.UnsupportedError, match="apart from the model's weights"):
                logits_of(far, edit)
            continue
        assert_close(logits_of(far, edit), logits_of(own, edit), atol=1e-4, rtol=1e-4)
        seen += 1
    assert seen == 4
    with pytest.raises(mk.errors.UnsupportedError, match="apart from the model's weights"):
        top_heads(far, 2)
