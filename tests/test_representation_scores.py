"""Scores of heads by what they put out: divergence by context, semantic distance, similarity and merging."""

from __future__ import annotations

import elsewhere
import numpy as np
import pytest
import torch
from families import plain, tiny, tiny_task, untouched
from reference import representation as literal

import mechkit as mk
from mechkit import errors
from mechkit.heads.divergence import apart, divergence, token_divergence
from mechkit.heads.semantic import kept, roles, semantic_distance

FAMILIES = ("gpt2", "llama", "gemma2", "neox", "granite")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    place = elsewhere.folder(tmp_path_factory.mktemp("models"), "llama")
    return mk.load(place, remote="local"), mk.load(place, device="cpu")


def grid(table, n=0):
    """Scores ``[layers, heads]``, of one prompt where there is a row each."""
    rows = table.frame[table.frame["prompt"] == n] if "prompt" in table.frame else table.frame
    return rows.sort_values(["layer", "head"])["score"].to_numpy().reshape(3, 4)


# -- divergence by context ------------------------------------------------------------------------------------


def spanned(n=3, length=9) -> mk.Task:
    task = tiny_task(n=n, length=length)
    spans = {"context": torch.tensor([[2, 4]] * n)}
    return mk.Task.from_tokens(task.clean, task.corrupt, task.correct, task.wrong, spans=spans)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("distance", "positions", "last"), [("l2", "last", 1), ("cosine", 3, 3), ("relative", 5, 5)])
def test_divergence_is_the_literal_one(family, distance, positions, last):
    task = spanned()
    table = divergence(tiny(family), task, span="context", distance=distance, positions=positions, each=True)
    means = divergence(tiny(family), task, span="context", distance=distance, positions=positions)
    own = []
    for row in task.clean:
        shorter = torch.cat([row[:2], row[4:]])
        own.append(literal.divergences(untouched(family), row, shorter, last, distance).mean(0).numpy())
    for i, one in enumerate(own):
        assert grid(table, i) == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert grid(means) == pytest.approx(np.mean(own, 0), rel=1e-3, abs=1e-4)
    assert means.frame["score"].max() > 0.01


def test_distances_by_hand():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    assert float(apart(a, b, "l2")) == pytest.approx(4)
    assert float(apart(a, b, "relative")) == pytest.approx(0.8)
    assert float(apart(a, b, "cosine")) == pytest.approx(1 - 0.6)
    assert [float(apart(a, a, how)) for how in ("l2", "cosine", "relative")] == pytest.approx([0, 0, 0])


def test_ways_of_saying_without(both):
    _, model = both
    task = spanned()
    by_span = divergence(model, task, span="context", positions="response")
    shorter = torch.stack([torch.cat([row[:2], row[4:]]) for row in task.clean])
    by_ids = divergence(model, task.clean, without=shorter, positions="response")
    texts = [
        tuple(" ".join(f"w{i}" for i in row.tolist()) for row in pair) for pair in zip(task.clean, shorter, strict=True)
    ]
    by_pairs = divergence(model, texts, positions="response")
    for one in (by_ids, by_pairs):
        assert one.frame["score"].to_numpy() == pytest.approx(by_span.frame["score"].to_numpy(), abs=1e-6)


def test_prompts_of_several_lengths(both):
    _, model = both
    pairs = [("w5 w6 w7 w8 w9", "w5 w8 w9"), ("w9 w8 w7 w6 w5 w4 w3", "w9 w8 w3")]
    together = divergence(model, pairs, positions="response", each=True)
    for i, pair in enumerate(pairs):
        alone = divergence(model, [pair], positions="response", each=True)
        assert grid(together, i) == pytest.approx(grid(alone), abs=1e-5)


def test_each_token(both):
    far, own = both
    pair = ("w5 w6 w7 w8 w9 w10", "w5 w8 w9 w10")
    found = token_divergence(own, pair, k=3)
    assert found.frame["token"].str.strip().tolist() == ["w8", "w9", "w10"]
    assert found.frame["position"].tolist() == [3, 4, 5]
    ids = [torch.tensor([int(word[1:]) for word in text.split()]) for text in pair]
    heads = literal.divergences(untouched("llama"), *ids, 3, "l2").flatten(1)
    assert found.frame["score"].to_numpy() == pytest.approx(heads.topk(3).values.mean(1).numpy(), rel=1e-3)
    there = token_divergence(far, pair, k=3)
    assert there.frame["score"].to_numpy() == pytest.approx(found.frame["score"].to_numpy(), abs=1e-4)
    one = token_divergence(own, pair, k=1, heads="1.2")
    table = divergence(own, [pair], heads="1.2")
    assert one.frame["score"].iloc[-1] == pytest.approx(table.frame["score"].iloc[0], rel=1e-5)


