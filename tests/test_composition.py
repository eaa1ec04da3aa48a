"""Composition equals its dense definition, and its baseline what unrelated directions give when they are drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from families import FAMILIES, tiny
from reference import weights as dense
from torch.testing import assert_close

import mechkit as mk
from mechkit.errors import LoadError, OptionError, SiteError
from mechkit.weights.head_weights import HeadWeights
from mechkit.weights.rotation import rotations

every_family = pytest.mark.parametrize("family", FAMILIES)
each_kind = pytest.mark.parametrize("kind", ["q", "k", "v"])
ROTATED = ["llama", "gpt-j", "gemma3", "olmo2"]


def doubled(weights: HeadWeights) -> HeadWeights:
    """In float64, so that directions of nearly equal singular values are those of the definition."""
    return replace(weights, **{f"W_{kind}": getattr(weights, f"W_{kind}").double() for kind in "QKVO"})


def drawn(layers: int = 4, heads: int = 4, groups: int = 4, d: int = 48, d_head: int = 6, seed: int = 0) -> HeadWeights:
    """Weights of no model, all random."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(heads, d, d_head), (groups, d, d_head), (groups, d, d_head), (heads, d_head, d)]
    return HeadWeights("drawn", *(torch.randn(layers, *shape, generator=draw) for shape in shapes))


def place(head: str) -> tuple[int, int]:
    layer, number = head.split(".")
    return int(layer), int(number)


def assert_as_defined(weights: HeadWeights, frame: pd.DataFrame, kind: str, turns: torch.Tensor | None = None) -> None:
    for (sender, receiver), rows in frame.groupby(["sender", "receiver"], observed=True):
        first = dense.ov(weights, place(sender))
        second = dense.reader(weights, place(receiver), kind, turns)
        whole, parts = rows[rows["component"].isna()], rows[rows["component"].notna()]
        assert whole["score"].item() == pytest.approx(dense.composition(first, second), rel=1e-5)
        assert parts["component"].tolist() == [*range(len(parts))]
        assert np.allclose(parts["score"], dense.by_component(first, second, len(parts)), rtol=1e-5, atol=1e-6)


@every_family
@each_kind
def test_every_pair_and_component_equals_the_definition(family, kind):
    weights = doubled(HeadWeights.of(tiny(family)))
    turns = None if kind == "v" else rotations(tiny(family), [0])
    frame = mk.composition(weights, kind=kind).frame
    assert len(frame) == 48 * (1 + weights.d_head)
    assert_as_defined(weights, frame, kind, turns)
    single = mk.composition(tiny(family), kind=kind).frame  # in float32
    wholes = frame["component"].isna()
    assert np.allclose(single["score"][wholes], frame["score"][wholes], rtol=1e-5)
    assert np.allclose(single["z"][wholes], frame["z"][wholes], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ROTATED)
@pytest.mark.parametrize("kind", ["q", "k"])
def test_of_queries_and_keys_at_a_distance(family, kind):
    weights = doubled(HeadWeights.of(tiny(family)))
    near = mk.composition(weights, "0.1", "1.2 2.0", kind)
    for offset in (1, [0, 3]):
        found = mk.composition(weights, "0.1", "1.2 2.0", kind, offset=offset)
        turns = rotations(tiny(family), [offset] if isinstance(offset, int) else offset)
        assert_as_defined(weights, found.frame, kind, turns)
        assert not np.allclose(found.frame["score"], near.frame["score"], rtol=1e-3)
        assert found.meta["offset"] == offset


def test_senders_come_in_any_order_and_only_before_their_receivers():
    weights = drawn(groups=2)
    frame = mk.composition(weights, "2.1 0.3 1.0 3.3", "1.1.q 3.2 0.0").frame
    pairs = set(map(tuple, frame[["sender", "receiver"]].to_numpy()))
    assert pairs == {("0.3", "1.1"), ("0.3", "3.2"), ("1.0", "3.2"), ("2.1", "3.2")}
    assert_as_defined(weights, frame, "q")
    every = mk.composition(weights, kind="k").frame
    assert len(every) == 6 * 16 * 7
    assert all(place(row.sender) < (place(row.receiver)[0], 0) for row in every.itertuples())
    assert not every.duplicated(["sender", "receiver", "component"]).any()


