"""What taking out a head does: all heads at once equal a loop of whole runs with one head out."""

from __future__ import annotations

import elsewhere
import numpy as np
import pytest
import torch
from families import FAMILIES, VOCAB, tiny, tiny_task, untouched
from reference.ablations import divergence, largest_angle, mean_loss, without

import mechkit as mk
from mechkit import errors
from mechkit.head_scores.causal import leave_one_out, ships
from mechkit.head_scores.greedy_group import largest_angle as angle_of
from mechkit.head_scores.greedy_group import sahara

SOME = ("gpt2", "llama", "gemma2", "neox", "mistral")
HEADS = [(layer, head) for layer in range(3) for head in range(4)]


def ids(n: int = 3, length: int = 9, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def numbers(scores, column: str = "score") -> np.ndarray:
    return scores.frame[column].to_numpy(dtype=float)


def by_edits(model: mk.Model, prompts, ablation: str, reference=None) -> torch.Tensor:
    """Next-token loss ``[heads, n]`` of a loop of runs with one edit each."""
    found = []
    for head in model.heads():
        edit = mk.ablate(str(head), ablation, reference)  # type: ignore[arg-type]
        found.append(mean_loss(model.run(prompts, edits=[edit]).logits, model.tokens(prompts)))
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ablation", ["zero", "uniform"])
def test_loss_is_that_of_whole_runs(family, ablation):
    model, own = untouched(family), tiny(family)
    base = mean_loss(own.run(ids()).logits, ids())
    if family == "gpt-oss" and ablation == "uniform":  # an even pattern leaves nothing to the sink
        losses = by_edits(own, ids(), ablation)
    else:
        losses = torch.stack([mean_loss(without(model, ids(), [one], ablation), ids()) for one in HEADS])
    scores = leave_one_out(own, ids(), ablation=ablation, progress=False)
    assert numbers(scores) == pytest.approx((losses - base).mean(1).numpy(), abs=1e-4)
    assert numbers(scores, "se") == pytest.approx(((losses - base).std(1) / 3**0.5).numpy(), abs=1e-4)
    assert scores.unit == "nats a token"
    assert scores.meta["options"]["base"] == pytest.approx(float(base.mean()), abs=1e-4)
    assert np.abs(numbers(scores)).max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox", "mistral", "qwen2"])
def test_even_attention_is_what_a_query_of_zero_gives(family):
    model = untouched(family)
    masked = torch.stack([mean_loss(without(model, ids(), [one], "no query"), ids()) for one in HEADS])
    base = mean_loss(tiny(family).run(ids()).logits, ids())
    scores = leave_one_out(tiny(family), ids(), ablation="uniform", progress=False)
    assert numbers(scores) == pytest.approx((masked - base).mean(1).numpy(), abs=1e-4)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("ablation", ["zero", "mean", "resample", "uniform"])
def test_a_tasks_metric(family, ablation):
    model, task = tiny(family), tiny_task()
    scores = leave_one_out(model, task, ablation=ablation, each=True, progress=False)
    table = leave_one_out(model, task, ablation=ablation, progress=False)
    clean = mk.metrics.logit_diff(model.run(task).logits, task)
    reference = task if ablation in ("mean", "resample") else None
    for head in model.heads():
        run = model.run(task, edits=[mk.ablate(str(head), ablation, reference)])  # type: ignore[arg-type]
        metric = mk.metrics.logit_diff(run.logits, task)
        rows = scores.frame[scores.frame.site == str(head)]
        assert rows.score.to_numpy() == pytest.approx((metric - clean).numpy(), abs=1e-4)
        row = table.frame[table.frame.site == str(head)].iloc[0]
        assert row.score == pytest.approx(float((metric - clean).mean()), abs=1e-4)
        assert row.metric == pytest.approx(float(metric.mean()), abs=1e-4)
    assert table.unit == "logits"


@pytest.mark.parametrize("metric", ["prob", "loss", "kl"])
def test_metrics_of_the_whole_vocabulary_and_prompts_of_several_lengths(metric):
    model = tiny("llama")
    task = mk.Task.join([tiny_task(3, 9, seed=1), tiny_task(2, 5, seed=2)]).with_metric(metric)
    scores = leave_one_out(model, task, heads="0.1 2.3", each=True, progress=False)
    for head in ("0.1", "2.3"):
        for i in range(5):
            one = task[[i]]
            own, run = model.run(one).logits[:, -1], model.run(one, edits=[mk.ablate(head)]).logits[:, -1]
            change = one.metric(run, one, own) - one.metric(own, one, own)
            row = scores.frame[(scores.frame.site == head) & (scores.frame.prompt == i)].iloc[0]
            assert row.score == pytest.approx(float(change), abs=1e-5)


def test_padding_is_not_counted():
    model = tiny("gemma2")
    task = mk.Task.join([tiny_task(2, 9, seed=1), tiny_task(2, 8, seed=2)])
    from mechkit.head_scores.causal import _measured

    every = tuple(model.heads())
    base, values = _measured(model, "loss", task.clean, task.lengths, every, "uniform", 0.0, None, None, False)
    for i in range(4):
        alone = leave_one_out(model, task.clean[i, : task.lengths[i]], ablation="uniform", progress=False)
        assert numbers(alone) == pytest.approx((values[:, i] - base[i]).numpy(), abs=1e-4)


def test_means_of_free_text():
    model, task = tiny("llama"), tiny_task()
    scores = leave_one_out(model, ids(), ablation="mean", reference=task, progress=False)
    change = by_edits(model, ids(), "mean", task) - mean_loss(model.run(ids()).logits, ids())
    assert numbers(scores) == pytest.approx(change.mean(1).numpy(), abs=1e-4)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("ablation", ["uniform", "zero"])
def test_ships(family, ablation):
    model = untouched(family)
    base = model(ids()).logits[:, -1]
    literal = torch.stack([divergence(base, without(model, ids(), [one], ablation)[:, -1]) for one in HEADS])
    scores = ships(tiny(family), ids(), ablation=ablation, each=True, progress=False)
    assert numbers(scores) == pytest.approx(literal.detach().flatten().numpy(), abs=1e-4)
    assert numbers(scores).max() > 1e-2


def test_ships_of_a_scaled_head():
    model = tiny("llama")
    whole = ships(model, ids(), ablation="scale", eps=1.0, progress=False)
    assert np.abs(numbers(whole)).max() < 1e-6
    nothing, zero = (ships(model, ids(), ablation=how, progress=False) for how in ("scale", "zero"))
    assert numbers(nothing) == pytest.approx(numbers(zero), abs=1e-3)
    half = ships(model, ids(), ablation="scale", eps=0.5, heads="1.2", progress=False)
    own, run = (model.run(ids(), edits=edits).logits[:, -1] for edits in ([], [mk.scale("1.2", 0.5)]))
    assert float(half.frame.score[0]) == pytest.approx(float(divergence(own, run).mean()), abs=1e-5)


def test_a_planted_head_comes_first():
    planted = mk.planted.induction()
    scores = leave_one_out(planted.model, planted.task, progress=False)
    assert {str(one) for one in scores.heads(2)} == {"0.0", "1.0"}
    assert (scores.top(2).score < -1).all()  # the metric falls


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("family", elsewhere.FAMILIES)
def test_the_same_elsewhere(places, family):
    place = elsewhere.folder(places, family)
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    for call in (
        lambda model: leave_one_out(model, ids(), ablation="uniform", progress=False),
        lambda model: leave_one_out(model, elsewhere.TASK(), ablation="mean", progress=False),
        lambda model: ships(model, ids(), progress=False),
    ):
        elsewhere.same(call(far), call(own))


def test_bad_input():
    model = tiny("llama")
    with pytest.raises(errors.OptionError, match="ablation = 'gone'"):
        leave_one_out(model, ids(), ablation="gone")  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="ablation = 'mean'"):
        ships(model, ids(), ablation="mean")  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="eps"):
        ships(model, ids(), ablation="scale", eps=float("nan"))
    with pytest.raises(errors.EditError, match="without a reference"):
        leave_one_out(model, ids(), ablation="mean")
    with pytest.raises(errors.EditError, match="values of 4 prompts"):
        leave_one_out(model, ids(), ablation="resample", reference=tiny_task(), progress=False)
    with pytest.raises(errors.PromptError, match="single token"):
        leave_one_out(model, ids(length=1))
    with pytest.raises(errors.SiteError, match=r"9\.9"):
        leave_one_out(model, ids(), heads="9.9")
    with pytest.raises(errors.SiteError, match="No heads"):
        leave_one_out(model, ids(), heads=[])


