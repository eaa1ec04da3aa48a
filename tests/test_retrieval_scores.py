"""Retrieval heads: by hand, on a planted circuit, and against decoding one token at a time."""

from __future__ import annotations

import elsewhere
import pandas as pd
import pytest
import torch
from families import VOCAB, tiny, tiny_task

import mechkit as mk
from mechkit import errors, planted
from mechkit.head_scores.needles import Needle, Placed, needles
from mechkit.head_scores.retrieval import copied_positions, retrieval

FAMILIES = ("gpt2", "llama", "gemma2", "neox", "mistral")


def test_copied_by_hand():
    """The needle is at 2 and 3; three steps make its two tokens, and another."""
    tokens = torch.tensor([9, 8, 5, 6, 7, 5, 6, 7])
    made = tokens[5:8]
    best = torch.tensor(
        [
            [2, 3, 0],  # copies all of it
            [2, 2, 2],  # the second look finds another token than is made
            [3, 2, 4],  # looks at the needle, at the wrong places
            [5, 6, 7],  # the right tokens, but not in the needle
        ]
    )
    found = copied_positions(best, tokens, made, (2, 4))
    assert found.tolist() == [[True, True], [True, False], [False, False], [False, False]]


def test_a_position_counts_once():
    tokens = torch.tensor([5, 1, 5, 5])
    assert copied_positions(torch.tensor([[0, 0]]), tokens, tokens[2:], (0, 1)).tolist() == [[True]]


def one_by_one(model, one: Placed, steps: int) -> torch.Tensor:
    """Each step a run of the text so far, whose last row is looked at; ``[layers, heads]``."""
    ids, counts = list(one.ids), torch.zeros(model.n_layers, model.n_heads)
    copied: set[tuple[int, int, int]] = set()
    every = [str(head) + ".pattern" for head in model.heads()]
    for _ in range(steps):
        run = model.run(torch.tensor([ids]), record=every)
        new = int(run.logits[0, -1].argmax())
        for head in model.heads():
            at = int(run[f"{head}.pattern"][0, -1].argmax())
            place = (head.layer, head.head, at)
            if one.start <= at < one.stop and ids[at] == new and place not in copied:
                copied.add(place)
                counts[head.layer, head.head] += 1 / (one.stop - one.start)
        ids.append(new)
        if new == 2:  # the tiny models' end of text
            break
    return counts


def some(model, n=12, length=10) -> list[Placed]:
    """Needles that contain what the model will write, so that something is copied."""
    draw, made = torch.Generator().manual_seed(3), []
    for _ in range(n):
        ids = torch.randint(3, VOCAB, (length,), generator=draw)
        for _ in range(3):  # a token put in changes what is written; most settle
            new = model.generate(ids[None], max_new_tokens=2)[0, length:]
            ids[length - 2 : length - 2 + len(new)] = new  # where a window of 4 still sees it
        made.append(Placed(tuple(ids.tolist()), length - 2, length))
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_decoding_one_by_one(family):
    model = tiny(family)
    given = some(model)
    table = retrieval(model, given, max_new_tokens=3, recall=0.0, each=True)
    kept = [one for one, recall in zip(given, table.meta["recalls"], strict=True) if recall > 0]
    assert kept
    for number, one in enumerate(kept[:3]):
        own = table.frame[table.frame["prompt"] == number].set_index("site")["score"]
        literal = one_by_one(model, one, 3)
        for head in model.heads():
            assert own[str(head)] == pytest.approx(float(literal[head.layer, head.head]))
    assert table.frame["score"].max() > 0
    assert table.frame["score"].max() <= 1


def test_a_planted_copier_is_found():
    circuit = planted.induction(n=24)
    task = circuit.task
    where = (task.clean == task.correct[:, None]).int().argmax(1)
    given = [Placed(tuple(row.tolist()), int(at), int(at) + 1) for row, at in zip(task.clean, where, strict=True)]
    table = retrieval(circuit.model, given, max_new_tokens=1)
    assert table.meta["recalls"] == [1.0] * 24
    best = table.top(2)
    assert (best["site"][0], best["score"][0], best["n"][0]) == ("1.0", 1.0, 24)
    assert best["score"][1] < 0.7
    spanned = mk.Task.from_tokens(
        task.clean, task.corrupt, task.correct, task.wrong, spans={"answer": torch.stack([where, where + 1], 1)}
    )
    step = retrieval(circuit.model, spanned, span="answer")
    assert step.frame.set_index("site")["score"]["1.0"] == 1.0
    assert step.frame["score"].to_numpy() == pytest.approx(table.frame["score"].to_numpy())
    other = mk.Task.from_tokens(
        task.clean, task.corrupt, task.correct, task.wrong, spans={"answer": torch.zeros(24, dtype=torch.long)}
    )
    with pytest.raises(errors.TaskError, match="correct answer in no prompt"):
        retrieval(circuit.model, other, span="answer")


