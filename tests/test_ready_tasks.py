"""Every ready-made task: where its twins differ, its metric, what it refuses; and the packaged model on each."""

from __future__ import annotations

import re

import pytest
import ready
import torch
import words
from families import tiny

import mechkit as mk
from mechkit.errors import MetricError, OptionError, PromptError, TaskError
from mechkit.tasks import capitals_conflict, colored_objects, docstring, gendered_pronoun, greater_than, laundry_list
from mechkit.tasks.capitals_conflict import CAPITALS, QUESTION

WORDED = [greater_than, gendered_pronoun, colored_objects, docstring, capitals_conflict, laundry_list]


@ready.each_case
def test_twins_differ_only_where_they_should(name, options, differ):
    task = ready.make(name, **options)
    expected = torch.zeros(task.clean.shape, dtype=torch.bool)
    for span in differ.split():
        expected.scatter_(1, task.span(span)[:, :1], True)
    assert torch.equal(task.clean != task.corrupt, expected)
    assert (task.lengths == task.clean.shape[1]).all()
    assert (task.templates == 0).all()
    assert (task.span("END")[:, 1] == task.lengths).all()
    assert task.name == name
    assert {"about", "n", "seed"} <= set(task.meta)


@ready.each_case
def test_same_seed_same_prompts_and_no_two_the_same(name, options, differ):
    a, b, c = (ready.make(name, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(a.clean, b.clean)
    assert torch.equal(a.corrupt, b.corrupt)
    assert not torch.equal(a.clean, c.clean)
    assert len(a.clean.unique(dim=0)) == len(a)
    if name != "induction":
        model = ready.model()
        for task_ids, texts in ((a.clean, a._texts[0]), (a.corrupt, a._texts[1])):
            assert torch.equal(model.tokens(list(texts)), task_ids)


@pytest.mark.parametrize(("name", "options", "differ"), [case for case in ready.CASES if case[0] != "induction"])
def test_answers_are_what_the_model_would_write_next(name, options, differ):
    """The prompt with its answer reads as the prompt's own tokens and one more."""
    task, model = ready.make(name, **options), ready.model()
    for answers in (task.correct, task.wrong):
        for text, ids, answer in zip(task.texts, task.clean.tolist(), answers.tolist(), strict=True):
            assert model.tokens(text + model.to_text(answer))[0].tolist() == [*ids, answer]


@ready.each_case
def test_the_metric_of_a_part_is_that_of_its_rows(name, options, differ):
    task, model = ready.make(name, **options), ready.model()

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


@ready.each_case
def test_patching_the_whole_residual_stream_is_the_other_run(name, options, differ):
    scores = mk.patch(ready.model(), ready.make(name, n=6, **options), "resid.1", positions="all", progress=False)
    torch.testing.assert_close(float(scores.frame.score[0]), 1.0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [*WORDED, mk.tasks.induction])
@pytest.mark.parametrize("n", [0, -3, 2.5, "8"])
def test_a_number_of_prompts_is_needed(make, n):
    with pytest.raises(OptionError, match=re.escape(f"n = {n!r}")):
        make(ready.model(), n=n)


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("colored_objects", {"corrupt": "swap"}, '"listed", "unlisted"'),
        ("docstring", {"corrupt": "random"}, '"random_random", "swap"'),
        ("docstring", {"before": 9}, "before = 9"),
        ("capitals_conflict", {"corrupt": "swap"}, '"roles", "city", "country"'),
        ("induction", {"corrupt": "roles"}, '"swap", "random"'),
        ("induction", {"length": 3}, "length = 3"),
        ("laundry_list", {"corrupt": "swap"}, '"neighbor", "any"'),
        *(
            ("laundry_list", {"objects": objects}, re.escape(f"objects = {objects!r}") + ".*3 to 10")
            for objects in (2, 11, 3.0, None, "five", (), [3, 11])
        ),
        *(("laundry_list", {"index": index}, f"index = {index}.*from -3 to 2 ") for index in (3, -4, 1.0, True)),
        ("laundry_list", {"objects": (5, 4), "index": 4}, "index = 4.*list of 4"),
    ],
)
def test_options_are_checked(name, options, names):
    with pytest.raises(OptionError, match=names):
        ready.make(name, **options)


