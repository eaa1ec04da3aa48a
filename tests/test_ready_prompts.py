"""What the prompts of each ready-made task say."""

from __future__ import annotations

import re
import types
from collections import Counter

import pytest
import ready
import torch
import words
from families import tiny

import mechkit as mk
from mechkit.errors import MetricError, OptionError, PromptError, TaskError
from mechkit.tasks import greater_than
from mechkit.tasks.capitals_conflict import CAPITALS
from mechkit.tasks.gendered_pronoun import MEN, WOMEN
from mechkit.tasks.greater_than import NOUNS
from mechkit.tasks.laundry_list import by_index

# -- greater-than -----------------------------------------------------------------------------------------------------

FORMS = pytest.mark.parametrize(
    ("digits", "form", "pattern"),
    [
        (1, "decade", r"(?P<head>\d\d)(?P<own>\d)9 to the year (?P=head)$"),
        (2, "two digits", r"(?P<head>\d\d)(?P<own>\d\d) to the year (?P=head)$"),
        (3, "unit", r"(?P<head>\d\d\d)(?P<own>\d) to the year (?P=head)$"),
    ],
)


def _years(task: mk.Task, pattern: str) -> list[re.Match]:
    return [found for text in task.texts if (found := re.search(pattern, text))]


@FORMS
def test_a_larger_number_is_a_later_year_and_no_other_is(digits, form, pattern):
    task = ready.make("greater_than", ready.model(digits), n=60)
    assert task.meta["compares"] == form
    found = _years(task, pattern)
    assert len(found) == 60
    for match in found:
        own, start = int(match["own"]), int(re.search(r"\d{4}", match[0])[0])
        width = len(match["own"])
        rest = 4 - len(match["head"]) - width
        for number in range(10**width):
            ends = [int(f"{match['head']}{number:0{width}}{tail}") for tail in range(10**rest)] if rest else None
            ends = ends or [int(f"{match['head']}{number:0{width}}")]
            assert all((end > start) == (number > own) for end in ends)
    assert len({match["own"] for match in found}) > 5
    assert all(re.search(r"1[1-7]\d?0?1(9?) to", text) for text in task._texts[1])


@FORMS
def test_greater_than_compares_the_token_it_says(digits, form, pattern):
    model = ready.model(digits)
    task = ready.make("greater_than", model, n=30)
    own = [match["own"] for match in _years(task, pattern)]
    assert ready.words_at(task, "YY", model) == own
    assert [int(model.to_text(token)) for token in task.correct.tolist()] == [int(number) + 1 for number in own]
    assert [int(model.to_text(token)) for token in task.wrong.tolist()] == [int(number) - 1 for number in own]
    assert {int(model.to_text(token)) for token in ready.at(task, "YY", task.corrupt).tolist()} == {1}


@FORMS
def test_prob_diff_is_the_probability_of_later_less_that_of_others(digits, form, pattern):
    model = ready.model(digits)
    task = ready.make("greater_than", model, n=20)
    for ids in (task.clean, task.corrupt):
        rows = model.run(ids).logits[:, -1]
        by_hand = []
        for row, match in zip(rows.softmax(-1), _years(task, pattern), strict=True):
            width = len(match["own"])
            ids_of = [model.encode(f"{number:0{width}}") for number in range(10**width)]
            assert all(len(one) == 1 for one in ids_of)
            signs = [1 if number > int(match["own"]) else -1 for number in range(10**width)]
            by_hand.append(sum(sign * float(row[one[0]]) for sign, one in zip(signs, ids_of, strict=True)))
        torch.testing.assert_close(task.metric(rows, task), torch.tensor(by_hand), atol=1e-5, rtol=1e-5)


def test_prob_diff_refuses_prompts_that_are_not_its_own():
    digit, pair = (ready.make("greater_than", ready.model(digits), n=4) for digits in (1, 2))
    with pytest.raises(MetricError, match="no number of this metric"):
        digit.metric(torch.randn(4, 5000), pair)


def test_another_metric_of_greater_than():
    assert ready.make("greater_than", metric="logit_diff").metric is mk.metrics.METRICS["logit_diff"]


def test_a_tokenizer_that_splits_years_otherwise_is_refused():
    """Whole words: a year is one token, and none is known."""
    with pytest.raises(TaskError, match="splits 1743 as 17 43"):
        greater_than(ready.whole_words(NOUNS), n=2)


# -- the others -------------------------------------------------------------------------------------------------------


