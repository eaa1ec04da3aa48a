"""The views of scores and tokens, and what linked views share."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from families import tiny, tiny_task

import mechkit as mk
from mechkit import errors
from mechkit.results import Scores
from mechkit.view.widget import linked

PROMPTS = torch.tensor([[5, 9, 12, 30, 8], [7, 9, 40, 30, 8]])


def _state(page: str) -> list[dict]:
    return json.loads(re.search(r'id="state">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def scores(model):
    return mk.patch(model, tiny_task(), "heads", progress=False)


def test_every_score_is_in_the_map_where_it_belongs(model, scores):
    view = scores.show()
    grid = scores.grid()
    assert len(view.about["cells"]) == model.n_layers * model.n_heads
    for cell in view.about["cells"]:
        layer, head = map(int, cell["site"].split("."))
        assert (cell["column"], cell["row"]) == (layer, head)
        assert cell["score"] == pytest.approx(grid[layer, head], rel=1e-5)
    assert view.site == str(scores.ranked()[0])
    assert view.about["unit"] == scores.unit


def test_positions_have_rows(model):
    found = mk.patch(model, tiny_task(), "resid", positions="each", progress=False)
    view = found.show()
    grid = found.grid()
    for cell in view.about["cells"]:
        assert cell["site"] == f"resid.{cell['column']}@{cell['row']}"
        assert cell["score"] == pytest.approx(grid[cell["column"], cell["row"]], rel=1e-5)
    view.selection = ["resid.1@2"]
    assert view.picture().axes


def test_shared_keys_and_mlps_can_be_shown(model):
    for sites in ("k", "mlps", "heads mlps"):
        found = mk.patch(model, tiny_task(), sites, progress=False)
        assert found.show().picture().axes
    assert all(cell["site"].startswith("m") for cell in found.show("mlp").about["cells"])


def test_edge_scores_are_shown_by_node(model):
    found = mk.edges(model, tiny_task(), method="eap", progress=False)
    view = found.show()
    assert len(view.about["cells"]) == model.n_layers * model.n_heads
    nodes = found.nodes().frame.set_index("site")["score"]
    for cell in view.about["cells"]:
        assert cell["score"] == pytest.approx(nodes[cell["site"]], abs=1e-5)


def test_what_was_not_scored_is_left_out():
    frame = pd.DataFrame(
        {
            "site": ["0.0", "0.1"],
            "layer": [0, 0],
            "head": pd.array([0, 1], "Int64"),
            "kind": "z",
            "score": [0.5, np.nan],
        }
    )
    assert [cell["site"] for cell in Scores(frame, "effect").show().about["cells"]] == ["0.0"]
    with pytest.raises(errors.OptionError, match="at least one"):
        Scores(frame.assign(score=np.nan), "effect").show()


def test_only_known_sites_are_chosen(scores):
    view = scores.show()
    view.selection = "1.1 0.2"
    assert view.selection == ["1.1", "0.2"]
    view.selection = mk.heads("0.1")
    assert view.selection == ["0.1"]
    with pytest.raises(errors.SiteError, match=r"9\.9"):
        view.selection = ["9.9"]
    with pytest.raises(errors.SiteError):
        view.site = "m1"
    assert view.selection == ["0.1"]


def test_linked_views_follow_each_other_as_far_as_they_can(model, scores):
    attention = mk.view.attention(model, PROMPTS[:1], scores=scores)
    mixed = mk.patch(model, tiny_task(), "mlps", progress=False)
    view, mlps = scores.show(), mixed.show()
    linked(view, attention, mlps)
    view.selection = ["1.1", "2.0"]
    assert attention.selection == ["1.1", "2.0"]
    assert mlps.selection == []
    attention.selection = mk.heads("0.3")
    assert view.selection == ["0.3"]
    attention.head = "2.2"
    assert view.site == "2.2"
    before = view.site
    mlps.site = "m0" if mlps.site != "m0" else "m1"
    assert (view.site, attention.head) == (before, before)
    mlps.selection = ["m1"]
    assert view.selection == attention.selection == ["0.3"]  # what is chosen beside what a view knows stays
    attention.selection = ["1.0"]
    assert mlps.selection == ["m1"]
    assert view.selection == ["1.0"]


def test_views_in_several_groups_keep_what_the_others_do_not_know(model, scores):
    attention = mk.view.attention(model, PROMPTS[:1])
    first = Scores(scores.frame.iloc[:4], scores.unit, scores.meta).show(link=attention)
    second = Scores(scores.frame.iloc[2:6], scores.unit, scores.meta).show(link=[first, attention])
    known, other = scores.frame["site"].iloc[3], scores.frame["site"].iloc[8]
    attention.selection = [other, known]
    assert attention.selection == [other, known]
    assert first.selection == second.selection == [known]
    second.selection = []
    assert attention.selection == [other]
    assert first.selection == []


def test_a_token_is_locked_only_where_there_is_one(model):
    attention = mk.view.attention(model, PROMPTS[:1])
    words = mk.view.tokens(["a", "b"], [1.0, 2.0])
    linked(attention, words)
    attention.token = 4
    assert words.token == -1
    words.token = 1
    assert attention.token == 1


def test_link_by_argument(model, scores):
    attention = mk.view.attention(model, PROMPTS[:1])
    view = scores.show(link=attention)
    view.site = "1.2"
    assert attention.head == "1.2"
    attention.selection = ["0.0"]
    assert view.selection == ["0.0"]


def test_tokens_of_any_numbers():
    words = ["Hello", "\n", " שלום", " 👩‍🚀", "�", "</script>", "<!--", "<script>"]
    values = [0.5, -2.0, 0.0, 1.0, 0.25, -0.125, 0.0, 0.5]
    view = mk.view.tokens(words, values, unit="bits")
    assert [(one["token"], one["score"], one["rest"]) for one in view.about["tokens"]] == [
        (word, value, None) for word, value in zip(words, values, strict=True)
    ]
    assert view.about["limit"] == 2.0
    (state,) = _state(view.to_html())
    assert [one["token"] for one in state["traits"]["about"]["tokens"]] == words
    data, _ = view._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "bits" in data["text/plain"]
    for wrong in ([1.0], [[1.0] * 8], [1, 2, 3, 4, 5, 6, 7, float("nan")], None):
        with pytest.raises(errors.OptionError, match="one finite number a token"):
            mk.view.tokens(words, wrong)
    with pytest.raises(errors.OptionError):
        mk.view.tokens("text", [1.0] * 4)


def test_a_page_of_several_views_has_each_script_once(model, scores):
    from mechkit.view.page import page

    attention = mk.view.attention(model, PROMPTS[:1], PROMPTS[1:])
    first, second = scores.show(), scores.show()
    made = page("together", "words", [first, attention, second])
    assert made.count('class="code"') == 2
    assert made.count("class ScoresView") == 1
    assert [one["code"] for one in _state(made)] == [0, 1, 0]


def test_the_same_can_be_handed_to_circuitsvis(model):
    attention = mk.view.attention(model, PROMPTS[:1], PROMPTS[1:])
    attention.selection = ["1.1", "2.0"]
    shown = str(attention.to_circuitsvis())
    assert '"1.1", "2.0"' in shown
    pattern = model.run(PROMPTS[:1], record=["2.0.pattern"])["2.0.pattern"][0]
    given = json.loads(re.search(r'"attention": (\[\[\[.*?\]\]\])', shown, re.DOTALL)[1])
    assert np.allclose(given[1], pattern, atol=1e-3)  # half precision is kept
    assert "0.25" in str(mk.view.tokens(["a", "b"], [0.25, -1.0]).to_circuitsvis())


def test_order_by_score_needs_scores(model, scores):
    plain = mk.view.attention(model, PROMPTS[:1])
    with pytest.raises(errors.OptionError, match="scores="):
        plain.order = "score"
    mk.view.attention(model, PROMPTS[:1], scores=scores).order = "score"


@pytest.mark.parametrize(
    ("value", "largest", "text"),
    [(0.25, 1.0, ".25"), (-0.25, 1.0, "-.25"), (30.25, 31.0, "30.2"), (-10.33, 12.0, "-10.3"), (0.0123, 0.05, ".012")],
)
def test_numbers_in_cells_are_short_and_right(value, largest, text):
    from mechkit.view.figures import _short

    assert _short(value, largest) == text