def test_senders_in_small_batches_are_the_same(monkeypatch):
    whole = mk.composition(drawn()).frame
    monkeypatch.setattr("mechkit.weights.composition._NUMBERS", 1000)
    rows = mk.composition(drawn()).frame
    pd.testing.assert_frame_equal(rows, whole, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"centre": False}, {"centre": True}, {"fold_norm": False}])
def test_the_baseline_is_what_random_directions_and_matrices_give(family, options):
    weights = HeadWeights.of(tiny(family), **options)
    # Where neither writes nor reads have a mean, unrelated directions have none.
    basis = dense.without_mean(32) if weights.centred and weights.W_Q.mean(2).abs().max() < 1e-6 else None
    found = mk.composition(weights, "0.1", "2.2", "v").frame
    first, second = dense.ov(weights, (0, 1)), dense.ov(weights, (2, 2))
    directions = dense.of_random_directions(second, 20000, basis=basis)
    matrices = dense.of_random_matrices(first, second, 4000, basis=basis)
    for row in found.itertuples():
        squares = matrices if pd.isna(row.component) else directions
        error = float(squares.std()) / len(squares) ** 0.5
        assert row.baseline**2 == pytest.approx(float(squares.mean()), abs=5 * error)
        literal = float((row.score**2 - squares.mean()) / squares.std())
        assert row.z == pytest.approx(literal, rel=0.06, abs=0.1)


def test_unrelated_heads_have_z_around_0_and_of_size_1():
    frame = mk.composition(drawn(5, 6, 6, 64, 8)).frame
    for rows in (frame[frame["component"].isna()], frame[frame["component"].notna()]):
        assert abs(rows["z"].mean()) < 0.2
        assert 0.8 < rows["z"].std() < 1.2


@each_kind
def test_a_planted_link_is_the_largest_outlier(kind):
    weights, draw = drawn(groups=2), torch.Generator().manual_seed(7)
    w, a, b = (torch.nn.functional.normalize(torch.randn(n, generator=draw), dim=0) for n in (48, 6, 6))
    weights.W_O[1, 2] += 40 * torch.outer(a, w)
    # 3.1 reads with group 0, so that of keys and values 3.0 has the link as well.
    reads = {"q": weights.W_Q[3, 1], "k": weights.W_K[3, 0], "v": weights.W_V[3, 0]}[kind]
    reads += 40 * torch.outer(w, b)
    found = mk.composition(weights, kind=kind)
    top = found.outliers(k=2)
    links = {"3.1"} if kind == "q" else {"3.0", "3.1"}
    assert set(top["sender"][: len(links)]) == {"1.2"}
    assert set(top["receiver"][: len(links)]) == links
    others = found.frame[(found.frame["sender"] != "1.2") & found.frame["component"].notna()]
    assert top["z"][0] > 2 * others["z"].max()
    channel = found.channel("1.2", "3.1")
    assert channel.dimensions == 1
    assert float((channel.basis[0] @ w).abs()) > 0.95
    assert found.components("1.2", "3.1") == [int(top["component"][0])]
    assert found.channel("1.2", "3.1").name == f"1.2 to 3.1.{kind}: {found.components('1.2', '3.1')}"


def test_views_of_the_table_are_of_its_rows():
    weights = drawn()
    found = mk.composition(weights)
    frame = found.frame
    assert list(frame.columns) == ["sender", "receiver", "kind", "component", "score", "baseline", "z"]
    pair = found.of_pair("0.1", "2.3")
    assert len(pair) == 7
    assert pair["z"].is_monotonic_decreasing
    parts = frame[frame["component"].notna()]
    few = found.outliers(z=2.0)
    assert len(few) == (parts["z"] >= 2.0).sum() > 0
    assert few["z"].is_monotonic_decreasing
    assert len(found.outliers(z=-99.0)) == len(parts)
    pd.testing.assert_frame_equal(found.outliers(z=-99.0, k=5), found.outliers(z=-99.0).head(5))
    wholes = found.pairs()
    assert len(wholes) == 96
    for row in wholes.sample(10, random_state=0).itertuples():
        rows = found.of_pair(row.sender, row.receiver)
        assert row.score == rows["score"][rows["component"].isna()].item()
        best = rows[rows["component"].notna()].iloc[0]
        assert (row.top_component, row.top_score, row.top_z) == (best["component"], best["score"], best["z"])
    chosen = found.components("0.1", "2.3", 3)
    assert chosen == pair[pair["component"].notna()]["component"].head(3).tolist()
    three = found.channel("0.1", "2.3", 3)
    assert_close(three.basis, mk.svd(weights, "0.1").subspace(chosen).basis, atol=1e-5, rtol=0)
    assert (found.meta["kind"], found.meta["offset"]) == ("q", 0)


