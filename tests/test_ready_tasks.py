"""The ready-made tasks: what their prompts say, where their twins differ, and whether a model can do them."""

from __future__ import annotations

import functools
import re
import types
import warnings
from collections import Counter

import pytest
import torch
import words
from families import tiny

import mechkit as mk
from mechkit.errors import MechkitWarning, MetricError, OptionError, PromptError, TaskError
from mechkit.tasks import capitals_conflict, colored_objects, docstring, gendered_pronoun, greater_than
from mechkit.tasks.ability import with_ability
from mechkit.tasks.capitals_conflict import CAPITALS, QUESTION
from mechkit.tasks.colored_objects import BEGINNINGS, COLORS, OBJECTS, PLACES
from mechkit.tasks.docstring import NAMES, WORDS
from mechkit.tasks.gendered_pronoun import KINDS, MEN, PEOPLE, WOMEN
from mechkit.tasks.greater_than import DECADES, NOUNS

# Options, and the spans at which twins differ; the second place of an induction swap has no span.
CASES = [
    ("greater_than", {}, "YY"),
    ("gendered_pronoun", {}, "name"),
    ("colored_objects", {}, "asked"),
    ("colored_objects", {"corrupt": "unlisted"}, "asked"),
    ("colored_objects", {"one_shot": False}, "asked"),
    ("docstring", {}, "A_def B_def C_def A_doc B_doc"),
    ("docstring", {"before": 2}, "A_def B_def C_def A_doc B_doc"),
    ("docstring", {"corrupt": "swap"}, "C_def D_def"),
    ("capitals_conflict", {"known": False}, "X1 city X2 X3"),
    ("capitals_conflict", {"known": False, "corrupt": "city"}, "city"),
    ("capitals_conflict", {"known": False, "corrupt": "country"}, "X1 X2 X3"),
    ("induction", {"corrupt": "random"}, "B1"),
]
WORDED = [greater_than, gendered_pronoun, colored_objects, docstring, capitals_conflict]
each_case = pytest.mark.parametrize(("name", "options", "differ"), CASES)


def _reader(digits: int):
    """A tokenizer of the tasks' words that takes digits one, two or three at a time."""
    from tokenizers import Regex, pre_tokenizers

    prose = (
        "The lasted from the year to So is a an really isn't Q On there you see I What color A: and she he capital of "
        "city def self param"
    )
    lists = [NOUNS, WOMEN, MEN, KINDS, PEOPLE, OBJECTS, COLORS, PLACES, NAMES, WORDS, CAPITALS, CAPITALS.values()]
    known = {*re.findall("[A-Za-z]+", prose), *BEGINNINGS, *(color.title() for color in COLORS), *DECADES}
    known |= {word for found in lists for word in found} | {f"{number:02}" for number in range(100)}
    reader = words.tokenizer(sorted(known))
    reader.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\d{{1,{digits}}}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return reader


@functools.cache
def _model(digits: int = 1) -> mk.Model:
    import transformers

    reader = _reader(digits)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(reader),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return mk.load((transformers.LlamaForCausalLM(config), reader), device="cpu")


def _make(name: str, model: mk.Model | None = None, n: int = 24, seed: int = 0, **options) -> mk.Task:
    return getattr(mk.tasks, name)(model or _model(), n=n, seed=seed, **{"check": False, **options})