def test_few_runs_are_not_ranked():
    circuit = planted.induction(n=6)
    task = circuit.task
    where = (task.clean == task.correct[:, None]).int().argmax(1).tolist()
    places = [at if i < 2 else 6 for i, at in enumerate(where)]  # the last token is never the answer
    given = [Placed(tuple(row.tolist()), at, at + 1) for row, at in zip(task.clean, places, strict=True)]
    table = retrieval(circuit.model, given, max_new_tokens=1)
    kept = sum(one > 0.5 for one in table.meta["recalls"])
    assert kept == 2
    assert f"only {kept} of 6 runs were kept" in table.meta["unranked"]
    assert (table.frame["n"] == kept).all()
    for ranking in (table.ranked, table.heads):
        with pytest.raises(errors.RankingError, match=f"only {kept} of 6"):
            ranking()
    none = retrieval(circuit.model, given, max_new_tokens=1, recall=1.0)
    assert none.frame["score"].isna().all()
    assert "only 0 of 6" in none.meta["unranked"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    place = elsewhere.folder(tmp_path_factory.mktemp("models"), "llama")
    return mk.load(place, remote="local"), mk.load(place, device="cpu")


def test_the_same_elsewhere(both):
    far, own = both
    given = some(own)
    ours, theirs = (retrieval(one, given, max_new_tokens=4, recall=0.0) for one in (far, own))
    elsewhere.same(ours, theirs)
    task = tiny_task()
    task = mk.Task.from_tokens(
        task.clean, task.corrupt, task.clean[:, 2], task.wrong, spans={"answer": torch.full((4,), 2)}
    )
    elsewhere.same(*(retrieval(one, task, span="answer") for one in both))


CONTEXT = "w5 w6 w7 w8 w9\nw10 w11"


def test_forms_of_needles(both):
    _, model = both
    ways = [
        [(CONTEXT, "w7 w8", " w5 w6")],
        [Needle(CONTEXT, "w7 w8", " w5 w6")],
        pd.DataFrame({"context": [CONTEXT], "needle": ["w7 w8"], "question": [" w5 w6"]}),
        [Placed((5, 6, 7, 8, 9, 10, 11, 5, 6), 2, 4)],
    ]
    tables = [retrieval(model, way, max_new_tokens=3, recall=0.0) for way in ways]
    for table in tables[1:]:
        assert table.frame.equals(tables[0].frame)
        assert table.meta["recalls"] == tables[0].meta["recalls"]


@pytest.mark.parametrize(
    ("data", "how", "kind", "told"),
    [
        ([(CONTEXT, "w50", " w5")], {}, errors.PromptError, "stands there once"),
        ([("w5 w5", "w5", " w5")], {}, errors.PromptError, "stands there once"),
        ([("w5", "w5")], {}, errors.PromptError, "three texts"),
        ([], {}, errors.PromptError, "No needles"),
        ("w5 w6", {}, errors.PromptError, "str as needles"),
        ([Placed((5, 6), 1, 3)], {}, errors.PromptError, "1 to 3 of 2"),
        (pd.DataFrame({"context": ["w5"]}), {}, errors.PromptError, "columns"),
        ([(CONTEXT, "w7", " w5")], {"recall": 2.0}, errors.OptionError, "recall = 2.0"),
        ([(CONTEXT, "w7", " w5")], {"span": "IO"}, errors.OptionError, "no task"),
        (tiny_task(), {}, errors.OptionError, "without a span"),
        (tiny_task(), {"span": "IO"}, errors.TaskError, "no span"),
    ],
)
def test_bad_needles(both, data, how, kind, told):
    with pytest.raises(kind, match=told):
        retrieval(both[1], data, **how)


@pytest.mark.real_model
def test_needles_are_drawn(smollm2):
    made = needles(smollm2, n=3, seed=1, lines=4)
    assert made == needles(smollm2, n=3, seed=1, lines=4)
    for one in made:
        lines = one.context.splitlines()
        name = one.question.split("Answer: ")[1].removesuffix(" owns")
        assert len(lines) == 4
        assert f"{name} owns {one.needle}." in lines
    table = retrieval(smollm2, made, max_new_tokens=5)
    assert len(table.meta["recalls"]) == 3
    with pytest.raises(errors.OptionError, match="lines = 40"):
        needles(smollm2, lines=40)
