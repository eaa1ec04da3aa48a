"""Attention sinks: labels on streams made by hand, measures against the Hub's own activations."""

from __future__ import annotations

import math

import elsewhere
import numpy as np
import pytest
import torch
from families import tiny, tiny_task, untouched
from reference import representation as literal

import mechkit as mk
from mechkit import errors
from mechkit.head_scores.massive import massive_dims
from mechkit.head_scores.sinks import _seen, labelled, received, sink_layers, sinks

FAMILIES = ("gpt2", "llama", "gemma2", "neox", "opt")
L, FIRST, LAST = 20, 3, 18


def streams(lifetimes: dict[int, tuple[int, int]], pos: int = 8) -> torch.Tensor:
    """``[layers + 1, pos, d]``: the first token is large from FIRST to LAST, others like it for as long as is said."""
    draw = torch.Generator().manual_seed(0)
    made = torch.randn(L + 1, pos, 64, generator=draw)
    large = torch.randn(64, generator=draw) * 100
    made[FIRST : LAST + 1, 0] = large
    for position, (first, end) in lifetimes.items():
        made[first:end, position] = -large * 0.5  # the size of the cosine counts
    return made


def of_streams(made: torch.Tensor):
    around = sink_layers(made[:, 0].norm(dim=-1))
    cosines = torch.nn.functional.cosine_similarity(made, made[:, :1].expand_as(made), dim=-1)
    return around, {one.position: one for one in labelled(cosines, around, 0.9, 0.3, 1 / 12)}


def test_labels_of_planted_sinks():
    """Of 20 layers: 14 and more are like the first token's, one or none is noise."""
    around, found = of_streams(streams({2: (3, 18), 4: (5, 12), 5: (7, 8), 6: (10, 12), 7: (1, 3)}))
    assert around == (FIRST, LAST)
    labels = {0: "primary", 2: "primary-like", 4: "secondary", 5: "noise", 6: "secondary"}
    assert {position: one.label for position, one in found.items()} == labels
    assert found[4].streams == tuple(range(5, 12))  # 7 only was one before the sink layers
    assert found[0].streams == tuple(range(FIRST, LAST + 1))


def test_as_long_as_the_first_is_like_the_first():
    made = streams({})
    made[:, 0] = made[0, 0]
    made[8:13, 0] = made[8:13, 3] = 50 * made[0, 0]
    around, found = of_streams(made)
    assert around == (8, 12)
    assert found[3].label == "primary-like"


def test_no_sinks():
    _, found = of_streams(streams({}))
    assert list(found) == [0]
    falling = torch.arange(5, 0, -1)[:, None, None] * torch.ones(5, 3, 4)
    assert sink_layers(falling[:, 0].norm(dim=-1)) is None
    assert [one.streams for one in labelled(torch.ones(5, 3), None, 0.9, 0.3, 0.1)] == [()]
    assert sink_layers(torch.tensor([1.0, 9.0, 10.0])) == (1, 2)  # it never falls again


def test_attention_received_by_hand():
    pattern = torch.tensor([[1.0, 0, 0], [0.75, 0.25, 0], [0.5, 0.3, 0.2]]).expand(2, 1, 3, 3)
    found = received(pattern, torch.tensor([3, 2]))[:, 0]
    assert found[0, :2].tolist() == pytest.approx([0.625, 0.3])
    assert float(found[1, 0]) == pytest.approx(0.75)
    assert found.isnan().tolist() == [[False, False, True], [False, True, True]]