def _at(task: mk.Task, span: str, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The token ``[n]`` at a span."""
    return (task.clean if ids is None else ids).gather(1, task.span(span)[:, :1])[:, 0]


def _words(task: mk.Task, span: str, model: mk.Model | None = None) -> list[str]:
    return [(model or _model()).to_text(token).strip() for token in _at(task, span).tolist()]


# -- every task -------------------------------------------------------------------------------------------------------


@each_case
def test_twins_differ_only_where_they_should(name, options, differ):
    task = _make(name, **options)
    expected = torch.zeros(task.clean.shape, dtype=torch.bool)
    for span in differ.split():
        expected.scatter_(1, task.span(span)[:, :1], True)
    assert torch.equal(task.clean != task.corrupt, expected)
    assert (task.lengths == task.clean.shape[1]).all()
    assert (task.templates == 0).all()
    assert (task.span("END")[:, 1] == task.lengths).all()
    assert task.name == name
    assert {"about", "n", "seed"} <= set(task.meta)


@each_case
def test_same_seed_same_prompts_and_no_two_the_same(name, options, differ):
    a, b, c = (_make(name, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(a.clean, b.clean)
    assert torch.equal(a.corrupt, b.corrupt)
    assert not torch.equal(a.clean, c.clean)
    assert len(a.clean.unique(dim=0)) == len(a)
    if name != "induction":
        model = _model()
        for task_ids, texts in ((a.clean, a._texts[0]), (a.corrupt, a._texts[1])):
            assert torch.equal(model.tokens(list(texts)), task_ids)


@pytest.mark.parametrize(("name", "options", "differ"), [case for case in CASES if case[0] != "induction"])
def test_answers_are_what_the_model_would_write_next(name, options, differ):
    """The prompt with its answer reads as the prompt's own tokens and one more."""
    task, model = _make(name, **options), _model()
    for answers in (task.correct, task.wrong):
        for text, ids, answer in zip(task.texts, task.clean.tolist(), answers.tolist(), strict=True):
            assert model.tokens(text + model.to_text(answer))[0].tolist() == [*ids, answer]


@each_case
def test_the_metric_of_a_part_is_that_of_its_rows(name, options, differ):
    task, model = _make(name, **options), _model()

    def values(part: mk.Task) -> torch.Tensor:
        columns = part.answers if part.metric.reads == "answers" else None
        return part.metric(model.read(part.clean, part.answer_positions, columns), part)

    whole = values(task)
    assert whole.std() > 0
    rows = torch.tensor([5, 2, 17])
    torch.testing.assert_close(values(task[rows]), whole[rows], atol=1e-5, rtol=1e-5)
    first, second = task.split(0.25, seed=3)
    assert sorted(first.texts + second.texts) == sorted(task.texts)
    joined = values(mk.Task.join([second, first]))
    torch.testing.assert_close(joined, torch.cat([values(second), values(first)]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(joined.sort().values, whole.sort().values, atol=1e-5, rtol=1e-5)


@each_case
def test_patching_the_whole_residual_stream_is_the_other_run(name, options, differ):
    scores = mk.patch(_model(), _make(name, n=6, **options), "resid.1", positions="all", progress=False)
    torch.testing.assert_close(float(scores.frame.score[0]), 1.0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [*WORDED, mk.tasks.induction])
@pytest.mark.parametrize("n", [0, -3, 2.5, "8"])
def test_a_number_of_prompts_is_needed(make, n):
    with pytest.raises(OptionError, match=re.escape(f"n = {n!r}")):
        make(_model(), n=n)


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("colored_objects", {"corrupt": "swap"}, '"listed", "unlisted"'),
        ("docstring", {"corrupt": "random"}, '"random_random", "swap"'),
        ("docstring", {"before": 9}, "before = 9"),
        ("capitals_conflict", {"corrupt": "swap"}, '"roles", "city", "country"'),
        ("induction", {"corrupt": "roles"}, '"swap", "random"'),
        ("induction", {"length": 3}, "length = 3"),
    ],
)
def test_options_are_checked(name, options, names):
    with pytest.raises(OptionError, match=names):
        _make(name, **options)


@pytest.mark.parametrize("make", WORDED)
def test_metrics_are_checked(make):
    with pytest.raises(MetricError, match="accuracy"):
        make(_model(), n=2, metric="accuracy", check=False, **({"known": False} if make is capitals_conflict else {}))


@pytest.mark.parametrize("make", WORDED)
def test_a_tokenizer_without_the_words_is_refused(make):
    model = mk.Model(_model().backend, words.tokenizer(["nothing"]))
    with pytest.raises(TaskError, match=r"0 of \d+ .* single tokens"):
        make(model, n=2)


@pytest.mark.parametrize("make", WORDED)
def test_an_unknown_word_is_no_single_token(make):
    """A tokenizer of whole words has one token for all that it does not know."""
    with pytest.raises(TaskError, match=r"0 of \d+ .* single tokens"):
        make(_whole_words(["nothing"]), n=2)


@pytest.mark.parametrize("make", WORDED)
def test_a_model_without_a_tokenizer_is_refused(make):
    with pytest.raises(PromptError, match="without a tokenizer"):
        make(tiny("llama"), n=2)


def test_more_prompts_than_there_are():
    with pytest.raises(OptionError, match=f"at most {len(CAPITALS) * (len(CAPITALS) - 1)},"):
        _make("capitals_conflict", n=10**6, known=False)


def _whole_words(known: list[str]) -> mk.Model:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", *known])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return mk.Model(_model().backend, PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>"))


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
    task = _make("greater_than", _model(digits), n=60)
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
    model = _model(digits)
    task = _make("greater_than", model, n=30)
    own = [match["own"] for match in _years(task, pattern)]
    assert _words(task, "YY", model) == own
    assert [int(model.to_text(token)) for token in task.correct.tolist()] == [int(number) + 1 for number in own]
    assert [int(model.to_text(token)) for token in task.wrong.tolist()] == [int(number) - 1 for number in own]
    assert {int(model.to_text(token)) for token in _at(task, "YY", task.corrupt).tolist()} == {1}