def last_hidden(model, tokens, heads, how="uniform") -> torch.Tensor:
    """What the unembedding of the Hub's own model is given at the last token ``[n, d_model]``."""
    kept = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: kept.append(args[0][:, -1]))
    try:
        without(model, tokens, heads, how)
    finally:
        handle.remove()
    return kept[0]


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(("rank", "side"), [(1, "samples"), (2, "samples"), (1, "features"), (2, "features")])
def test_sahara(family, rank, side):
    model, prompts = untouched(family), ids(n=6)
    own = last_hidden(model, prompts, [])
    literal = [largest_angle(own, last_hidden(model, prompts, [one]), rank, side) for one in HEADS]
    scores = sahara(tiny(family), prompts, rank=rank, side=side, progress=False)
    assert numbers(scores) == pytest.approx(literal, abs=0.02)
    assert numbers(scores).max() > 1
    assert set(scores.frame.n) == {6}
    assert "round" not in scores.frame


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("ablation", ["uniform", "zero"])
def test_a_group_grows_by_its_best_head(family, ablation):
    model, prompts = untouched(family), ids(n=6)
    own, group, found = last_hidden(model, prompts, []), [], []
    for _ in range(3):
        left = [one for one in HEADS if one not in group]
        angles = [
            largest_angle(own, last_hidden(model, prompts, [*group, one], ablation), 1, "samples") for one in left
        ]
        group.append(left[int(np.argmax(angles))])
        found.append(max(angles))
    scores = sahara(tiny(family), prompts, k=3, ablation=ablation, progress=False)
    assert scores.meta["group"] == [f"{layer}.{head}" for layer, head in group]
    chosen = scores.frame.dropna(subset="round").sort_values("round")
    assert list(chosen.site) == scores.meta["group"]
    assert chosen.group_score.to_numpy() == pytest.approx(found, abs=0.02)
    assert chosen.group_score.iloc[0] == chosen.score.iloc[0] == scores.frame.score.max()


