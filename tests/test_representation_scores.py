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
from mechkit.head_scores.divergence import apart, divergence, token_divergence
from mechkit.head_scores.redundancy import merged, redundancy
from mechkit.head_scores.semantic import kept, roles, semantic_distance
from mechkit.head_scores.similarity import MEASURES, alike_by_kernels, similarity

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


# -- similarity -----------------------------------------------------------------------------------------------


def literal_pairs(model, hub, task, of, measure):
    """Of every two heads of a layer, from activations of one prompt after the other, or from matrices."""
    runs = [literal.seen(hub, row, "z pattern") for row in task.clean]
    attention = [model.bridge.blocks[layer].attn for layer in range(3)]

    def of_head(layer, head):
        group = head * model.n_kv_heads // model.n_heads
        if of == "output":
            return torch.cat([run["z", layer][:, head] for run in runs])
        if of == "pattern":
            return torch.cat([run["pattern", layer][head] for run in runs])
        weights = mk.HeadWeights.load(model)
        read = getattr(weights, "W_K" if of == "k" else "W_V")[layer, group].double()
        return read @ weights.W_O[layer, head].double() if of == "ov" else read

    found = {}
    for layer in range(len(attention)):
        for head in range(4):
            for other in range(head + 1, 4):
                a, b = of_head(layer, head), of_head(layer, other)
                if of == "output" and measure == "cosine":
                    each = [literal.cosine(x, y) for x, y in zip(a, b, strict=True)]
                    found[f"{layer}.{head}", f"{layer}.{other}"] = sum(each) / len(each)
                else:
                    found[f"{layer}.{head}", f"{layer}.{other}"] = literal.likenesses(a, b, measure)
    return found


WAYS = [(of, measure) for of, measures in MEASURES.items() for measure in measures]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
@pytest.mark.parametrize(("of", "measure"), WAYS)
def test_similarity_is_the_literal_one(family, of, measure):
    model, task = tiny(family), tiny_task(n=3, length=6)
    found = similarity(model, task, of=of, measure=measure)
    own = literal_pairs(model, untouched(family), task, of, measure)
    assert len(found) == len(own) == 18
    for row in found.frame.itertuples():
        assert row.score == pytest.approx(own[row.site, row.other], abs=2e-4)


@pytest.mark.parametrize(("of", "measure"), WAYS)
def test_all_pairs_have_those_of_a_layer(of, measure):
    model, task = tiny("llama"), tiny_task(n=3, length=6)
    every = similarity(model, task, of=of, measure=measure, within="all")
    assert len(every) == 12 * 11 // 2
    own = similarity(model, task, of=of, measure=measure).frame.set_index(["site", "other"])["score"]
    same = every.frame[every.frame["layer"] == every.frame["other_layer"]].set_index(["site", "other"])["score"]
    assert same.sort_index().to_numpy() == pytest.approx(own.sort_index().to_numpy(), abs=1e-5)
    square = every.matrix()
    assert np.allclose(square, square.T)
    assert np.allclose(np.diag(square), 1)


def twins() -> mk.Model:
    """A grouped-query model whose heads 1.0 and 1.1, which share a key and value, have one query too."""
    hub = plain("llama")
    with torch.no_grad():
        query = hub.model.layers[1].self_attn.q_proj.weight
        query[8:16] = query[:8]
    return mk.load((hub, None), device="cpu")


@pytest.mark.parametrize(("of", "measure"), WAYS)
def test_duplicates_are_alike(of, measure):
    found = similarity(twins(), tiny_task(), of=of, measure=measure).frame.set_index(["site", "other"])["score"]
    shared = of in ("k", "v")
    if of == "ov":  # their ways out differ
        assert found["1.0", "1.1"] < 0.99
    else:
        assert found["1.0", "1.1"] == pytest.approx(1, abs=1e-4)
        assert found["0.0", "0.1"] == pytest.approx(1, abs=1e-4) if shared else found["0.0", "0.1"] < 0.99
    assert found["1.1", "1.2"] < 0.99


def test_a_rotation_leaves_cka():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=draw)
    turned = x @ torch.linalg.qr(torch.randn(5, 5, generator=draw)).Q + 3
    assert float(alike_by_kernels(torch.stack([x, turned]))[0, 1]) == pytest.approx(1, abs=1e-5)


def test_some_tokens_are_drawn():
    model, task = tiny("llama"), tiny_task(n=6)
    few = similarity(model, task, tokens=8, seed=1)
    again, other = (similarity(model, task, tokens=8, seed=seed) for seed in (1, 2))
    assert few.frame.equals(again.frame)
    assert not np.allclose(few.frame["score"], other.frame["score"])