@FORMS
def test_prob_diff_is_the_probability_of_later_less_that_of_others(digits, form, pattern):
    model = _model(digits)
    task = _make("greater_than", model, n=20)
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
    digit, pair = (_make("greater_than", _model(digits), n=4) for digits in (1, 2))
    with pytest.raises(MetricError, match="no number of this metric"):
        digit.metric(torch.randn(4, 5000), pair)


def test_another_metric_of_greater_than():
    assert _make("greater_than", metric="logit_diff").metric is mk.metrics.METRICS["logit_diff"]


def test_a_tokenizer_that_splits_years_otherwise_is_refused():
    """Whole words: a year is one token, and none is known."""
    with pytest.raises(TaskError, match="splits 1743 as 17 43"):
        greater_than(_whole_words(NOUNS), n=2)


# -- what the other prompts say ---------------------------------------------------------------------------------------


def test_pronouns_are_of_the_names_gender():
    task, model = _make("gendered_pronoun", n=40), _model()
    names, twins = _words(task, "name"), [model.to_text(one).strip() for one in _at(task, "name", task.corrupt)]
    for i, (name, twin) in enumerate(zip(names, twins, strict=True)):
        own, other = (WOMEN, MEN) if i % 2 == 0 else (MEN, WOMEN)
        assert name in own
        assert twin in other
        assert model.to_text(task.answers[i]) == (" she he" if own is WOMEN else " he she")


@pytest.mark.parametrize("corrupt", ["listed", "unlisted"])
@pytest.mark.parametrize("one_shot", [True, False])
def test_the_color_asked_for_is_the_objects_own(corrupt, one_shot):
    task, model = _make("colored_objects", n=40, corrupt=corrupt, one_shot=one_shot), _model()
    assert _words(task, "object") == _words(task, "asked")
    assert (task.span("object")[:, 0] == task.span("color")[:, 0] + 1).all()
    answers = [[model.to_text(token) for token in pair] for pair in task.answers.tolist()]
    assert [right for right, _ in answers] == [f" {color.title()}" for color in _words(task, "color")]
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
        assert [wrong for _, wrong in answers] == [f" {color.title()}" for color in _words(task, "wrong_color")]
    assert len(task.span("object")[:, 0].unique()) == 3


@pytest.mark.parametrize("corrupt", ["random_random", "swap"])
@pytest.mark.parametrize("before", [0, 2])
def test_the_docstring_goes_on_with_c(corrupt, before):
    task = _make("docstring", corrupt=corrupt, before=before)
    assert torch.equal(_at(task, "C_def"), task.correct)
    assert torch.equal(_at(task, "D_def"), task.wrong)
    for argument in "AB":
        assert torch.equal(_at(task, f"{argument}_def"), _at(task, f"{argument}_doc"))
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
    task, model = _make("capitals_conflict", corrupt=corrupt, known=False), _model()
    country, city = _words(task, "X1"), _words(task, "city")
    assert country == _words(task, "X2") == _words(task, "X3")
    assert torch.equal(_at(task, "city"), task.correct)
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
        _make("capitals_conflict", known=True)
    told = mk.Model(_Told(_model()), _model().tokenizer)
    task = _make("capitals_conflict", told, n=40, known=True)
    knows = {country for country in CAPITALS if country < "G" or country == "Italy"}
    assert set(_words(task, "X1")) <= knows
    assert task.meta["countries"] == len(knows)


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
    task = _make("induction", n=30, length=length, corrupt=corrupt)
    half = length // 2
    assert (task.clean[:, 0] == _model().tokenizer.bos_token_id).all()
    first, again = task.clean[:, 1 : 1 + length], task.clean[:, 1 + length :]
    assert torch.equal(again, first[:, :half])
    assert all(len(set(row)) == length for row in first.tolist())
    assert torch.equal(_at(task, "A1"), _at(task, "END"))
    assert (task.span("B1") == task.span("A1") + 1).all()
    assert torch.equal(_at(task, "B1"), task.correct)
    assert torch.equal(_at(task, "B1", task.corrupt), task.wrong)
    for clean, twin, wrong in zip(task.clean.tolist(), task.corrupt.tolist(), task.wrong.tolist(), strict=True):
        assert sum(a != b for a, b in zip(clean, twin, strict=True)) == (2 if corrupt == "swap" else 1)
        if corrupt == "swap":
            assert Counter(clean) == Counter(twin)
            assert clean.count(wrong) == 1
        else:
            assert wrong not in clean
    assert not set(_model().tokenizer.all_special_ids) & set(task.clean[:, 1:].flatten().tolist())


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


# -- ability ----------------------------------------------------------------------------------------------------------