def test_a_group_by_means():
    model, task = tiny("llama"), tiny_task(6)
    scores = sahara(model, task, k=2, ablation="mean", progress=False)
    first, second = scores.meta["group"]
    edits = [[], [mk.ablate(first, "mean", task)], [mk.ablate([first, second], "mean", task)]]
    norm = tiny("llama").bridge.ln_final
    own, one, both = (norm(model.run(task, record="resid.3", edits=e)["resid.3"])[:, -1] for e in edits)
    frame = scores.frame.set_index("site")
    assert frame.group_score[first] == pytest.approx(largest_angle(own, one, 1, "samples"), abs=0.02)
    assert frame.group_score[second] == pytest.approx(largest_angle(own, both, 1, "samples"), abs=0.02)


def test_angles_of_known_planes():
    turn = torch.tensor([[1.0, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]]).float()
    x = torch.tensor([[3.0, 0, 0], [0, 2, 0], [0, 0, 0.1]])
    found = angle_of(x, torch.stack([x, x @ turn.T, 5 * x]), 2, "features")
    assert found == pytest.approx([0, np.rad2deg(0.3), 0], abs=1e-5)
    tiny_turn = angle_of(
        x.double(), x.double() @ torch.linalg.matrix_exp(1e-9 * (turn - turn.T)).double(), 2, "features"
    )
    assert 0 < float(tiny_turn) < 1e-6  # an arccosine would give 0


def test_bad_input_of_sahara():
    model = tiny("llama")
    with pytest.raises(errors.PromptError, match="2 prompts for rank = 2"):
        sahara(model, ids(n=2), rank=2)
    for option in ({"side": "left"}, {"rank": 0}, {"k": 13}, {"ablation": "scale"}):
        with pytest.raises(errors.OptionError, match=next(iter(option))):
            sahara(model, ids(n=6), **option)


@pytest.mark.parametrize("family", elsewhere.FAMILIES)
def test_sahara_elsewhere(places, family):
    place = elsewhere.folder(places, family)
    far, own = (
        sahara(mk.load(place, **where), ids(n=6), k=2, progress=False)
        for where in ({"remote": "local"}, {"device": "cpu"})
    )
    assert far.meta["group"] == own.meta["group"]
    assert numbers(far) == pytest.approx(numbers(own), abs=0.02)


@pytest.mark.real_model
def test_induction_heads_help_on_repeated_tokens(smollm2):
    from mechkit.head_scores.repeated import repeated_tokens

    prompts = repeated_tokens(smollm2, n=1, length=16)
    run = smollm2.run(prompts, record=[f"{layer}.0.pattern" for layer in range(30)])
    width = prompts.shape[1]
    query = torch.arange(width - 16, width)
    induction = {str(head): float(run[f"{head}.pattern"][:, query, query - 15].mean()) for head in smollm2.heads()}
    best = sorted(induction, key=lambda head: -induction[head])[:3]
    assert induction[best[2]] > 0.3
    scores = leave_one_out(smollm2, prompts, ablation="uniform", heads=best, progress=False)
    assert (scores.frame.score > 0).all()
    literal = by_edits_of(smollm2, prompts, best)
    assert numbers(scores) == pytest.approx(literal, abs=1e-4)


def by_edits_of(model: mk.Model, prompts: torch.Tensor, heads: list[str]) -> list[float]:
    runs = [model.run(prompts, edits=edits).logits for edits in ([], *([mk.ablate(one, "uniform")] for one in heads))]
    base, *out = (torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), prompts[:, 1:].flatten()) for x in runs)
    return [float(one - base) for one in out]