def test_pronouns_are_of_the_names_gender():
    task, model = ready.make("gendered_pronoun", n=40), ready.model()
    names, twins = (
        ready.words_at(task, "name"),
        [model.to_text(one).strip() for one in ready.at(task, "name", task.corrupt)],
    )
    for i, (name, twin) in enumerate(zip(names, twins, strict=True)):
        own, other = (WOMEN, MEN) if i % 2 == 0 else (MEN, WOMEN)
        assert name in own
        assert twin in other
        assert model.to_text(task.answers[i]) == (" she he" if own is WOMEN else " he she")


@pytest.mark.parametrize("corrupt", ["listed", "unlisted"])
@pytest.mark.parametrize("one_shot", [True, False])
def test_the_color_asked_for_is_the_objects_own(corrupt, one_shot):
    task, model = ready.make("colored_objects", n=40, corrupt=corrupt, one_shot=one_shot), ready.model()
    assert ready.words_at(task, "object") == ready.words_at(task, "asked")
    assert (task.span("object")[:, 0] == task.span("color")[:, 0] + 1).all()
    answers = [[model.to_text(token) for token in pair] for pair in task.answers.tolist()]
    assert [right for right, _ in answers] == [f" {color.title()}" for color in ready.words_at(task, "color")]
    for text, twin, (_, wrong) in zip(*task._texts, answers, strict=True):
        pairs = dict(re.findall(r"an? (\w+) (\w+)[,.]", text.split("\n")[-2]))
        pairs = {thing: color for color, thing in pairs.items()}
        assert len(pairs) == 3
        asked = re.findall(r"color is the (\w+)", twin)[-1]
        if corrupt == "listed":
            assert wrong == f" {pairs[asked].title()}"
        else:
            assert asked not in text
            assert wrong.strip().lower() not in text.lower()
        assert text.count("Q:") == 1 + one_shot
        for solved in re.findall(r"is the (\w+)\?\nA: (\w+)", text):
            assert f"{solved[1].lower()} {solved[0]}" in text.split("\n")[0]
    if corrupt == "listed":
        assert [wrong for _, wrong in answers] == [f" {color.title()}" for color in ready.words_at(task, "wrong_color")]
    assert len(task.span("object")[:, 0].unique()) == 3


@pytest.mark.parametrize("corrupt", ["random_random", "swap"])
@pytest.mark.parametrize("before", [0, 2])
def test_the_docstring_goes_on_with_c(corrupt, before):
    task = ready.make("docstring", corrupt=corrupt, before=before)
    assert torch.equal(ready.at(task, "C_def"), task.correct)
    assert torch.equal(ready.at(task, "D_def"), task.wrong)
    for argument in "AB":
        assert torch.equal(ready.at(task, f"{argument}_def"), ready.at(task, f"{argument}_doc"))
    for text, twin in zip(*task._texts, strict=True):
        arguments, others = (re.search(r"\(self, (.*)\):", one)[1].split(", ") for one in (text, twin))
        assert len(set(arguments)) == 4 + before
        listed, twins_listed = (re.findall(r":param (\w+)", one) for one in (text, twin))
        assert listed == arguments[before : before + 2]
        if corrupt == "swap":
            assert others == [*arguments[:-2], arguments[-1], arguments[-2]]
            assert twins_listed == listed
        else:
            assert not set(arguments[before:-1]) & set(others)
            assert not set(twins_listed) & {*others, *arguments}
            assert (others[:before], others[-1]) == (arguments[:before], arguments[-1])


@pytest.mark.parametrize("corrupt", ["roles", "city", "country"])
def test_the_stated_capital_is_another_countrys(corrupt):
    task, model = ready.make("capitals_conflict", corrupt=corrupt, known=False), ready.model()
    country, city = ready.words_at(task, "X1"), ready.words_at(task, "city")
    assert country == ready.words_at(task, "X2") == ready.words_at(task, "X3")
    assert torch.equal(ready.at(task, "city"), task.correct)
    assert [model.to_text(token).strip() for token in task.wrong.tolist()] == [CAPITALS[one] for one in country]
    for i, text in enumerate(task._texts[1]):
        asked, stated = re.match(r"The capital of (\w+) is the city of (\w+)\.", text).groups()
        twin = {
            "roles": (CAPITALS[asked] == city[i], stated == CAPITALS[country[i]]),
            "city": (asked == country[i], stated == CAPITALS[country[i]]),
            "country": (CAPITALS[asked] == city[i], stated == city[i]),
        }
        assert twin[corrupt] == (True, True)


