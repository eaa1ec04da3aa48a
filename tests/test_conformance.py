"""What must hold on every family: fast = literal, neutral = nothing, everything patched = the source run."""

from __future__ import annotations

import functools

import pytest
import torch
from families import FAMILIES, VOCAB, tiny, tiny_task, untouched
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from reference import patching as literal

import mechkit as mk
from mechkit.errors import EditError
from mechkit.sites import Site

TOLERANCE = 1e-4
EVERYTHING = "heads q k v patterns scores mlps resid embed"
HEADS = "0.1 1.0 1.3 2.2"

every_family = pytest.mark.parametrize("family", FAMILIES)


def logit_diff(task: mk.Task, logits: torch.Tensor) -> torch.Tensor:
    return mk.metrics.logit_diff(logits, task)


def runs(task: mk.Task, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    return (task.corrupt, task.clean) if direction == "denoise" else (task.clean, task.corrupt)


def patched_literally(family: str, task: mk.Task, site: Site, direction: str, where=slice(None)) -> torch.Tensor:
    layer, head = max(site.layer, 0), None if site.head is None else int(site.head)
    base, source = runs(task, direction)
    return logit_diff(task, literal.patch_cell(untouched(family), base, source, site.kind, layer, head, where))


@every_family
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@torch.no_grad()
def test_every_site_equals_one_forward_a_site(family, direction):
    model, task = tiny(family), tiny_task(n=3)
    frame = mk.patch(model, task, EVERYTHING, direction=direction, progress=False).frame
    ends = [logit_diff(task, untouched(family)(ids, use_cache=False).logits) for ids in runs(task, direction)]
    gap = (ends[1] - ends[0]).mean()
    kinds = frame.groupby("kind").size()
    assert set(kinds.index) == {"z", "q", "k", "v", "pattern", "scores", "mlp", "resid", "embed"}
    assert (kinds[["k", "v"]] == model.n_layers * model.n_kv_heads).all()
    for row in frame.itertuples():
        values = patched_literally(family, task, mk.site(row.site), direction)
        assert row.metric == pytest.approx(float(values.mean()), abs=TOLERANCE), row.site
        # Some of these models have small logits: what is off in the metric is off by more in its share of the gap.
        off = TOLERANCE * max(1.0, 1 / abs(float(gap)))
        assert row.score == pytest.approx(float((values - ends[0]).mean() / gap), abs=off), row.site


@settings(max_examples=60, deadline=None, phases=[Phase.generate])  # shrinking runs models for minutes
@given(
    family=st.sampled_from(FAMILIES),
    kind=st.sampled_from(["z", "q", "k", "v", "pattern", "scores", "mlp", "resid", "embed"]),
    place=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    position=st.integers(0, 8),
    seed=st.integers(0, 1000),
    first=st.integers(0, 8),
    direction=st.sampled_from(["denoise", "noise"]),
)
def test_one_site_at_one_position_equals_one_forward(family, kind, place, position, seed, first, direction):
    model, task = tiny(family), tiny_task(n=2, seed=seed, first=first)
    layer, head = place
    if kind in ("mlp", "resid", "embed"):
        site = Site(-1 if kind == "embed" else layer if kind == "resid" else layer % 3, None, kind)
    else:
        grouped = kind in "kv" and model.info.grouped
        site = Site(layer % 3, head % (model.n_kv_heads if grouped else model.n_heads), kind, grouped)
    frame = mk.patch(model, task, [site], positions=position, direction=direction, progress=False).frame
    expected = patched_literally(family, task, site, direction, position)
    assert frame.metric[0] == pytest.approx(float(expected.mean()), abs=TOLERANCE), site


@every_family
@torch.no_grad()
def test_every_position_of_several_sites_in_prompts_of_different_lengths(family):
    model = tiny(family)
    tasks = [tiny_task(n=2, length=9, seed=3), tiny_task(n=3, length=7, seed=4, first=1)]
    sites = mk.sites.sites("resid.1 m1 1.2 resid.3")
    frame = mk.patch(model, tasks, sites, positions="each", progress=False).frame
    assert len(frame) == len(sites) * 9
    for row in frame.itertuples():
        position, total = int(row.position), 0.0
        for task in tasks:
            if position < task.clean.shape[1]:
                total += float(patched_literally(family, task, mk.site(row.site), "denoise", position).sum())
            else:
                total += float(logit_diff(task, untouched(family)(task.corrupt, use_cache=False).logits).sum())
        assert row.metric == pytest.approx(total / 5, abs=TOLERANCE), (row.site, position)


@every_family
def test_patching_everything_is_the_source_run(family):
    model, task = tiny(family), tiny_task()
    for site, positions in (("resid.0", "all"), ("embed", "all"), (f"resid.{model.n_layers}", "END")):
        frame = mk.patch(model, task, site, positions=positions, progress=False).frame
        assert frame.score[0] == pytest.approx(1, abs=TOLERANCE), site


@every_family
def test_setting_every_part_to_its_value_on_another_prompt_is_that_prompts_run(family):
    model, task = tiny(family), tiny_task()
    parts = ["embed", *map(str, model.heads()), *(f"m{layer}" for layer in range(model.n_layers))]
    clean = model.run(task.clean, record=parts)
    run = model.run(task.corrupt, edits=[mk.patch_in(parts, {part: clean[part] for part in parts})])
    torch.testing.assert_close(run.logits, clean.logits, atol=1e-5, rtol=0)


@functools.cache
def sites_of(family: str) -> str:
    keys = "1.kv0.k 2.kv0.v" if tiny(family).info.grouped else "1.1.k 2.0.v"
    return f"0.1 1.0.q 1.2.pattern 1.0.scores m1 resid.2 resid.3 embed {keys}"


@every_family
def test_neutral_edits_change_nothing(family):
    model, tokens = tiny(family), tiny_task().clean
    where = sites_of(family)
    before = model.run(tokens, record=where)
    torch.testing.assert_close(before.logits, untouched(family)(tokens).logits, atol=1e-5, rtol=0)
    own = {one: before[one] for one in mk.sites.sites(where)}
    edits = [
        mk.scale(where, 1.0),
        mk.patch_in(where, own),
        *(mk.steer(one, torch.randn(value.shape[-1]), 0.0) for one, value in own.items()),
        mk.attend(HEADS, bias=0.0),
        mk.attend(HEADS, sharpen=1.0),
        *(mk.attend(HEADS, toward=target, alpha=0.0) for target in ("uniform", "identity", "first")),
        mk.attend("1.2", set=before["1.2.pattern"]),
    ]
    for edit in [*edits, None]:
        chosen = edits if edit is None else [edit]
        run = model.run(tokens, edits=chosen)
        torch.testing.assert_close(run.logits, before.logits, atol=1e-5, rtol=0, msg=str(edit))


@every_family
def test_edits_do_what_they_say_to_the_hubs_own_model(family):
    """Every kind of edit at every kind of site, against a plain hook that does the same."""
    model, hf, tokens = tiny(family), untouched(family), tiny_task().clean
    for site in mk.sites.sites(sites_of(family)):
        layer, by_head = max(site.layer, 0), site.kind in literal.BY_HEAD
        value = literal.value_of(hf, tokens, site.kind, layer)
        shape = value[:, 0] if by_head else value[:, :, 0] if site.head is not None else value
        vector = torch.randn(shape.shape[-1], generator=torch.Generator().manual_seed(layer))
        hidden = value < -1e30 if site.kind == "scores" else None

        def change(own, new, site=site, by_head=by_head, hidden=hidden):
            at = (slice(None), site.head) if by_head else (slice(None), slice(None), site.head)
            at = (slice(None),) if site.head is None else at
            before = own.clone()
            own[at] = new(own[at])
            return own if hidden is None else torch.where(hidden, before, own)

        cases = {
            mk.scale(str(site), -0.5): lambda old: old * -0.5,
            mk.ablate(str(site)): torch.zeros_like,
            mk.steer(str(site), vector, 2.0): lambda old, vector=vector: old + 2 * vector,
        }
        for edit, new in cases.items():
            tap = functools.partial(change, new=new)
            expected = literal.run_changed(hf, tokens, {(site.kind, layer): tap})
            logits = model.run(tokens, edits=[edit]).logits
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=1e-4, msg=f"{site} {edit}")
            assert not torch.allclose(logits, hf(tokens).logits, atol=1e-3) or site.kind in "qk", site


