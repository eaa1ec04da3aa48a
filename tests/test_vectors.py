"""Vectors of heads and probes: against recordings of runs, and on data of which the answer is known."""

from __future__ import annotations

import elsewhere
import numpy as np
import pytest
import torch
from families import tiny, tiny_task, untouched
from reference import representation as literal

import mechkit as mk
from mechkit import errors, planted
from mechkit.head_scores.passes import head_vectors
from mechkit.head_scores.probe import probe, told_right
from mechkit.head_scores.vectors import differences, steering_vectors, task_vectors

FAMILIES = ("gpt2", "llama", "gemma2", "neox")


def ragged(n=4) -> mk.Task:
    task = tiny_task(n=n)
    lengths = torch.tensor([9, 6, 8, 9][:n])
    clean, corrupt = task.clean.clone(), task.corrupt.clone()
    for row, length in enumerate(lengths.tolist()):
        clean[row, length:] = corrupt[row, length:] = 0
    spans = {"context": torch.tensor([[1, 3], [1, 4], [0, 2], [2, 3]][:n])}
    return mk.Task.from_tokens(clean, corrupt, task.correct, task.wrong, lengths=lengths, spans=spans)


@pytest.mark.parametrize("kind", ["z", "q", "k", "v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_heads_have_is_the_literal(family, kind):
    model, task = tiny(family), ragged()
    positions = torch.stack([task.lengths - 1, torch.tensor([0, -1, 2, 1])], 1)
    found = head_vectors(model, task.clean, task.lengths, positions, kind)
    assert found[1, 1].isnan().all()
    for row in range(4):
        own = literal.seen(untouched(family), task.clean[row, : int(task.lengths[row])], kind)
        for slot, at in enumerate(positions[row].tolist()):
            for layer in range(3) if at >= 0 else ():
                there = own[kind, layer][at]
                for head in range(4):
                    wanted = there[head * len(there) // 4]
                    torch.testing.assert_close(found[row, slot, layer, head].double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_task_vectors_are_means(family):
    model, task = tiny(family), ragged()
    last, second, span = (task_vectors(model, task, positions=where) for where in (-1, 1, "context"))
    runs = [literal.seen(untouched(family), row[:n], "z") for row, n in zip(task.clean, task.lengths, strict=True)]
    for head in model.heads():
        z = [run["z", head.layer][:, head.head] for run in runs]
        for vectors, wanted in (
            (last, [one[-1] for one in z]),
            (second, [one[1] for one in z]),
            (span, [one[a:b].mean(0) for one, (a, b) in zip(z, task.spans["context"].tolist(), strict=True)]),
        ):
            torch.testing.assert_close(vectors[head].double(), torch.stack(wanted).mean(0), atol=1e-4, rtol=1e-4)


def test_a_task_vector_put_in_is_the_run():
    """Of one prompt, what the heads have there is what they are set to."""
    model, tokens = tiny("llama"), tiny_task(n=1).clean
    vectors = task_vectors(model, tokens)
    edited = model.run(tokens, edits=[mk.patch_in(list(vectors), vectors, positions=-1)])
    assert torch.allclose(edited.logits, model.run(tokens).logits, atol=1e-5)
    assert set(task_vectors(model, tokens, heads="1.2 0.3")) == {mk.site("1.2"), mk.site("0.3")}


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_vectors_are_differences(family):
    model, task = tiny(family), ragged()
    raw, scaled = (steering_vectors(model, task, scaled=how) for how in (False, True))
    for head in model.heads():
        sides = []
        for ids in (task.clean, task.corrupt):
            rows = [literal.seen(untouched(family), row[:n], "z") for row, n in zip(ids, task.lengths, strict=True)]
            sides.append(torch.stack([row["z", head.layer][-1, head.head] for row in rows]))
        difference = sides[0].mean(0) - sides[1].mean(0)
        torch.testing.assert_close(raw[head].double(), difference, atol=1e-4, rtol=1e-3)
        direction = difference / difference.norm()
        wanted = direction * (torch.cat(sides) @ direction).std()
        torch.testing.assert_close(scaled[head].double(), wanted, atol=1e-3, rtol=1e-2)


def test_differences_by_hand():
    clean = torch.tensor([[3.0, 1.0], [5.0, -1.0]])[:, None, None]
    corrupt = torch.tensor([[-3.0, 1.0], [-5.0, -1.0]])[:, None, None]
    assert differences(clean, corrupt, False)[0, 0].tolist() == [8, 0]
    assert differences(clean, corrupt, True)[0, 0].tolist() == pytest.approx([np.std([3, 5, -3, -5], ddof=1), 0])
    assert differences(clean, clean, True).abs().max() == 0


def test_steering_a_planted_head_moves_the_answer():
    """With one pair of answers, the way from the corrupt one to the clean one: more of it, more of the metric."""
    circuit = planted.distractor_copy(n=24)
    task = circuit.task
    pair = [i for i in range(24) if task.correct[i] == task.correct[0]]
    clean = task.clean[pair]
    other = clean.where(clean != task.correct[0], task.wrong[0])
    one = mk.Task.from_tokens(clean, other, task.correct[pair], task.wrong[0].expand(len(pair)))
    vector = steering_vectors(circuit.model, one, heads="1.0", scaled=False)[mk.site("1.0")]
    metric = [
        mk.metrics.logit_diff(
            circuit.model.run(one.corrupt, edits=[mk.steer("1.0", vector, alpha=alpha, positions=-1)]).logits, one
        ).mean()
        for alpha in (0.0, 0.5, 1.0)
    ]
    clean = mk.metrics.logit_diff(circuit.model.run(one).logits, one).mean()
    assert metric[0] < metric[1] < metric[2]
    assert float(metric[2]) == pytest.approx(float(clean), abs=1e-4)


# -- probes ---------------------------------------------------------------------------------------------------


def test_a_direction_is_found_and_noise_is_not():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat(100)
    x = torch.randn(200, 1, 2, 8, generator=draw)
    x[:, 0, 0, 3] += 4 * labels
    found = told_right(x, labels, torch.arange(200) % 5, 1.0).mean(0)[0]
    assert found[0] > 0.93  # two standard deviations each way: 0.977 at best
    assert 0.35 < found[1] < 0.65


def test_the_regression_is_its_closed_form():
    """Without a ridge, on the training data of one fold: least squares with an intercept."""
    draw = torch.Generator().manual_seed(1)
    x, labels = torch.randn(30, 1, 1, 3, generator=draw), torch.arange(2).repeat(15)
    fold = torch.arange(30) % 3
    found = told_right(x, labels, fold, 0.0)[:, 0, 0]
    flat = torch.cat([x[:, 0, 0], torch.ones(30, 1)], 1).double()
    for number in range(3):
        held = fold == number
        weight = torch.linalg.lstsq(flat[~held], labels[~held].double()[:, None] * 2 - 1).solution
        wanted = (flat[held] @ weight)[:, 0].sign() == labels[held] * 2 - 1
        assert found[held].bool().tolist() == wanted.tolist()


def test_planted_heads_know_their_task():
    """The last token of the twins is the same: only heads that carry the item can tell them apart."""
    circuit = planted.distractor_copy(n=40)
    task = circuit.task
    items = (task.correct % 2).tolist()
    found = probe(circuit.model, task.clean, labels=items, folds=5).frame.set_index("site")
    assert found.loc[["0.0", "1.0"], "score"].min() == 1.0  # the item, one-hot
    assert found["shuffled"].mean() == pytest.approx(0.5, abs=0.15)
    assert found["n"].eq(40).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["z", "k"])
def test_a_task_s_twins_are_in_one_fold(family, kind):
    model, task = tiny(family), tiny_task(n=12)
    found = probe(model, task, kind=kind, folds=12, heads="1.2 2.0")
    assert found.frame["n"].eq(24).all()
    assert found.frame["score"].between(0, 1).all()
    assert probe(model, task, kind=kind, folds=12, heads="1.2 2.0").frame.equals(found.frame)
    if (family, kind) == ("llama", "k"):  # a group stands for its heads
        shared = probe(model, task, kind=kind, heads="1.0 1.1").frame
        assert shared["score"].nunique() == 1


def test_the_same_elsewhere(tmp_path):
    place = elsewhere.folder(tmp_path, "llama")
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    task = tiny_task(n=8)
    ours, theirs = (steering_vectors(one, task, scaled=False) for one in (far, own))
    assert list(ours) == list(theirs)
    assert all(torch.allclose(ours[head], theirs[head], atol=1e-4) for head in ours)
    ours, theirs = (task_vectors(one, task) for one in (far, own))
    assert all(torch.allclose(ours[head], theirs[head], atol=1e-4) for head in ours)
    ours, theirs = (probe(one, task, folds=4) for one in (far, own))
    assert (ours.frame["score"] - theirs.frame["score"]).abs().max() < 0.13  # a prompt on the border, or two


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda m, t: task_vectors(m, t, positions=20), errors.PromptError, "Position 20"),
        (lambda m, t: task_vectors(m, t, positions="IO"), errors.TaskError, "IO"),
        (lambda m, t: task_vectors(m, t.clean, positions="IO"), errors.TaskError, "no task"),
        (lambda m, t: task_vectors(m, t, heads="9.9"), errors.SiteError, "9.9"),
        (lambda m, t: steering_vectors(m, t.clean), errors.TaskError, "Tensor in place"),
        (lambda m, t: probe(m, t, folds=9), errors.OptionError, "folds = 9"),
        (lambda m, t: probe(m, t, folds=1), errors.OptionError, "folds = 1"),
        (lambda m, t: probe(m, t, kind="result"), errors.OptionError, "kind = 'result'"),
        (lambda m, t: probe(m, t, ridge=-1), errors.OptionError, "ridge = -1"),
        (lambda m, t: probe(m, t.clean), errors.OptionError, "without labels"),
        (lambda m, t: probe(m, t.clean, labels=[0, 1]), errors.OptionError, r"\[4\]"),
        (lambda m, t: probe(m, t.clean, labels=[1, 1, 1, 1]), errors.OptionError, "both of them"),
    ],
)
def test_bad_input(call, kind, told):
    with pytest.raises(kind, match=told):
        call(tiny("llama"), tiny_task())