@pytest.mark.parametrize(
    ("data", "how", "kind", "told"),
    [
        (spanned(), {"span": "context", "distance": "l1"}, errors.OptionError, "l1"),
        (spanned(), {"span": "IO"}, errors.TaskError, "IO"),
        (spanned(), {}, errors.OptionError, "alone"),
        ([("w5 w6", "w6")], {"span": "IO"}, errors.OptionError, "list"),
        ([("w5 w6", "w5")], {}, errors.PromptError, "end otherwise"),
        ([("w5 w6", "w5 w6")], {}, errors.PromptError, "the same"),
        ([("w5 w6", "w6")], {"positions": 2}, errors.OptionError, "shares its last 1"),
        ([("w5 w6", "w6")], {"positions": 0}, errors.OptionError, "positions = 0"),
        (["w5 w6"], {"without": ["w6", "w7"]}, errors.PromptError, "as many"),
        (spanned(), {"span": "END"}, errors.PromptError, "end otherwise"),
    ],
)
def test_bad_pairs(both, data, how, kind, told):
    with pytest.raises(kind, match=told):
        divergence(both[1], data, **how)


def test_bad_count_of_heads(both):
    with pytest.raises(errors.OptionError, match="k = 13"):
        token_divergence(both[1], ("w5 w6", "w6"), k=13)
    with pytest.raises(errors.PromptError, match="2 pairs"):
        token_divergence(both[1], [("w5 w6", "w6")] * 2)


# -- semantic distance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("window", "keys", "pool"), [(32, 256, 7), (4, 3, 1), (5, 4, 3)])
def test_semantic_distance_is_the_literal_one(family, window, keys, pool):
    model, task = tiny(family), tiny_task(n=2)
    lengths = torch.tensor([9, 7])
    ids = [task.clean[i, :length] for i, length in enumerate(lengths.tolist())]
    padded = task.clean.clone()
    padded[1, 7:] = 0
    task = mk.Task.from_tokens(padded, task.corrupt, task.correct, task.wrong, lengths=lengths)
    table = semantic_distance(model, task, window=window, keys=keys, pool=pool, each=True)
    for i, row in enumerate(ids):
        own = literal.semantic_distances(untouched(family), model, row, window, keys, pool)
        assert grid(table, i) == pytest.approx(own.numpy(), rel=1e-3, abs=1e-4)


def test_kept_by_hand():
    pattern = torch.tensor([[[0.5, 0.1, 0.4], [0.1, 0.2, 0.7]]])
    assert kept(pattern, 3, 1) is pattern
    assert kept(pattern, 1, 1).tolist() == [[[0, 0, pytest.approx(0.4)], [0, 0, pytest.approx(0.7)]]]


def test_roles_by_hand():
    distances = torch.tensor([[4.0, 3, 2, 1], [1.0, 2, 3, 4], [1.0, 4, 3, 2]])
    assert roles(distances, 0.5, 1) == [
        ["heterogeneous", "heterogeneous", "other", "central"],
        ["central", "other", "heterogeneous", "heterogeneous"],  # between 2 and 1, to the even one
        ["central", "heterogeneous", "other", "other"],
    ]
    assert roles(torch.ones(1, 2), 1.0, 0) == [["heterogeneous", "heterogeneous"]]


def test_heads_that_write_the_same_are_at_the_centre():
    model = mk.load((plain("llama"), None), device="cpu")
    attention = model.hf.model.layers[1].self_attn
    with torch.no_grad():  # all four heads alike: one query, one key, one value, one way out
        for name, groups in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
            weight = getattr(attention, name).weight
            weight.copy_(weight[:8].repeat(groups, 1))
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, :8].repeat(1, 4))
    found = grid(semantic_distance(model, tiny_task()))
    assert found[1].max() < 1e-5
    assert found[0].min() > 1e-2


def test_semantic_distance_elsewhere(both):
    ours, theirs = (semantic_distance(one, tiny_task(), window=4, keys=5) for one in both)
    elsewhere.same(ours, theirs)
    assert ours.frame["role"].equals(theirs.frame["role"])


@pytest.mark.parametrize(
    ("how", "told"),
    [({"window": 0}, "window = 0"), ({"pool": 2}, "pool = 2"), ({"beta": 2}, "beta = 2"), ({"top": 5}, "top = 5")],
)
def test_bad_semantic_options(how, told):
    with pytest.raises(errors.OptionError, match=told):
        semantic_distance(tiny("llama"), tiny_task(), **how)