@pytest.mark.parametrize("make", WORDED)
def test_metrics_are_checked(make):
    with pytest.raises(MetricError, match="accuracy"):
        make(
            ready.model(),
            n=2,
            metric="accuracy",
            check=False,
            **({"known": False} if make is capitals_conflict else {}),
        )


@pytest.mark.parametrize("make", WORDED)
def test_a_tokenizer_without_the_words_is_refused(make):
    model = mk.Model(ready.model().backend, words.tokenizer(["nothing"]))
    with pytest.raises(TaskError, match=r"0 of \d+ .* single tokens"):
        make(model, n=2)


@pytest.mark.parametrize("make", WORDED)
def test_an_unknown_word_is_no_single_token(make):
    """A tokenizer of whole words has one token for all that it does not know."""
    with pytest.raises(TaskError, match=r"0 of \d+ .* single tokens"):
        make(ready.whole_words(["nothing"]), n=2)


@pytest.mark.parametrize("make", WORDED)
def test_a_model_without_a_tokenizer_is_refused(make):
    with pytest.raises(PromptError, match="without a tokenizer"):
        make(tiny("llama"), n=2)


def test_more_prompts_than_there_are():
    with pytest.raises(OptionError, match=f"at most {len(CAPITALS) * (len(CAPITALS) - 1)},"):
        ready.make("capitals_conflict", n=10**6, known=False)


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
        ("laundry_list", {}),
        ("laundry_list", {"objects": 4, "corrupt": "any"}),
    ],
)
def test_smollm2_can_do_it(smollm2, name, options):
    task = ready.make(name, smollm2, n=16, **options, check=True)  # a warning would be an error
    assert task.meta["accuracy"] >= 0.85
    columns = task.answers if task.metric.reads == "answers" else None
    clean, corrupt = (
        task.metric(smollm2.read(ids, task.answer_positions, columns), task) for ids in (task.clean, task.corrupt)
    )
    assert float(clean.mean()) > 0 > float(corrupt.mean())
    assert float((clean > corrupt).float().mean()) >= 0.95


@pytest.mark.real_model
@ready.each_case
def test_twins_of_the_packaged_tokenizer_differ_only_where_they_should(smollm2, name, options, differ):
    task = ready.make(name, smollm2, n=16, **options)
    expected = torch.zeros(task.clean.shape, dtype=torch.bool)
    for span in differ.split():
        expected.scatter_(1, task.span(span)[:, :1], True)
    assert torch.equal(task.clean != task.corrupt, expected)
    assert (task.lengths == task.clean.shape[1]).all()
    if name == "greater_than":
        assert task.meta["compares"] == "decade"  # it writes single digits
        assert ready.words_at(task, "YY", smollm2) == [re.search(r"\d\d(\d)9 to", text)[1] for text in task.texts]
    if name == "capitals_conflict":
        assert ready.words_at(task, "X1", smollm2) == [
            re.match(r"The capital of (\w+)", text)[1] for text in task.texts
        ]


@pytest.mark.real_model
def test_smollm2_knows_the_countries_it_is_asked_about(smollm2):
    task = ready.make("capitals_conflict", smollm2, n=32)
    countries = sorted(set(ready.words_at(task, "X1", smollm2)))
    for country in countries[:6]:
        logits = smollm2.run(QUESTION.format(X2=country, X3=country)).logits[0, -1]
        cities = {city: smollm2.encode(" " + city) for city in CAPITALS.values()}
        cities = {city: float(logits[ids[0]]) for city, ids in cities.items() if len(ids) == 1}
        assert max(cities, key=cities.get) == CAPITALS[country]