# -- redundancy and merging -----------------------------------------------------------------------------------


def test_duplicates_are_redundant_and_merge_for_nothing():
    model, task = twins(), tiny_task(n=6)
    found = redundancy(model, task, threshold=0.999)
    table = found.frame.set_index("site")
    assert table.loc[["1.0", "1.1"], "score"].to_numpy() == pytest.approx(1, abs=1e-4)
    assert table.drop(["1.0", "1.1"])["score"].eq(0).all()
    assert table.loc["1.0", "cluster"] == table.loc["1.1", "cluster"] == 0
    costs = merged(model, task, clusters=found)
    assert len(costs) == 1
    assert costs.frame["score"].iloc[0] == pytest.approx(0, abs=1e-5)
    logits = model.run(task).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), task.clean[:, 1:].flatten())
    assert costs.meta["loss"] == pytest.approx(float(loss), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
def test_merging_is_giving_each_the_mean(family):
    model, task = tiny(family), tiny_task(n=3)
    found = redundancy(model, task, clusters=2)
    assert found.frame.groupby("layer")["cluster"].nunique().eq(2).all()
    costs = merged(model, task, clusters=found).frame
    assert costs["layer"].tolist()[:-1] == [0, 1, 2]
    # The last layer alone: its z is the unedited run's, so that a patch of means is the same.
    z = model.run(task, record=[str(one) for one in model.heads() if one.layer == 2])
    edits = []
    for _, some in found.frame[found.frame["layer"] == 2].groupby("cluster"):
        mean = torch.stack([z[site] for site in some["site"]]).mean(0)
        edits.append(mk.patch_in(list(some["site"]), mean))
    losses = []
    for some in ([], edits):
        logits = model.run(task, edits=some).logits[:, :-1]
        losses.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), task.clean[:, 1:].flatten())))
    assert costs["score"][2] == pytest.approx(losses[1] - losses[0], abs=1e-4)
    assert abs(costs["score"][2]) > 1e-3
    assert costs["heads"].tolist() == [2, 2, 2, 6]


def test_one_cluster_has_the_mean_of_all_pairs():
    model, task = tiny("llama"), tiny_task()
    pairs, found = similarity(model, task, of="pattern"), redundancy(model, task, of="pattern", clusters=1)
    for row in found.frame.itertuples():
        own = pairs.frame[(pairs.frame["site"] == row.site) | (pairs.frame["other"] == row.site)]["score"]
        assert row.score == pytest.approx(own.mean())


def test_similarity_elsewhere(both):
    task = tiny_task()
    for of in ("output", "pattern", "ov", "k"):
        ours, theirs = (similarity(one, task, of=of) for one in both)
        assert ours.frame["score"].to_numpy() == pytest.approx(theirs.frame["score"].to_numpy(), abs=1e-4)
    ours, theirs = (merged(one, task, clusters=redundancy(one, task, clusters=2)) for one in both)
    assert ours.frame["score"].to_numpy() == pytest.approx(theirs.frame["score"].to_numpy(), abs=1e-4)


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda m, t: similarity(m, t, of="q"), errors.OptionError, "of = 'q'"),
        (lambda m, t: similarity(m, t, measure="js"), errors.OptionError, "cka, cosine"),
        (lambda m, t: similarity(m, t, within="model"), errors.OptionError, "within = 'model'"),
        (lambda m, t: similarity(m, t, tokens=1), errors.OptionError, "tokens = 1"),
        (lambda m, t: similarity(m), errors.PromptError, "No data"),
        (lambda m, t: similarity(m, torch.tensor([[5]])), errors.PromptError, "at least two"),
        (lambda m, t: redundancy(m, t, clusters=5), errors.OptionError, "clusters = 5"),
        (lambda m, t: redundancy(m, t, threshold=2), errors.OptionError, "threshold = 2"),
        (lambda m, t: merged(m, t, clusters=redundancy(m, t, clusters=4)), errors.OptionError, "one head each"),
        (lambda m, t: merged(m, t, clusters=semantic_distance(m, t)), errors.OptionError, "a column cluster"),
        (
            lambda m, t: merged(m, torch.tensor([[5]]), clusters=redundancy(m, t, clusters=1)),
            errors.PromptError,
            "one token",
        ),
    ],
)
def test_bad_similarity(call, kind, told):
    with pytest.raises(kind, match=told):
        call(tiny("llama"), tiny_task())
