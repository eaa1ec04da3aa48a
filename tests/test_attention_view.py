"""The attention view: its numbers are the model's, its edits do what they say, its page stands by itself."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
from families import tiny, tiny_task

import mechkit as mk
from mechkit import errors

PROMPTS = torch.tensor([[5, 9, 12, 30, 8], [7, 9, 40, 30, 8]])


def _shown(view, name):
    """The bytes of a map as numbers again ``[layers, heads, query, key]``."""
    about = view.about
    n, places = len(about["tokens"]), [one["name"] for one in about["maps"]]
    shape = (len(places), about["layers"], about["heads"], n, n)
    one = about["maps"][places.index(name)]
    raw = np.frombuffer(view.maps, np.uint8).reshape(shape)[places.index(name)].astype(float)
    return ((raw - 128) / 127 if one["signed"] else raw / 255) * one["limit"], one["limit"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt-oss"])
def test_maps_are_the_model_s(family):
    model = tiny(family)
    view = mk.view.attention(model, PROMPTS[:1], PROMPTS[1:])
    kinds = [f"{layer}.{head}.{kind}" for layer in range(3) for head in range(4) for kind in ("pattern", "v", "result")]
    run, other = (model.run(PROMPTS[[i]], record=kinds) for i in (0, 1))
    patterns, _ = _shown(view, "pattern")
    weighted, limit = _shown(view, "value-weighted")
    difference, largest = _shown(view, "difference")
    for layer in range(3):
        for head in range(4):
            own, theirs = (one[f"{layer}.{head}.pattern"][0].numpy() for one in (run, other))
            assert np.abs(patterns[layer, head] - own).max() <= 0.5 / 255 + 1e-6
            assert np.abs(difference[layer, head] - (own - theirs)).max() <= 0.5 / 127 * largest + 1e-6
            value = run[f"{layer}.{head}.v"][0].float() @ model.bridge.blocks[layer].attn.W_O[head].detach()
            moved = own * value.norm(dim=-1).numpy()
            assert np.abs(weighted[layer, head] - moved).max() <= 0.5 / 255 * limit + 1e-5
    exact = np.frombuffer(view.exact_values, np.float16).reshape(5, 5)
    assert np.allclose(exact, run["0.0.pattern"][0], atol=1e-3)
    view.head, view.map = "2.3", "difference"
    assert view.exact_of == "difference|2.3"
    exact = np.frombuffer(view.exact_values, np.float16).reshape(5, 5)
    assert np.allclose(exact, run["2.3.pattern"][0] - other["2.3.pattern"][0], atol=1e-3)


def test_several_prompts_are_averaged():
    model = tiny("llama")
    both, first, second = (mk.view.attention(model, one) for one in (PROMPTS, PROMPTS[:1], PROMPTS[1:]))
    mean = (_shown(first, "pattern")[0] + _shown(second, "pattern")[0]) / 2
    assert np.abs(_shown(both, "pattern")[0] - mean).max() < 1.1 / 255
    assert "mean of 2 prompts" in both.about["title"]


def test_edits_are_run_and_can_be_run_again():
    model = tiny("llama")
    view = mk.view.attention(model, PROMPTS[:1], PROMPTS[1:])
    assert view.edits == []
    before = {row["token"]: row["before"] for row in view.result["rows"]}
    view.ablate("1.2 2.0")
    view.changes = [*view.changes, {"head": "0.1", "how": "scale", "alpha": 0.5}, {"head": "1.0", "how": "patch"}]
    view.asked += 1
    assert view.result["answered"] == view.asked == 2
    z = model.run(PROMPTS[1:], record=["1.0"])["1.0"]
    by_hand = [mk.ablate("1.2"), mk.ablate("2.0"), mk.scale("0.1", 0.5), mk.patch_in("1.0", z)]
    expected = model.run(PROMPTS[:1], edits=by_hand).logits[0, -1].softmax(-1)
    again = model.run(PROMPTS[:1], edits=view.edits).logits[0, -1].softmax(-1)
    assert torch.allclose(expected, again, atol=1e-6)
    for row in view.result["rows"]:
        assert row["now"] == pytest.approx(float(expected[int(row["token"])]), abs=1e-5)
    view.undo()
    assert [one["head"] for one in view.changes] == ["1.2", "2.0", "0.1"]
    view.undo(all=True)
    assert view.edits == []
    for row in view.result["rows"]:
        assert row["now"] == row["before"] == pytest.approx(before.get(row["token"], row["before"]))


def test_a_task_has_its_metric():
    model, task = tiny("llama"), tiny_task()
    view = mk.view.attention(model, task)
    runs = model.run(task, edits=[mk.ablate("2.1")]).logits[:, -1]
    view.ablate("2.1")
    metric = view.result["metric"]
    assert metric["name"] == task.metric.name
    assert metric["now"] == pytest.approx(float(task.metric(runs.gather(1, task.answers), task).mean()), abs=1e-4)
    assert metric["before"] != metric["now"]
    assert [one["name"] for one in view.about["maps"]] == ["pattern", "value-weighted", "difference"]


def test_an_edit_that_fails_is_told_and_leaves_the_rest(monkeypatch):
    view = mk.view.attention(tiny("llama"), PROMPTS[:1])
    rows = view.result["rows"]
    view.changes = [{"head": "1.0", "how": "patch"}]  # there is nothing to patch from
    view.asked += 1
    assert "patch" in view.result["error"]
    assert view.result["rows"] == rows
    view.undo()
    assert "error" not in view.result


def test_selection_both_ways():
    view = mk.view.attention(tiny("llama"), PROMPTS[:1])
    view.selection = mk.heads("1.2 0.3")
    assert view.selection == ["1.2", "0.3"]
    view.selection = "2.0"
    assert str(mk.heads(view.selection)) == "2.0"
    for wrong in ("7.0", "0.4"):
        with pytest.raises(errors.SiteError, match=wrong):
            view.selection = wrong
        with pytest.raises(errors.SiteError, match=wrong):
            view.head = wrong
    with pytest.raises(errors.OptionError, match="difference"):
        view.map = "difference"
    assert view.selection == ["2.0"]


def test_scores_are_rings():
    model, task = tiny("llama"), tiny_task()
    scores = mk.patch(model, task, "heads", progress=False)
    view = mk.view.attention(model, task, scores=scores)
    assert np.allclose(np.array(view.about["scores"]["values"]).reshape(3, 4), scores.grid("z"), atol=1e-5)
    assert view.head == str(scores.heads(1))


def test_picture_and_sentence_stay_without_a_kernel():
    view = mk.view.attention(tiny("gpt2"), PROMPTS[:1])
    data, _ = view._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "3 layers of 4 heads" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data


def test_the_page_has_everything_in_it(tmp_path):
    view = mk.view.attention(tiny("llama"), PROMPTS[:1], PROMPTS[1:])
    page = view.to_html(tmp_path / "page.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    assert "import(" not in page.replace("await import(url)", "")
    (state,) = json.loads(re.search(r'id="state">(.*?)</script>', page, re.DOTALL)[1])
    assert zlib.decompress(base64.b64decode(state["buffers"]["maps"])) == view.maps
    assert state["traits"]["about"]["live"] is False
    assert view.to_html() == page


def test_odd_tokens_do_not_end_the_page():
    from mechkit.view.attention_view import AttentionMap, AttentionView

    words = ["</script>", "\n", "👩🚀", "שלום", '"&<', "�"]
    view = AttentionView("odd <b>", words, [AttentionMap("pattern", np.zeros((1, 1, 6, 6)))])
    page = view.to_html()
    (state,) = json.loads(re.search(r'id="state">(.*?)</script>', page, re.DOTALL)[1])
    assert state["traits"]["about"]["tokens"] == words
    assert "<title>odd &lt;b&gt;</title>" in page


@pytest.mark.parametrize(
    ("prompt", "how", "kind", "told"),
    [
        (
            torch.ones(1, 5, dtype=torch.long),
            {"compare": torch.ones(1, 4, dtype=torch.long)},
            errors.PromptError,
            "as many",
        ),
        (torch.ones(1, 500, dtype=torch.long), {}, errors.PromptError, "500 tokens"),
        (torch.ones(1, 0, dtype=torch.long), {}, errors.PromptError, "ids"),
        ("words", {}, errors.PromptError, "tokenizer"),
        (torch.ones(1, 5, dtype=torch.long), {"focus": "9.9"}, errors.SiteError, "9.9"),
    ],
)
def test_bad_input(prompt, how, kind, told):
    with pytest.raises(kind, match=told):
        mk.view.attention(tiny("llama"), prompt, **how)


def test_scores_of_another_model_are_refused():
    scores = mk.patch(tiny("gpt2"), tiny_task(), "mlps", progress=False)
    with pytest.raises(errors.OptionError):
        mk.view.attention(tiny("llama"), PROMPTS[:1], scores=scores)
