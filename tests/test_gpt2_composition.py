"""GPT-2 small: the heads that keep the name mover 9.9 from the repeated name speak to its query in single components.

What is asserted of these four heads is asked of every other set of as many heads of the same layers too.
Wang et al. 2022 for the heads; Merullo et al. 2024 (arXiv 2406.09519) for the components.
"""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pandas as pd
import pytest

import mechkit as mk

ATTENTION = Path(__file__).parents[2] / "shared" / "data" / "gpt2-small-attention.safetensors"
INHIBITION = mk.heads("7.3 7.9 8.6 8.10")
with_file = pytest.mark.skipif(not ATTENTION.is_file(), reason="GPT-2 small's attention weights are not here")


def top_components(found: mk.Composition) -> pd.DataFrame:
    """A row a sender: its component of the largest z, and how far that stands out of the sender's others."""
    parts = found.frame[found.frame["component"].notna()].astype({"sender": str})
    parts = parts.assign(rank=parts["z"].rank(ascending=False).astype(int)).sort_values("z", ascending=False)
    rows = []
    for sender, own in parts.groupby("sender", sort=False):
        others = own["score"].iloc[1:]
        columns = own.iloc[0][["component", "score", "baseline", "z", "rank"]]
        rows.append({"head": sender, **columns, "stands_out": (own["score"].iloc[0] - others.mean()) / others.std()})
    return pd.DataFrame(rows).set_index("head")


def assert_single_components_reach_the_query_of_9_9(source: mk.Model | Path, capture) -> None:
    found = mk.composition(source, None, "9.9.q", n_heads=12)
    components = int(found.frame["component"].notna().sum())
    assert components == 9 * 12 * 64
    tops = top_components(found)
    ours = tops.loc[list(map(str, INHIBITION))]
    with capture.disabled():
        print(f"\ninto the query of 9.9, of {components} components of {len(tops)} heads:")
        print(ours.round(4).to_string())
    assert (ours["rank"] <= 0.01 * components).all()
    assert (ours["z"] > 20).all()
    assert (ours["stands_out"] > 4).all()
    assert (tops["stands_out"] > 4).mean() < 0.2  # of most heads no component does
    # As many other heads of the same layers: how many sets speak as loudly?
    layers = [[f"{layer}.{head}" for head in range(12)] for layer in (7, 8)]
    drawn = [[*one, *other] for one, other in product(*(combinations(heads, 2) for heads in layers))]
    as_loud = sum(tops["z"][some].sum() >= ours["z"].sum() for some in drawn)
    assert as_loud < 0.01 * len(drawn)


@with_file
def test_inhibition_heads_speak_to_the_name_mover_in_single_components(capsys):
    assert_single_components_reach_the_query_of_9_9(ATTENTION, capsys)


@with_file
def test_a_channel_is_the_direction_of_the_top_component():
    found = mk.composition(ATTENTION, INHIBITION, "9.9.q", n_heads=12)
    for head in INHIBITION:
        (component,) = found.components(head, "9.9")
        assert component == found.of_pair(head, "9.9").dropna(subset="component")["component"].iloc[0]
        direction = mk.svd(ATTENTION, head, n_heads=12).Vh[component]
        assert float(found.channel(head, "9.9").without(direction).norm()) < 1e-3


@pytest.mark.hub
def test_the_same_of_the_model_from_the_hub(gpt2, capsys):
    assert_single_components_reach_the_query_of_9_9(gpt2, capsys)
    if ATTENTION.is_file():  # the file is in half precision
        ours, theirs = (mk.composition(one, INHIBITION, "9.9.q", n_heads=12).frame for one in (gpt2, ATTENTION))
        wholes = ours["component"].isna()
        assert ours["score"][wholes].to_numpy() == pytest.approx(theirs["score"][wholes].to_numpy(), rel=1e-2)