@every_family
def test_uniform_ablation_is_even_attention_over_the_visible_keys(family):
    model, hf, tokens = tiny(family), untouched(family), tiny_task().clean
    for layer, head in ((0, 1), (1, 2), (2, 0)):
        visible = literal.value_of(hf, tokens, "scores", layer)[:, head] > -1e30

        def even(pattern, visible=visible, head=head):
            pattern[:, head] = visible / visible.sum(-1, keepdim=True)
            return pattern

        expected = literal.run_changed(hf, tokens, {("pattern", layer): even})
        site = f"{layer}.{head}"
        run = model.run(tokens, record=f"{site}.pattern", edits=[mk.ablate(site, "uniform")])
        torch.testing.assert_close(run.logits, expected, atol=TOLERANCE, rtol=1e-4)
        assert not run[f"{site}.pattern"].triu(1).any()


@every_family
def test_generating_with_edits_is_running_the_whole_text_again_for_every_token(family):
    model, tokens = tiny(family), tiny_task(n=2, length=6).clean
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    for edits in (
        [],
        [mk.ablate("1.1"), mk.scale("m0", 0.5)],
        [mk.steer("resid.1", vector, 3.0, positions=[-1])],
        [mk.steer("resid.1", vector, 3.0, positions=[2, 7])],
        [mk.scale(sites_of(family), 0.7)],
        [mk.attend("0.0 1.1", toward="uniform"), mk.attend("2.0", mask=[0]), mk.attend("1.0", bias=2.0, keys=[1, 8])],
        [mk.attend("2.3", mask=[-1]), mk.attend("1.2", toward="first", alpha=0.5), mk.attend("0.1", sharpen=0.1)],
        [mk.attend("1.1", set={1: 0.5, 3: 0.5}), mk.ablate("2.0", "uniform", positions=[4, 6])],
    ):

        def run(text: torch.Tensor, edits=edits) -> torch.Tensor:
            # A position that this text does not reach yet is edited when it does.
            reached = [edit for edit in edits if _first_position(edit) < text.shape[1]]
            return model.run(text, edits=[_within(edit, text.shape[1]) for edit in reached]).logits

        expected = literal.continue_by_rerunning(run, tokens, 6)
        made = model.generate(tokens, max_new_tokens=6, edits=edits, eos_token_id=None)
        assert torch.equal(made, expected), edits