def _answering(right: int, n: int) -> tuple[types.SimpleNamespace, mk.Task]:
    """A stand-in for a model that prefers the correct answer on the first prompts only, and prompts for it."""
    task = mk.tasks.induction(tiny("llama"), n=n, length=6, check=False)
    logits = torch.tensor([[1.0, 0.0]] * right + [[0.0, 1.0]] * (n - right))
    return types.SimpleNamespace(name="stand-in", read=lambda *_: logits), task


@pytest.mark.parametrize(("right", "n"), [(64, 64), (40, 64), (5, 5), (4, 4), (1, 1)])
def test_a_model_above_chance_gets_no_warning(right, n):
    model, task = _answering(right, n)
    measured = with_ability(model, task)
    assert measured.meta == {**task.meta, "accuracy": right / n, "chance": 0.5}


@pytest.mark.parametrize(("right", "n"), [(38, 64), (32, 64), (0, 64), (3, 4), (0, 1)])
def test_a_model_not_clearly_above_chance_gets_one(right, n):
    model, task = _answering(right, n)
    with pytest.warns(MechkitWarning, match=rf"stand-in prefers the correct answer on {right} of {n} prompts") as seen:
        measured = with_ability(model, task)
    assert measured.meta["accuracy"] == right / n
    for part in ("induction", f"accuracy of {right / n:.2f}", r"chance (0.50)", "check=False"):
        assert part in str(seen[0].message)


def test_chance_is_the_tasks_own():
    model, task = _answering(40, 64)
    with pytest.warns(MechkitWarning, match=r"chance \(0\.60\)"):
        assert with_ability(model, task, chance=0.6).meta["chance"] == 0.6


@each_case
def test_a_random_model_is_warned_of_where_the_task_was_made(name, options, differ):
    """On the prompts of some seed at least it is at chance; what is measured is what ``known`` keeps."""
    warned = False
    for seed in range(3):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", MechkitWarning)
            task = _make(name, seed=seed, **options, check=True)
        seen = [one for one in seen if one.category is MechkitWarning]
        assert all(one.filename == __file__ for one in seen)
        warned = warned or bool(seen)
        right = round(task.meta["accuracy"] * len(task))
        assert right == (len(task.known(_model())) if right else 0)
        assert bool(seen) == (right <= 16)  # of 24; 17 has p = 0.032
    assert warned


def test_an_unchecked_task_says_nothing_of_accuracy():
    assert "accuracy" not in _make("docstring").meta


# -- the packaged model -----------------------------------------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("greater_than", {}),
        ("gendered_pronoun", {}),
        ("docstring", {"corrupt": "swap"}),
        ("induction", {}),
        ("capitals_conflict", {}),
    ],
)
def test_smollm2_can_do_it(smollm2, name, options):
    task = _make(name, smollm2, n=16, **options, check=True)  # a warning would be an error
    assert task.meta["accuracy"] >= 0.85
    columns = task.answers if task.metric.reads == "answers" else None
    clean, corrupt = (
        task.metric(smollm2.read(ids, task.answer_positions, columns), task) for ids in (task.clean, task.corrupt)
    )
    assert float(clean.mean()) > 0 > float(corrupt.mean())
    assert float((clean > corrupt).float().mean()) >= 0.95


@pytest.mark.real_model
@each_case
def test_twins_of_the_packaged_tokenizer_differ_only_where_they_should(smollm2, name, options, differ):
    task = _make(name, smollm2, n=16, **options)
    expected = torch.zeros(task.clean.shape, dtype=torch.bool)
    for span in differ.split():
        expected.scatter_(1, task.span(span)[:, :1], True)
    assert torch.equal(task.clean != task.corrupt, expected)
    assert (task.lengths == task.clean.shape[1]).all()
    if name == "greater_than":
        assert task.meta["compares"] == "decade"  # it writes single digits
        assert _words(task, "YY", smollm2) == [match["own"] for match in _years(task, r"(\d\d)(?P<own>\d)9 to")]
    if name == "capitals_conflict":
        assert _words(task, "X1", smollm2) == [re.match(r"The capital of (\w+)", text)[1] for text in task.texts]


@pytest.mark.real_model
def test_smollm2_knows_the_countries_it_is_asked_about(smollm2):
    task = _make("capitals_conflict", smollm2, n=32)
    countries = sorted(set(_words(task, "X1", smollm2)))
    for country in countries[:6]:
        logits = smollm2.run(QUESTION.format(X2=country, X3=country)).logits[0, -1]
        cities = {city: smollm2.encode(" " + city) for city in CAPITALS.values()}
        cities = {city: float(logits[ids[0]]) for city, ids in cities.items() if len(ids) == 1}
        assert max(cities, key=cities.get) == CAPITALS[country]