def test_only_countries_that_the_model_knows():
    """A random model knows next to none, and one that is told them knows them all."""
    with pytest.raises(TaskError, match=r"knows the capital of \d of \d+ countries"):
        ready.make("capitals_conflict", known=True)
    told = mk.Model(_Told(ready.model()), ready.model().tokenizer)
    task = ready.make("capitals_conflict", told, n=40, known=True)
    knows = {country for country in CAPITALS if country < "G" or country == "Italy"}
    assert set(ready.words_at(task, "X1")) <= knows
    assert task.meta["countries"] == len(knows)
    assert {country: CAPITALS[country] for country in sorted(knows)} == mk.tasks.known_capitals(told)
    assert mk.tasks.known_capitals(told, surest=2).items() <= mk.tasks.known_capitals(told).items()
    with pytest.raises(OptionError, match="surest = 0"):
        mk.tasks.known_capitals(told, surest=0)


def test_countries_kept_apart_share_nothing():
    every = list(mk.tasks.known_capitals(ready.model(), known=False))
    parts = [every[:4], every[4:8]]
    tasks = [ready.make("capitals_conflict", countries=part, known=False, n=10) for part in parts]
    for task, part in zip(tasks, parts, strict=True):
        assert set(ready.words_at(task, "X1")) <= set(part)
        assert set(ready.words_at(task, "city")) <= {CAPITALS[country] for country in part}
        assert task.meta["countries"] == part
    for countries in ("France", ["France"], ["France", "France"], ["France", "Atlantis"]):
        with pytest.raises(OptionError, match="at least two of"):
            ready.make("capitals_conflict", countries=countries, known=False)


class _Told:
    """A backend that gives the right capital of countries before G, and Rome for the others."""

    def __init__(self, model: mk.Model):
        self.model, self.info = model, model.info

    def forward(self, tokens, edits=(), record=(), read=None, lengths=None):
        logits = torch.zeros(len(tokens), self.info.d_vocab)
        for row, ids in enumerate(tokens):
            country = self.model.to_text(ids).split("The capital of ")[1].split(" is")[0]
            city = CAPITALS[country] if country < "G" else "Rome"
            logits[row, self.model.encode(" " + city)[0]] = 1.0
        return types.SimpleNamespace(logits=logits.gather(1, read.columns))


@pytest.mark.parametrize("corrupt", ["swap", "random"])
@pytest.mark.parametrize("length", [4, 9, 24])
def test_induction_repeats_and_goes_on_as_before(corrupt, length):
    task = ready.make("induction", n=30, length=length, corrupt=corrupt)
    half = length // 2
    assert (task.clean[:, 0] == ready.model().tokenizer.bos_token_id).all()
    first, again = task.clean[:, 1 : 1 + length], task.clean[:, 1 + length :]
    assert torch.equal(again, first[:, :half])
    assert all(len(set(row)) == length for row in first.tolist())
    assert torch.equal(ready.at(task, "A1"), ready.at(task, "END"))
    assert (task.span("B1") == task.span("A1") + 1).all()
    assert torch.equal(ready.at(task, "B1"), task.correct)
    assert torch.equal(ready.at(task, "B1", task.corrupt), task.wrong)
    for clean, twin, wrong in zip(task.clean.tolist(), task.corrupt.tolist(), task.wrong.tolist(), strict=True):
        assert sum(a != b for a, b in zip(clean, twin, strict=True)) == (2 if corrupt == "swap" else 1)
        if corrupt == "swap":
            assert Counter(clean) == Counter(twin)
            assert clean.count(wrong) == 1
        else:
            assert wrong not in clean
    assert not set(ready.model().tokenizer.all_special_ids) & set(task.clean[:, 1:].flatten().tolist())


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "bloom"])
def test_induction_needs_no_tokenizer(family):
    model = tiny(family)
    task = mk.tasks.induction(model, n=5, length=6, check=False)
    assert task.clean.shape == (5, 9)
    assert task.texts == []
    assert model.run(task).logits.shape == (5, 9, model.info.d_vocab)
    scores = mk.patch(model, task, "resid.0", positions="all", progress=False)
    torch.testing.assert_close(float(scores.frame.score[0]), 1.0, atol=1e-4, rtol=1e-4)


def test_induction_that_does_not_fit():
    with pytest.raises(TaskError, match="97 tokens to draw from"):
        mk.tasks.induction(tiny("llama"), n=2, length=97)
    with pytest.raises(PromptError, match="at most 64"):
        mk.tasks.induction(tiny("llama"), n=2, length=60)


# -- laundry lists ----------------------------------------------------------------------------------------------------


def _listed(text: str) -> tuple[list[str], list[str]]:
    """What is to be bought, and what he got."""
    to_buy, got, end = re.fullmatch(
        r"Today, Mike has to buy (.*)\. First, he got (.*)\. (Then he went to get the)", text
    ).groups()
    assert end
    return tuple([thing.removeprefix("the ") for thing in re.split(r", and |, | and ", part)] for part in (to_buy, got))