def _first_position(edit) -> int:
    return min(edit.positions) if isinstance(edit.positions, tuple) else 0


def _within(edit, length: int):
    import dataclasses

    changes = {}
    for name in ("positions", "keys"):
        value = getattr(edit, name, None)
        if isinstance(value, tuple):
            changes[name] = tuple(p for p in value if p < length)
    return dataclasses.replace(edit, **changes)


@every_family
def test_attention_edits_do_what_they_say(family):
    model, tokens = tiny(family), tiny_task().clean
    site = "1.2"
    record = [f"{site}.pattern", f"{site}.scores", f"{site}.z"]
    before = model.run(tokens, record=record)
    scores, pattern = before[f"{site}.scores"], before[f"{site}.pattern"]
    visible = scores > -1e30
    sinks = getattr(model.hf.model.layers[1].self_attn, "sinks", None) if family == "gpt-oss" else None

    def softmax(new: torch.Tensor) -> torch.Tensor:
        if sinks is None:
            return new.softmax(-1)
        extra = sinks[2].expand(*new.shape[:-1], 1)
        return torch.cat([new, extra], -1).softmax(-1)[..., :-1]

    def after(**how) -> torch.Tensor:
        return model.run(tokens, record=record, edits=[mk.attend(site, **how)])[f"{site}.pattern"]

    close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
    biased = scores.clone()
    biased[..., 1] += 2.0
    close(after(bias=2.0, keys=[1]), softmax(torch.where(visible, biased, scores)))
    close(after(sharpen=3.0), softmax(torch.where(visible, scores * 3, scores)))
    hidden = scores.clone()
    hidden[..., 0] = torch.finfo(scores.dtype).min
    masked = softmax(hidden)
    masked[~(visible & (torch.arange(9) != 0)).any(-1)] = 0
    close(after(mask=[0]), masked)
    close(after(toward="identity"), torch.eye(9).expand_as(pattern))
    first = torch.nn.functional.one_hot(visible.int().argmax(-1), 9).float()
    close(after(toward="first", alpha=0.25), 0.75 * pattern + 0.25 * first)
    sees = visible[..., 4:5]
    close(after(set={4: 1.0}), torch.where(sees, (torch.arange(9) == 4).float(), pattern))
    partly = after(toward="identity", positions=[3, -1])
    close(partly[:, [0, 1, 2, 4, 5, 6, 7]], pattern[:, [0, 1, 2, 4, 5, 6, 7]])
    close(partly[:, [3, 8]], torch.eye(9)[[3, 8]].expand_as(partly[:, [3, 8]]))


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_float32_effects_roughly(family, dtype):
    from families import plain

    model = mk.load((plain(family, dtype=dtype), None), device="cpu")
    task = tiny_task(n=2)
    sites = "heads patterns mlps"
    half = mk.patch(model, task, sites, progress=False).frame
    assert model.info.dtype == str(dtype).removeprefix("torch.")
    whole = mk.patch(tiny(family), task, sites, progress=False).frame
    spread = float(whole.metric.abs().max())
    assert float((half.metric - whole.metric).abs().max()) < 0.15 * max(1.0, spread)


def test_the_families_are_those_of_the_design():
    assert len(FAMILIES) == 24
    assert tiny("llama").info.d_vocab == VOCAB


def test_an_edit_of_a_position_that_is_never_reached_is_an_error():
    model, tokens = tiny("llama"), tiny_task(n=1, length=5).clean
    with pytest.raises(EditError, match=r"Position 40 .*never reached"):
        model.generate(tokens, max_new_tokens=2, edits=[mk.scale("0.1", 0.5, positions=[40])])
