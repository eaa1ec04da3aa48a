"""Scores of patterns: against loops over queries and keys, and in closed form on patterns made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny
from reference import attention as reference

import mechkit as mk
from mechkit.errors import OptionError, PromptError, RankingError
from mechkit.head_scores.attention import NAMES
from mechkit.head_scores.looking import Seen, weights
from mechkit.head_scores.pattern_metrics import entropy, shapes, singular
from mechkit.head_scores.repeated import repeated_tokens
from mechkit.head_scores.score import HOWS, function
from mechkit.head_scores.token_curves import fai, waad

SPAN = (1, 4)


def prompts(n: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Few different tokens, so that many come again."""
    return torch.randint(3, 8, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_score_is_its_loop(family):
    model, tokens = tiny(family), prompts()
    run = model.run(tokens, record=[f"{head}.pattern" for head in model.heads()])
    found = mk.score(model, tokens, list(NAMES), span=SPAN, each=True)
    for name, scores in found.items():
        for _, row in scores.frame.iterrows():
            pattern = run[f"{row.site}.pattern"][row.prompt]
            expected = reference.literal(name, pattern, tokens[row.prompt].tolist(), SPAN)
            assert row.score == pytest.approx(expected, abs=2e-5 * max(1, abs(expected))), (name, row.site)


def test_padding_changes_nothing():
    model, tokens = tiny("llama"), prompts(3)
    task = mk.Task.from_tokens(
        tokens,
        torch.cat([tokens[:, :-2], tokens[:, -2:] + 1], 1),
        tokens[:, 0],
        tokens[:, 1] + 50,
        lengths=torch.tensor([12, 12, 12]),
    )
    short = mk.Task.join(
        [task[:2], mk.Task.from_tokens(tokens[:1, :9], tokens[:1, :9] + 1, tokens[:1, 0], tokens[:1, 0] + 9)]
    )
    found = mk.score(model, short, list(NAMES), span=SPAN, each=True)
    alone = mk.score(model, tokens[:1, :9], list(NAMES), span=SPAN)
    for name in NAMES:
        last = found[name].frame
        last = last[last.prompt == 2].score.to_numpy()
        assert last == pytest.approx(alone[name].frame.score.to_numpy(), abs=2e-5), name


def test_mean_and_standard_error_are_over_prompts():
    model, tokens = tiny("gpt2"), prompts(5)
    one, each = mk.score(model, tokens, "entropy"), mk.score(model, tokens, "entropy", each=True)
    by_head = each.frame.groupby("site", sort=False).score
    assert one.frame.score.to_numpy() == pytest.approx(by_head.mean().to_numpy())
    assert one.frame.se.to_numpy() == pytest.approx((by_head.std() / np.sqrt(5)).to_numpy())
    assert set(one.frame.n) == {5}


def causal(*offsets: int, length: int = 8) -> torch.Tensor:
    """Every query looks, evenly, so many tokens back, as far as there are."""
    pattern = torch.zeros(length, length)
    for t in range(length):
        keys = [t - back for back in offsets if t - back >= 0] or [0]
        pattern[t, keys] = 1 / len(keys)
    return pattern


def value(name: str, pattern: torch.Tensor, tokens: list[int], span: tuple[int, int] | None = None) -> float:
    ids = torch.tensor([tokens])
    queries = torch.ones_like(ids, dtype=torch.bool)
    queries[:, 0] = False
    at = torch.arange(len(tokens))
    where = None if span is None else ((at >= span[0]) & (at < span[1]))[None]
    return float((weights(name, Seen(ids, queries, where))[0] * pattern).sum())


def test_closed_forms_of_weighted_sums():
    distinct, twice = list(range(8)), [3, 4, 5, 6] * 2
    assert value("previous_token", causal(1), distinct) == pytest.approx(1)
    assert value("previous_token", causal(2), distinct) == pytest.approx(1 / 7)  # the second token, which has no other
    assert value("distance", causal(1), distinct) == pytest.approx(1)
    assert value("distance", causal(0), distinct) == 0
    assert value("duplicate_token", causal(4), twice) == pytest.approx(1)
    assert value("duplicate_token", causal(3), twice) == 0
    assert value("induction", causal(3), twice) == pytest.approx(1)
    assert value("induction", causal(4), twice) == 0
    first = torch.zeros(8, 8)
    first[:, 0] = 1
    assert value("first_token", first, distinct) == pytest.approx(1)
    assert value("share", first, distinct, (0, 2)) == pytest.approx(1)
    assert value("share", first, distinct, (1, 3)) == 0


def test_a_token_said_twice_in_a_row_is_not_induction():
    assert np.isnan(value("induction", causal(0, length=4), [3, 4, 5, 5]))


def test_closed_forms_of_entropy_rank_and_shape():
    length = 8
    eye = torch.eye(length)[None, None]
    even = torch.ones(length, length).tril()
    even = (even / even.sum(-1, keepdim=True))[None, None]
    every = torch.ones(1, length, dtype=torch.bool)
    assert float(entropy(eye, every)) == 0
    assert float(entropy(even, every)) == pytest.approx(np.log(np.arange(1, length + 1)).mean(), rel=1e-5)
    first = torch.zeros(1, 1, length, length)
    first[..., 0] = 1
    whole = torch.tensor([length])
    assert float(singular(eye, whole)["effective_rank"]) == pytest.approx(length)
    assert float(singular(first, whole)["effective_rank"]) == pytest.approx(1, abs=1e-4)
    assert float(singular(first, whole)["top_singular"]) == pytest.approx(1, abs=1e-5)
    on = shapes(eye, every, 0.5)
    assert [float(on[name]) for name in ("diagonal", "vertical", "horizontal")] == [7 / 8, 0, 0]
    on = shapes(first, every, 0.5)
    assert [float(on[name]) for name in ("diagonal", "vertical", "horizontal")] == [0, 7 / 8, 0]
    row = torch.zeros(1, 1, length, length)
    row[..., -1, :] = 1 / length
    on = shapes(row, every, 0.1)
    assert [float(on[name]) for name in ("diagonal", "vertical", "horizontal")] == [0, 0, 7 / 8]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("response", [None, (4, 20)])
def test_token_curves_are_their_loops(family, response):
    model, tokens = tiny(family), prompts(1, 24)[0]
    run = model.run(tokens, record=[f"{head}.pattern" for head in model.heads()])
    patterns = torch.stack([run[f"{head}.pattern"][0] for head in model.heads()])
    where = range(24) if response is None else range(*response)
    for curve, literal in ((waad, reference.waad), (fai, reference.fai)):
        found = curve(model, tokens, response=response).frame.score.to_numpy()
        assert found == pytest.approx(np.array(literal(patterns, where)), abs=1e-5)


def test_token_curves_in_closed_form():
    """A head that looks at the token before has WAAD 1; one that looks at the first token has min(t, 10)."""
    before, first = causal(1, length=30), torch.zeros(30, 30)
    first[:, 0] = 1
    assert reference.waad(before[None], range(30))[1:] == pytest.approx([1.0] * 29)
    assert reference.waad(first[None], range(30)) == pytest.approx([min(t, 10) for t in range(30)])
    assert max(reference.fai(first[None], range(30))[1:]) == 0


@pytest.mark.parametrize("grouped", [False, True])
def test_planted_heads_are_found(grouped):
    planted = mk.planted.induction(grouped=grouped)
    found = mk.score(planted.model, planted.task, ["induction", "previous_token"])
    heads = {target.rsplit(".", 1)[0] for _, target in planted.edges if target.count(".") == 2 and "kv" not in target}
    assert str(found["induction"].heads(1)) in heads
    assert str(found["previous_token"].heads(1)) in {source for source, _ in planted.edges}


def test_random_tokens_come_twice():
    model = tiny("llama")
    tokens = repeated_tokens(model, n=3, length=10, seed=1)
    assert tokens.shape == (3, 20)
    assert torch.equal(tokens[:, :10], tokens[:, 10:])
    assert all(len(set(row)) == 10 for row in tokens.tolist())
    assert torch.equal(tokens, repeated_tokens(model, n=3, length=10, seed=1))


def test_names_are_read_in_any_spelling_and_every_function_is_there():
    model = tiny("gpt2")
    one, other = mk.score(model, prompts(), "previous-token"), mk.score(model, prompts(), "Previous token")
    assert one.frame.equals(other.frame)
    for how in HOWS:
        assert function(how).__doc__


@pytest.mark.parametrize(
    ("how", "options", "error", "said"),
    [
        ("inductoin", {}, OptionError, "Did you mean 'induction'"),
        ("induction", {"spam": 1}, OptionError, "'spam'"),
        (["induction", "entropy"], {"spam": 1}, OptionError, "'spam'"),
        ([], {}, OptionError, "No score"),
        (None, {}, OptionError, "how = None"),
        ("attention_influence", {}, OptionError, "without heads"),
        (["token_loss"], {}, OptionError, "without heads"),
        ("share", {}, OptionError, "without a span"),
        ("share", {"span": (9, 30)}, OptionError, "12 tokens"),
        ("share", {"span": (3, 3)}, OptionError, "12 tokens"),
        ("share", {"span": (0, 12)}, OptionError, "behind the span"),
        ("share", {"span": "a word"}, OptionError, "token ids"),
        ("share", {"span": 1.5}, OptionError, "1.5"),
        ("diagonal", {"threshold": 1.5}, OptionError, "threshold"),
        ("entropy", {"queries": 0}, OptionError, "second token"),
    ],
)
def test_bad_input(how, options, error, said):
    with pytest.raises(error, match=said):
        mk.score(tiny("gpt2"), prompts(), how, **options)


def test_more_bad_input():
    model = tiny("gpt2")
    distinct = torch.arange(3, 12)[None]
    with pytest.raises(OptionError, match="there before"):
        mk.score(model, distinct, "induction")
    with pytest.raises(PromptError, match="2 prompts"):
        mk.score(model, prompts(), "waad")
    with pytest.raises(OptionError, match="share"):
        mk.score(model, prompts()[0], "fai", share=0)


def test_scores_that_agree_and_scores_that_do_not():
    model = tiny("gpt2")
    one = mk.score(model, prompts(), "entropy")
    same = one.compare(one, k=3)
    assert same.rho == pytest.approx(1)
    assert (same.shared, same.interval) == (3, (pytest.approx(1), pytest.approx(1)))
    other = mk.score(model, prompts(), "first_token")
    found = one.compare(other, k=3)
    low, high = found.interval
    assert low < found.rho < high
    assert found.by_chance == pytest.approx(9 / 12)


def test_ties_and_too_few_runs_are_not_ranked():
    from dataclasses import replace

    scores = mk.score(tiny("gpt2"), prompts(), "entropy")
    flat = scores.frame.assign(score=[1.0, 0.5] + [0.0] * 10)
    tied = replace(scores, frame=flat)
    assert len(tied.heads(2)) == 2
    with pytest.raises(RankingError, match="10 heads have the same score"):
        tied.heads(3)
    assert len(tied.heads(12)) == 12
    with pytest.raises(RankingError, match="at every site"):
        replace(scores, frame=scores.frame.assign(score=0.0)).compare(scores)
    few = replace(scores, meta={**scores.meta, "unranked": "only 3 of 50 runs were kept"})
    for ask in (lambda: few.heads(1), few.ranked, lambda: few.top(3), lambda: few.compare(scores)):
        with pytest.raises(RankingError, match="only 3 of 50"):
            ask()
    assert "not ranked" in repr(few)
    assert "not ranked" in few._repr_html_()