def test_without_components_there_are_only_whole_matrices():
    weights = drawn()
    found = mk.composition(weights, components=False)
    whole = mk.composition(weights).frame
    pd.testing.assert_frame_equal(found.frame, whole[whole["component"].isna()].reset_index(drop=True))
    assert len(found.pairs()) == len(found.frame) == 96
    assert found.outliers(z=-99.0).empty
    with pytest.raises(OptionError, match="components=True"):
        found.channel("0.0", "1.0")


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_saved_and_loaded_is_the_same(suffix, tmp_path):
    found = mk.composition(tiny("llama"), kind="k", offset=2)
    again = mk.Composition.load(found.save(tmp_path / f"composition{suffix}"))
    exact = suffix == ".parquet"
    frame = again.frame.astype({"component": "Int16"})  # a column of text has no missing whole numbers
    pd.testing.assert_frame_equal(
        frame, found.frame, check_exact=exact, check_dtype=exact, check_categorical=exact, rtol=1e-6
    )
    assert (again.unit, again.meta) == (found.unit, found.meta)
    assert again.components("0.1", "2.3", 2) == found.components("0.1", "2.3", 2)
    assert again.outliers(1.0)["sender"].tolist() == found.outliers(1.0)["sender"].tolist()
    assert len(again.pairs()) == len(found.pairs())
    with pytest.raises(OptionError, match="loaded table"):
        again.channel("0.1", "2.3")
    assert "pairs and components" in repr(again)
    assert "norm of the product, over the product of norms" in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "kind", "names"),
    [
        ({"kind": "z"}, OptionError, "kind = 'z'"),
        ({"kind": "v", "offset": 1}, OptionError, "offset = 1 of values"),
        ({"offset": 1}, OptionError, "weights from a file"),
        ({"senders": "9.0"}, SiteError, "9.0"),
        ({"senders": "0.0.q"}, SiteError, "0.0.q"),
        ({"senders": ""}, SiteError, "No heads"),
        ({"receivers": ""}, SiteError, "No heads"),
        ({"receivers": "0.9"}, SiteError, "0.9"),
        ({"receivers": "1.0.k"}, SiteError, '"1.0.k" as a receiver of kind "q"'),
        ({"receivers": "1.kv0.k", "kind": "k"}, SiteError, "1.kv0.k"),
        ({"receivers": "m1"}, SiteError, "m1"),
        ({"receivers": "0.0"}, SiteError, "0 against 0"),
        ({"senders": "3.0", "receivers": "2.1"}, SiteError, "3 against 2"),
        ({"senders": "3.0"}, SiteError, "3 against 3"),
        ({"model": "nowhere.safetensors", "n_heads": 4}, LoadError, "no file"),
    ],
)
def test_bad_input_is_named(options, kind, names):
    with pytest.raises(kind, match=names):
        mk.composition(**{"model": drawn(), **options})


@pytest.mark.parametrize(
    ("call", "kind", "names"),
    [
        (lambda found: found.of_pair("2.0", "1.0"), SiteError, "not among the pairs"),
        (lambda found: found.of_pair("0.0", "9.0"), SiteError, "not among the pairs"),
        (lambda found: found.components("0.0", "1.0", 7), OptionError, "k = 7 of 6"),
        (lambda found: found.channel("0.0", "1.0", 0), OptionError, "k = 0"),
    ],
)
def test_pairs_and_components_that_are_not_there_are_named(call, kind, names):
    with pytest.raises(kind, match=names):
        call(mk.composition(drawn()))


def test_a_head_that_writes_nothing_composes_with_nothing():
    weights = drawn()
    weights.W_O[0, 1] = 0
    found = mk.composition(weights)
    rows = found.frame.loc[found.frame["sender"] == "0.1"]
    assert (rows.loc[rows["component"].isna(), "score"] == 0).all()
    assert rows["z"].isna().all()
    assert "0.1" not in set(found.pairs()["sender"].astype(str))
    assert not found.outliers(z=-1e9).query("sender == '0.1'").size
