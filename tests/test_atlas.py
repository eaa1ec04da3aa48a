"""The atlas of patterns: shapes made by hand fall into clusters of their own."""

from __future__ import annotations

import elsewhere
import numpy as np
import pytest
import torch
from families import tiny, tiny_task, untouched
from reference import representation as literal

import mechkit as mk
from mechkit import errors
from mechkit.head_scores.atlas import PatternAtlas, _pictures, atlas, grouped, picture

SHAPES = ("diagonal", "previous", "first", "uniform", "induction")


def shape(name: str, n: int, noise: float, draw: torch.Generator) -> torch.Tensor:
    at = torch.arange(n)
    scores = torch.zeros(n, n)
    if name == "diagonal":
        scores[at, at] = 1
    if name == "previous":
        scores[at, (at - 1).clamp_min(0)] = 1
    if name == "first":
        scores[:, 0] = 1
    if name == "uniform":
        scores = torch.ones(n, n).tril() / (at[:, None] + 1)
    if name == "induction":  # the second half looks at what followed the same token in the first
        half = n // 2
        scores[at, torch.where(at >= half, at - half + 1, 0)] = 1
    other = torch.rand(n, n, generator=draw).tril()
    mixed = (1 - noise) * scores + noise * other / other.sum(-1, keepdim=True)
    return mixed / mixed.sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "size"), [(40, 32), (24, 32), (64, 32), (33, 16)])
def test_shapes_fall_apart(n, size, seed):
    draw = torch.Generator().manual_seed(seed)
    truth = np.repeat(np.arange(5), 12)
    noises = (torch.rand(60, generator=draw) * 0.5).tolist()
    patterns = [shape(SHAPES[kind], n, noise, draw) for kind, noise in zip(truth, noises, strict=True)]
    found = grouped(picture(torch.stack(patterns), size), 16, 5, seed)["cluster"]
    pure = sum(np.bincount(truth[found == number]).max() for number in range(found.max() + 1))
    assert pure / 60 >= 0.95


def test_pictures_by_hand():
    diagonal = torch.eye(32)[None]
    assert torch.allclose(picture(diagonal, 32), diagonal, atol=1e-6)
    for n in (5, 32, 100):
        found = picture(torch.ones(2, n, n).tril() / (torch.arange(n)[:, None] + 1), 16)
        assert torch.allclose(found.sum(-1), torch.ones(2, 16))
        assert float(found.triu(1).abs().max()) == 0
        first = picture(torch.eye(n)[:1].expand(n, n)[None], 16)
        assert (first[0].argmax(-1) == 0).all()


def test_what_is_told_of_clusters():
    draw = torch.Generator().manual_seed(0)
    pictures = torch.stack([shape("first", 16, 0.2, draw) for _ in range(4)] + [shape("diagonal", 16, 0.2, draw)] * 2)
    found = grouped(pictures, 16, 2, 0)
    assert found["cluster"].tolist() == [0, 0, 0, 0, 1, 1]  # the largest first
    assert found["distance"][4:] == pytest.approx(0, abs=1e-6)
    assert found["explained"].sum() == pytest.approx(1)
    points = found["points"]
    flat = pictures.double().flatten(1).numpy()
    apart = [np.linalg.norm(x[0] - x[5]) for x in (points, flat)]
    assert apart[0] == pytest.approx(apart[1])  # all components are kept
    same = grouped(torch.ones(3, 4, 4), 16, 3, 0)
    assert same["cluster"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
def test_patterns_are_the_model_s(family):
    model, clean = tiny(family), tiny_task(n=3).clean.clone()
    lengths = torch.tensor([9, 5, 7])
    found = _pictures(model, clean, lengths, 8)
    own = torch.zeros(3, 4, 8, 8, dtype=torch.double)
    for row, length in zip(clean, lengths.tolist(), strict=True):
        run = literal.seen(untouched(family), row[:length], "pattern")
        for layer in range(3):
            own[layer] += picture(run["pattern", layer], 8) / 3
    torch.testing.assert_close(found.double(), own, atol=1e-5, rtol=1e-4)


def test_the_table(tmp_path):
    found = atlas(tiny("llama"), tiny_task(), size=8, clusters=3)
    assert len(found) == 12
    assert sorted(set(found.frame["cluster"])) == [0, 1, 2]
    counts = found.frame["cluster"].value_counts(sort=False).sort_index().tolist()
    assert counts == sorted(counts, reverse=True)
    for number, one in enumerate(found.meta["patterns"]):
        assert one["site"] == found.cluster(number)[0]
        assert np.array(one["pattern"]).shape == (8, 8)
    assert len(found.plot().axes) == 4
    assert atlas(tiny("llama"), tiny_task(), size=8, clusters=3).frame.equals(found.frame)
    again = PatternAtlas.load(found.save(tmp_path / "atlas.csv"))
    assert again.cluster(0) == found.cluster(0)
    assert len(again.plot().axes) == 4
    with pytest.raises(errors.OptionError, match="Cluster 3"):
        found.cluster(3)


@pytest.mark.parametrize(
    ("how", "told"),
    [({"size": 1}, "size = 1"), ({"clusters": 13}, "1 to 12"), ({"components": 1}, "components = 1")],
)
def test_bad_options(how, told):
    with pytest.raises(errors.OptionError, match=told):
        atlas(tiny("llama"), tiny_task(), **how)


def test_the_same_elsewhere(tmp_path):
    place = elsewhere.folder(tmp_path, "gemma2")
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    ours, theirs = (atlas(one, tiny_task(), size=8, clusters=3) for one in (far, own))
    assert ours.frame["cluster"].equals(theirs.frame["cluster"])
    assert np.allclose(ours.frame["score"], theirs.frame["score"], atol=1e-4)
