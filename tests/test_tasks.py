"""Tasks: made from words, tables and ids; split; and everything that makes no task."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
import torch
import words
from families import tiny, tiny_task

import mechkit as mk
from mechkit.errors import MechkitWarning, MetricError, OptionError, PromptError, TaskError


@pytest.fixture(scope="module")
def model() -> mk.Model:
    return words.model()


@pytest.mark.parametrize("corrupt", ["swap", "abc"])
def test_ioi_is_what_it_says(model, corrupt):
    task = mk.tasks.ioi(model, n=40, seed=3, corrupt=corrupt)
    rows = torch.arange(40)
    start = {name: span[:, 0] for name, span in task.spans.items()}
    assert task.clean.shape == task.corrupt.shape
    assert len(set(task.texts)) == 40
    assert (task.clean[rows, start["IO"]] == task.correct).all()
    assert (task.clean[rows, start["S1"]] == task.wrong).all()
    assert (task.clean[rows, start["S2"]] == task.wrong).all()
    assert (start["S1+1"] == start["S1"] + 1).all()
    assert (start["END"] == task.lengths - 1).all()
    assert ((task.clean != task.corrupt).sum(1) == 1).all()
    assert (task.first_difference == start["S2"]).all()
    twin = task.corrupt[rows, start["S2"]]
    assert (
        ((twin == task.correct).all()) if corrupt == "swap" else ((twin != task.correct) & (twin != task.wrong)).all()
    )
    assert int((start["IO"] < start["S1"]).sum()) == 20
    assert (task.templates == task.templates[0]).all() or len(task.templates.unique()) > 1


def test_same_seed_same_prompts(model):
    a, b, c = (mk.tasks.ioi(model, n=8, seed=seed) for seed in (1, 1, 2))
    assert a.texts == b.texts
    assert a.texts != c.texts
    assert torch.equal(a.clean, b.clean)


@pytest.mark.parametrize("n", [0, -3, 2.5])
def test_ioi_needs_a_number_of_prompts(model, n):
    with pytest.raises(OptionError, match=str(n)):
        mk.tasks.ioi(model, n=n)


def test_ioi_needs_names_that_are_single_tokens(model, monkeypatch):
    # The function of that name hides the module.
    monkeypatch.setattr(sys.modules["mechkit.tasks.ioi"], "NAMES", ("Zqx", "Wvk", "Mary"))
    with pytest.raises(TaskError, match="1 of 3 names"):
        mk.tasks.ioi(model, n=2)


@pytest.fixture
def twelve(monkeypatch) -> None:
    """IOI with no more than twelve clean prompts: three names, two orders, and one of everything else."""
    of = sys.modules["mechkit.tasks.ioi"]
    for name, words_left in (("NAMES", 3), ("TEMPLATES", 1), ("PLACES", 1), ("THINGS", 1)):
        monkeypatch.setattr(of, name, getattr(of, name)[:words_left])


@pytest.mark.parametrize("corrupt", ["swap", "abc"])
@pytest.mark.parametrize("n", [2, 7, 12])
def test_no_ioi_prompt_comes_twice_and_halves_share_none(model, twelve, n, corrupt):
    for seed in range(5):
        task = mk.tasks.ioi(model, n=n, seed=seed, corrupt=corrupt)
        assert len(task) == len(set(task.texts)) == len(task.clean.unique(dim=0)) == n
        assert int((task.span("IO") < task.span("S1"))[:, 0].sum()) == (n + 1) // 2
        found_on, held_out = task.split(0.5, seed=seed)
        assert not {*found_on.texts} & {*held_out.texts}


def test_ioi_has_no_more_prompts_than_there_are(model, twelve):
    with pytest.raises(OptionError, match="at most 12, as many as there are"):
        mk.tasks.ioi(model, n=13)


def test_split_halves_have_nothing_in_common_and_miss_nothing(model):
    task = mk.tasks.ioi(model, n=20, seed=0)
    a, b = task.split(0.5, seed=4)
    assert len(a) == len(b) == 10
    assert sorted(a.texts + b.texts) == sorted(task.texts)
    for bad in (0, 1, 0.01):
        with pytest.raises(OptionError, match="empty"):
            task.split(bad)


def test_known_keeps_the_prompts_the_model_gets_right(model):
    task = mk.tasks.ioi(model, n=40, seed=0)
    known = task.known(model)
    logits = model.run(known).logits
    assert 0 < len(known) < 40
    assert (mk.metrics.logit_diff(logits, known) > 0).all()


def test_a_part_of_a_task_loses_its_needless_padding():
    clean = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    corrupt = torch.tensor([[5, 9, 7, 8], [5, 9, 0, 0]])
    task = mk.Task.from_tokens(clean, corrupt, torch.tensor([3, 3]), torch.tensor([4, 4]), lengths=torch.tensor([4, 2]))
    assert task[1].clean.tolist() == [[5, 6]]
    assert task[1].answer_positions.tolist() == [1]
    assert [len(one) for one in task] == [1, 1]
    with pytest.raises(TaskError, match="none"):
        task[[]]


def _table(**changes) -> pd.DataFrame:
    row = {"clean": "When Mary went to", "corrupt": "When John went to", "correct": " John", "wrong": " Mary"}
    return pd.DataFrame([{**row}, {**row, **changes}])


def test_a_table_of_prompts_is_a_task(model):
    task = mk.Task.from_frame(_table(clean="Mary went", corrupt="John went"), model)
    assert task.lengths[0] > task.lengths[1]
    assert model.to_text(task.correct[:1]) == " John"
    assert mk.patch(model, task, "0.1", progress=False).frame.n[0] == 2


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"correct": " Johnathan"}, "Row 1: the correct answer ' Johnathan' is"),
        ({"wrong": " zz"}, "' zz' is 3 tokens"),
        ({"corrupt": "When John went to the"}, "Row 1: clean is 5 tokens and corrupt 6"),
        ({"clean": ""}, "Row 1: `clean` is ''"),
        ({"wrong": None}, "Row 1: `wrong` is"),
        ({"corrupt": "When Mary went to"}, "row 1 are the same"),
        ({"wrong": " John"}, "answers of row 1 are the same"),
    ],
)
def test_a_row_that_makes_no_prompt_is_named(model, changes, names):
    with pytest.raises(TaskError, match=names):
        mk.Task.from_frame(_table(**changes), model)


def test_a_table_that_is_no_table_of_prompts(model):
    with pytest.raises(TaskError, match="clean, corrupt, correct, wrong"):
        mk.Task.from_frame(pd.DataFrame({"prompt": ["x"]}), model)
    with pytest.raises(TaskError, match="no prompts"):
        mk.Task.from_frame(_table().iloc[:0], model)


def test_a_missing_leading_space_is_pointed_out(model):
    with pytest.warns(MechkitWarning, match="' John' is what"):
        mk.Task.from_frame(_table(correct="John"), model)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"clean": torch.zeros(0, 4, dtype=torch.long), "corrupt": torch.zeros(0, 4, dtype=torch.long)}, "no prompts"),
        ({"corrupt": torch.ones(2, 5, dtype=torch.long)}, r"\[2, 4\] and corrupt is \[2, 5\]"),
        ({"clean": torch.ones(2, 4)}, "float32"),
        ({"clean": torch.ones(4, dtype=torch.long)}, r"\[4\]"),
        ({"correct": torch.tensor([1])}, "1 `correct` answers for 2"),
        ({"wrong": torch.tensor([3, 3])}, "answers of row 0"),
        ({"lengths": torch.tensor([4, 9])}, "lengths"),
        ({"spans": {"S2": torch.tensor([0, 4])}}, "S2"),
        ({"templates": torch.tensor([0])}, "templates"),
        ({"lengths": torch.tensor([4, 3]), "templates": torch.tensor([0, 0])}, "Template 0"),
        ({"metric": "accuracy"}, "accuracy"),
    ],
)
def test_ids_that_make_no_task_are_refused(changes, names):
    given = {
        "clean": torch.tensor([[5, 6, 7, 8]] * 2),
        "corrupt": torch.tensor([[5, 9, 7, 8]] * 2),
        "correct": torch.tensor([3, 3]),
        "wrong": torch.tensor([4, 4]),
    }
    with pytest.raises((TaskError, MetricError), match=names):
        mk.Task.from_tokens(**{**given, **changes})


@pytest.mark.parametrize("name", ["logit_diff", "prob", "loss"])
def test_metrics_read_the_answer_position_of_whole_logits(name):
    task = tiny_task()
    logits = tiny("gpt2").run(task).logits
    function = getattr(mk.metrics, name)
    torch.testing.assert_close(function(logits, task), function(logits[:, -1], task))
    by_hand = {
        "logit_diff": lambda row, c, w: row[c] - row[w],
        "prob": lambda row, c, w: row.softmax(-1)[c],
        "loss": lambda row, c, w: -row.log_softmax(-1)[c],
    }[name]
    expected = [by_hand(logits[i, -1], task.correct[i], task.wrong[i]) for i in range(len(task))]
    torch.testing.assert_close(function(logits, task), torch.stack(expected))


def test_kl_is_zero_to_itself_and_positive_to_others():
    task = tiny_task()
    clean, corrupt = (tiny("gpt2").run(ids).logits for ids in (task.clean, task.corrupt))
    assert mk.metrics.kl(clean, task, clean).abs().max() < 1e-6
    assert (mk.metrics.kl(corrupt, task, clean) > 0).all()


def test_prompts_get_a_beginning_and_padding_at_the_right(model):
    ids = model.tokens(["Mary went", "When Mary went to"])
    assert ids[:, 0].tolist() == [model.tokenizer.bos_token_id] * 2
    assert ids[0, -2:].tolist() == [model.pad_token] * 2
    together = model.run(["Mary went", "When Mary went to"])
    alone = model.run("Mary went")
    torch.testing.assert_close(together.logits[0, :3], alone.logits[0], atol=1e-5, rtol=1e-5)
    assert together.next_tokens(3, prompt=0).token.tolist() == alone.next_tokens(3).token.tolist()
    assert list(alone.next_tokens(2)["rank"]) == [1, 2]


def test_a_prompt_longer_than_the_context_is_refused(model):
    with pytest.raises(PromptError, match="at most 32"):
        model.run("Mary " * 40)


def test_answers_are_read_as_they_stand_after_the_prompt():
    """Llama 2's tokenizer puts a space before what it reads: " Mary" by itself is two spaces and a name."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mechkit.tasks.text import continuation

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.train_from_iterator(["When", "Mary", "went"], trainers.BpeTrainer(vocab_size=500, show_progress=False))
    reader = PreTrainedTokenizerFast(tokenizer_object=bpe)
    model = mk.Model(words.model().backend, reader)
    assert len(model.encode(" Mary")) > 1
    assert len(continuation("When", " Mary", model)) == 1
    assert model.encode("When Mary") == [*model.encode("When"), *continuation("When", " Mary", model)]
    assert continuation("When", "ever", words.model()) == words.model().encode("ever")