def ids(lengths=(9, 6, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    clean = tiny_task(n=len(lengths)).clean.clone()
    for row, length in enumerate(lengths):
        clean[row, length:] = 0
    return clean, torch.tensor(lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_are_the_literal_ones(family):
    model, hub, (clean, lengths) = tiny(family), untouched(family), ids()
    found = _seen(model, clean, lengths)
    for row, length in enumerate(lengths.tolist()):
        own = literal.seen(hub, clean[row, :length], "resid mlp pattern")
        for position in range(length):
            for layer in range(model.n_layers + 1):
                one, first = own["resid", layer][position], own["resid", layer][0]
                assert found["norms"][row, layer, position] == pytest.approx(float(one.norm()), rel=1e-4)
                assert found["cosines"][row, layer, position] == pytest.approx(literal.cosine(one, first), abs=1e-4)
            for layer in range(model.n_layers):
                after = own["resid", layer + 1]
                mlp = own["mlp", layer][position]
                attention = after[position] - own["resid", layer][position] - mlp
                for name, part in (("mlp", mlp), ("attention", attention)):
                    along = abs(literal.cosine(part, after[0]))
                    assert found[name][row, layer, position] == pytest.approx(along, abs=1e-3), name
                own_share = literal.attention_received(own["pattern", layer], position)
                share = float(found["received"][row, layer, position])
                assert share == pytest.approx(own_share, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table(family):
    task = tiny_task()
    table = sinks(tiny(family), task, cosine=0.3, noise=0.0)
    assert table.frame.groupby("prompt")["label"].first().eq("primary").all()
    assert len(table.meta["layers"]) == len(task)
    later = table.frame[table.frame["position"] > 0]
    assert len(later)
    assert (later["cosine"] > 0.3).all()
    assert later["source"].isin(["mlp", "attention"]).all()
    assert (
        later["lifetime"] <= [last - first + 1 for first, last in map(table.meta["layers"].__getitem__, later.prompt)]
    ).all()
    none = sinks(tiny(family), task, cosine=1.0)
    assert (none.frame["label"] == "primary").all()


def test_a_copy_of_the_first_token_is_like_it():
    """Without positions and with one token only, every stream is the first one's."""
    model = tiny("llama")
    table = sinks(model, torch.full((1, 6), 7), noise=0.0)
    layers = table.meta["layers"][0]
    assert (table.frame["label"].iloc[1:] == "primary-like").all()
    assert (table.frame["lifetime"] == layers[1] - layers[0] + 1).all()
    assert table.frame["cosine"].to_numpy() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_massive_dimensions_are_the_literal_ones(family):
    model, hub, task = tiny(family), untouched(family), tiny_task()
    table, largest = massive_dims(model, task, tau=2.5), []
    for row in task.clean:
        own = literal.seen(hub, row, "resid")
        over = [
            own["resid", layer].abs() / own["resid", layer].square().mean(-1, keepdim=True).sqrt() for layer in range(4)
        ]
        largest.append(torch.stack(over).amax((0, 1)))
    sizes = torch.stack(largest)
    wanted = ((sizes > 2.5).double().mean(0) >= 0.5).nonzero()[:, 0].tolist()
    assert wanted
    assert sorted(table.dims) == wanted
    for row in table.frame.itertuples():
        assert row.score == pytest.approx(float(sizes[:, row.dim].mean()), rel=1e-4)
        assert row.share == float((sizes[:, row.dim] > 2.5).double().mean())
    assert table.frame["score"].is_monotonic_decreasing
    assert massive_dims(model, task, tau=5.6).dims == []


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda model, task: sinks(model, task, cosine=1.2), "cosine = 1.2"),
        (lambda model, task: sinks(model, task, share=-1), "share = -1"),
        (lambda model, task: massive_dims(model, task), "tau = 20.0 with d_model = 32"),
        (lambda model, task: massive_dims(model, task, tau=0), "tau = 0"),
    ],
)
def test_bad_options(call, told):
    with pytest.raises(errors.OptionError, match=told):
        call(tiny("llama"), tiny_task())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_same_elsewhere(family, tmp_path):
    place = elsewhere.folder(tmp_path, family)
    far, own = mk.load(place, remote="local"), mk.load(place, device="cpu")
    ours, theirs = (sinks(one, tiny_task(), cosine=0.3) for one in (far, own))
    assert ours.frame[["position", "label", "layer"]].equals(theirs.frame[["position", "label", "layer"]])
    assert np.allclose(ours.frame["score"], theirs.frame["score"], atol=1e-4, equal_nan=True)
    assert massive_dims(far, tiny_task(), tau=2.5).dims == massive_dims(own, tiny_task(), tau=2.5).dims


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_saved_and_loaded(suffix, tmp_path):
    from mechkit.head_scores.sinks import SinkTokens

    table = sinks(tiny("llama"), tiny_task(), cosine=0.3)
    again = SinkTokens.load(table.save(tmp_path / f"sinks{suffix}"))
    assert again.frame["label"].tolist() == table.frame["label"].tolist()
    assert again.meta["layers"] == table.meta["layers"]


@pytest.mark.real_model
def test_smollm2_has_its_sink(smollm2):
    table = sinks(smollm2, "The quick brown fox jumps over the lazy dog near the bank of the river.")
    first = table.frame.iloc[0]
    assert (first["label"], first["layer"]) == ("primary", 11)
    assert first["source"] == "mlp"
    assert first["score"] > 0.4
    assert massive_dims(smollm2, "The quick brown fox jumps over the lazy dog.").dims[0] == 507
    assert math.isfinite(first["norm"])