@pytest.mark.parametrize("corrupt", ["neighbor", "any"])
@pytest.mark.parametrize("objects", [3, 6, (4, 10), range(3, 11)])
def test_one_object_of_the_list_is_missing_and_another_in_the_twin(corrupt, objects):
    task, model = ready.make("laundry_list", n=60, objects=objects, corrupt=corrupt), ready.model()
    right, wrong = ([model.to_text(token).strip() for token in ids] for ids in (task.correct, task.wrong))
    steps = []
    for row, (text, twin) in enumerate(zip(*task._texts, strict=True)):
        (listed, got), (twins_list, twin_got) = _listed(text), _listed(twin)
        assert twins_list == listed
        assert len(set(listed)) == len(listed)
        assert got == [thing for thing in listed if thing != right[row]]  # in the order of the list
        assert twin_got == [thing for thing in listed if thing != wrong[row]]
        steps.append(abs(listed.index(right[row]) - listed.index(wrong[row])))
        assert int((task.clean[row] != task.corrupt[row]).sum()) == steps[-1]
    assert {len(_listed(text)[0]) for text in task.texts} == set([objects] if isinstance(objects, int) else objects)
    assert set(steps) == {1} if corrupt == "neighbor" else {1, 2} <= set(steps)
    assert ready.words_at(task, "missing") == right
    assert ready.words_at(task, "wrong") == ready.words_at(task, "wrong_got") == wrong


@pytest.mark.parametrize("objects", [3, (5, 8)])
def test_spans_of_a_laundry_list_hold_all_its_objects(objects):
    task, model = ready.make("laundry_list", n=30, objects=objects), ready.model()
    for row, text in enumerate(task.texts):
        for span, things in zip(("list", "got"), _listed(text), strict=True):
            first, last = task.span(span)[row].tolist()
            said = model.to_text(task.clean[row, first:last])
            assert re.split(r", and the |, the | and the ", said.strip()) == things


def test_every_length_and_index_as_often_and_lists_of_one_length_share_a_template():
    task = ready.make("laundry_list", n=3 * 52, objects=range(3, 11))
    places = []
    for text in task.texts:
        listed, got = _listed(text)
        (missing,) = set(listed) - set(got)
        places.append((len(listed), listed.index(missing)))
    assert Counter(places) == {(length, at): 3 for length in range(3, 11) for at in range(length)}
    groups = set(zip(task.templates.tolist(), (length for length, _ in places), strict=True))
    assert len(groups) == len(task.templates.unique()) == 8
    assert task.meta["objects"] == list(range(3, 11))


@pytest.mark.parametrize(("index", "at"), [(0, 0), (2, 2), (-1, -1), (-3, -3)])
def test_the_index_of_the_missing_object_can_be_chosen(index, at):
    task = ready.make("laundry_list", n=20, objects=(3, 5), index=index)
    for text in task.texts:
        listed, got = _listed(text)
        assert listed[at] not in got
    assert task.meta["index"] == index


def test_no_more_laundry_lists_than_the_words_allow():
    """Of four objects that are single tokens there are 24 lists of three."""
    model = mk.Model(ready.model().backend, words.tokenizer(["apple", "lamp", "rope", "soup"]))
    with pytest.raises(OptionError, match="at most 24,"):
        ready.make("laundry_list", model, n=25, index=1)
    assert len(ready.make("laundry_list", model, n=72)) == 72
    with pytest.raises(TaskError, match=r"4 of \d+ objects are single tokens .* at least 5"):
        ready.make("laundry_list", model, n=2, objects=(3, 5))


def test_accuracy_by_length_and_index():
    model = ready.model()
    task = ready.make("laundry_list", n=5 * 12, objects=(3, 4, 5))
    table = by_index(model, task)
    assert (list(table.index), list(table.columns)) == ([3, 4, 5], [0, 1, 2, 3, 4])
    assert table.isna().to_numpy().tolist() == [[False] * k + [True] * (5 - k) for k in (3, 4, 5)]
    for length in (3, 4, 5):
        for at in range(length):
            right = []
            for row, text in enumerate(task.texts):
                listed, got = _listed(text)
                if len(listed) == length and listed[at] not in got:
                    correct, wrong = model.run(text).logits[0, -1][task.answers[row]].tolist()
                    right.append(correct > wrong)
            assert table.loc[length, at] == pytest.approx(sum(right) / len(right))
    assert 0 < table.stack().mean() < 1
    halves = mk.Task.join([task[30:], task[:30]])
    assert by_index(model, halves).equals(table)


def test_accuracy_by_index_is_of_laundry_lists_only():
    with pytest.raises(TaskError, match="is no laundry list"):
        by_index(ready.model(), ready.make("gendered_pronoun", n=2))
    with pytest.raises(TaskError, match="not made from text"):
        by_index(ready.model(), ready.make("induction", n=2))
