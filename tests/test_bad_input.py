"""Mistakes people make, each with the kind of its error and what the message must name."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import torch
import words
from families import tiny, tiny_task

import mechkit as mk
from mechkit.errors import (
    EditError,
    LoadError,
    MechkitError,
    MetricError,
    OptionError,
    PromptError,
    SiteError,
    StorageError,
    TaskError,
    UnsupportedError,
)

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TWIN = torch.tensor([[5, 6, 70, 8], [9, 10, 80, 12]])
ONE, TWO = torch.tensor([1, 2]), torch.tensor([3, 4])


def model() -> mk.Model:
    return tiny("llama")


def run(*edits, **options):
    return model().run(IDS, edits=edits, **options)


def patch(*args, task=None, **options):
    return mk.patch(model(), task or tiny_task(), *args, progress=False, **options)


def of_tokens(clean=IDS, corrupt=TWIN, correct=ONE, wrong=TWO, **options):
    return mk.Task.from_tokens(clean, corrupt, correct, wrong, **options)


def of_frame(**columns):
    row = {"clean": "Mary gave John", "corrupt": "John gave John", "correct": " Mary", "wrong": " John"}
    return mk.Task.from_frame(pd.DataFrame([{**row, **columns}]), words.model())


def generate(*edits, prompt=IDS, **options):
    return model().generate(prompt, edits=edits, **{"max_new_tokens": 2, **options})


MISTAKES = [
    # addresses
    (lambda: mk.site("9"), SiteError, "'9'"),
    (lambda: mk.site("9.9.w"), SiteError, "'9.9.w'"),
    (lambda: mk.site("9.kv2"), SiteError, "'9.kv2'"),
    (lambda: mk.site("9.kv2.q"), SiteError, "'9.kv2.q'"),
    (lambda: mk.site(("a", 1)), SiteError, "('a', 1)"),
    (lambda: mk.site(None), SiteError, "None"),
    (lambda: mk.site(2.5), SiteError, "2.5"),
    (lambda: mk.heads("m3"), SiteError, '"m3"'),
    (lambda: mk.heads("9.9 9.x"), SiteError, "'9.x'"),
    (lambda: mk.heads("0.0").random_like(), OptionError, "heads_per_layer"),
    (lambda: mk.heads("0.0 0.1 0.2").random_like(heads_per_layer=2), OptionError, "3 heads in layer 0"),
    (lambda: model().heads("3.0"), SiteError, '"3.0"'),
    (lambda: model().heads("0.4"), SiteError, '"0.4"'),
    # prompts
    (lambda: model().run(""), PromptError, "empty"),
    (lambda: model().run("text"), PromptError, "without a tokenizer"),
    (lambda: model().run(None), PromptError, "None"),
    (lambda: model().run(IDS.float()), PromptError, "float32"),
    (lambda: model().run(IDS[None]), PromptError, "[1, 2, 4]"),
    (lambda: model().run(IDS + 200), PromptError, "212"),
    (lambda: model().run(-IDS), PromptError, "-12"),
    (lambda: model().run(torch.ones(1, 65, dtype=torch.long)), PromptError, "65"),
    (lambda: model().run(torch.zeros(1, 0, dtype=torch.long)), PromptError, "[1, 0]"),
    (lambda: model().run(of_tokens(IDS + 100, TWIN + 100)), PromptError, "112"),
    # recordings
    (lambda: run(record="3.0.pattern"), SiteError, '"3.0.pattern"'),
    (lambda: run(record="0.kv2.k"), SiteError, '"0.kv2.k"'),
    (lambda: run(record="resid.4"), SiteError, '"resid.4"'),
    (lambda: run(record="0.1")["0.1.q"], SiteError, '"0.1.q"'),
    # edits
    (lambda: run("0.1"), EditError, "'0.1'"),
    (lambda: run(None), EditError, "None"),
    (lambda: mk.ablate("0.1", "melt"), OptionError, "'melt'"),
    (lambda: mk.ablate("0.1", "mean"), EditError, "mean"),
    (lambda: mk.ablate("m1", "uniform"), SiteError, '"m1"'),
    (lambda: mk.ablate("0.kv1.k", "uniform"), SiteError, '"0.kv1.k"'),
    (lambda: mk.ablate(""), EditError, "no sites"),
    (lambda: mk.scale("logits", 2), EditError, '"logits"'),
    (lambda: mk.scale("0.1.result", 2), EditError, '"0.1.result"'),
    (lambda: mk.scale("0.1", "much"), OptionError, "'much'"),
    (lambda: mk.scale("0.1", float("nan")), OptionError, "nan"),
    (lambda: mk.scale("0.1", 2, positions=[]), OptionError, "empty"),
    (lambda: mk.scale("0.1", 2, positions=[1.5]), OptionError, "1.5"),
    (lambda: mk.scale("0.1", 2, positions=2.0), OptionError, "2.0"),
    (lambda: run(mk.scale("0.1", 2, positions=[4])), EditError, "Position 4"),
    (lambda: run(mk.scale("0.1", 2, positions=[-5])), EditError, "Position -5"),
    (lambda: run(mk.scale("0.1", 2, positions="S2")), EditError, '"S2"'),
    (lambda: model().run(tiny_task(), edits=[mk.scale("0.1", 2, positions="S2")]), TaskError, '"S2"'),
    (lambda: run(mk.scale("0.7", 2)), SiteError, '"0.7"'),
    (lambda: run(mk.patch_in("0.1", torch.zeros(3))), EditError, "[3]"),
    (lambda: run(mk.patch_in("0.1", "values")), EditError, "str"),
    (lambda: mk.patch_in("0.1", {"0.2": torch.zeros(8)}), EditError, "0.1, 0.2"),
    (lambda: run(mk.patch_in("0.1", torch.zeros(3, 8), positions=[0, 1])), EditError, "[3, 8]"),
    (lambda: run(mk.steer("resid.1", torch.zeros(8))), EditError, "[8]"),
    (lambda: run(mk.ablate("0.1", "resample", reference=tiny_task(n=3))), EditError, "0.1"),
    # where heads look
    (lambda: mk.attend("0.1"), EditError, "nothing to do"),
    (lambda: mk.attend("0.1", bias=1.0, mask=[0]), EditError, "bias and mask"),
    (lambda: mk.attend("m1", bias=1.0), SiteError, '"m1"'),
    (lambda: mk.attend("0.1", sharpen=-1.0), OptionError, "-1.0"),
    (lambda: mk.attend("0.1", toward="left"), OptionError, "'left'"),
    (lambda: mk.attend("0.1", toward="first", alpha=2.0), OptionError, "2.0"),
    (lambda: mk.attend("0.1", mask=[0], keys=[1]), EditError, "mask and keys"),
    (lambda: mk.attend("0.1", set={}), EditError, "set={}"),
    (lambda: run(mk.attend("0.1", mask=[9])), EditError, "Position 9"),
    (lambda: run(mk.attend("0.1", bias=1.0, keys="S1")), EditError, '"S1"'),
    (lambda: run(mk.attend("0.1", bias=torch.zeros(3, 3))), EditError, "[3, 3]"),
    (lambda: run(mk.attend("0.1", set={3: 1.0}, positions=[0, 1])), EditError, '"0.1.pattern"'),
    # generation
    (lambda: generate(max_new_tokens=0), OptionError, "max_new_tokens = 0"),
    (lambda: generate(max_new_tokens=2.5), OptionError, "2.5"),
    (lambda: generate(max_new_tokens=61), PromptError, "61"),
    (lambda: generate(warmth=0.7), OptionError, "warmth"),
    (lambda: generate(prompt="text"), PromptError, "without a tokenizer"),
    (lambda: generate(mk.scale("0.1", 2, positions=[30])), EditError, "Position 30"),
    # tasks
    (lambda: of_tokens(correct=ONE[:1]), TaskError, "1 `correct`"),
    (lambda: of_tokens(wrong=ONE), TaskError, "row 0"),
    (lambda: of_tokens(corrupt=IDS), TaskError, "row 0"),
    (lambda: of_tokens(corrupt=TWIN[:, :3]), TaskError, "[2, 3]"),
    (lambda: of_tokens(clean=IDS.float()), TaskError, "float32"),
    (lambda: of_tokens(clean=IDS[:0], corrupt=TWIN[:0], correct=ONE[:0], wrong=ONE[:0]), TaskError, "no prompts"),
    (lambda: of_tokens(lengths=torch.tensor([4, 5])), TaskError, "[4, 5]"),
    (lambda: of_tokens(spans={"S2": torch.tensor([1, 9])}), TaskError, '"S2"'),
    (lambda: of_tokens(metric="warmth"), MetricError, "'warmth'"),
    (lambda: of_frame(correct=" Mary gave"), TaskError, "' Mary gave'"),
    (lambda: of_frame(corrupt="John gave"), TaskError, "Row 0"),
    (lambda: of_frame(clean=3), TaskError, "3"),
    (lambda: mk.Task.from_frame(pd.DataFrame({"clean": ["a"]}), words.model()), TaskError, "'clean'"),
    (lambda: tiny_task().split(0.0), OptionError, "split(0.0)"),
    (lambda: tiny_task()[[]], TaskError, "[]"),
    (lambda: mk.Task.join([]), TaskError, "[]"),
    (lambda: mk.Task.join([tiny_task(), "ioi"]), TaskError, "'ioi'"),
    (lambda: mk.Task.join([tiny_task(), tiny_task().with_metric("prob")]), TaskError, "logit_diff and prob"),
    # patching
    (lambda: patch("9.0"), SiteError, '"9.0"'),
    (lambda: patch("everything"), SiteError, "'everything'"),
    (lambda: patch(""), SiteError, "No sites"),
    (lambda: patch("logits"), UnsupportedError, "logits"),
    (lambda: patch(positions="S2"), TaskError, '"S2"'),
    (lambda: patch(positions=[9]), OptionError, "[9]"),
    (lambda: patch(positions=[-1]), OptionError, "[-1]"),
    (lambda: patch(direction="sideways"), OptionError, "'sideways'"),
    (lambda: patch(task="ioi"), TaskError, "'ioi'"),
    (lambda: patch(task=tiny_task().with_metric(lambda x, t: x[:, 0] * 0)), MetricError, "alike"),
    (lambda: patch(task=tiny_task().with_metric(lambda x, t: x.mean())), MetricError, "[]"),
    (lambda: patch(checkpoint="/proc/nowhere/sweep"), StorageError, "/proc/nowhere/sweep"),
    (lambda: patch(task=of_tokens(IDS + 100, TWIN + 100)), PromptError, "112"),
    # circuits and scores
    (lambda: mk.discover(model(), tiny_task(), size=0, progress=False), OptionError, "size = 0"),
    (lambda: mk.discover(model(), tiny_task(), method="guess", progress=False), OptionError, "'guess'"),
    (lambda: mk.Scores.load("no-such.parquet"), StorageError, "no-such.parquet"),
    (lambda: mk.Circuit.from_json("no-such.json"), StorageError, "no-such.json"),
    # models
    (lambda: mk.load(3), LoadError, "int"),
    (lambda: mk.load("smollm2-135m", dtype="int8"), OptionError, "'int8'"),
    (lambda: mk.load("./no/such/folder"), LoadError, "no/such/folder"),
    (lambda: mk.load("no-such.gguf"), LoadError, "no-such.gguf"),
]


def test_there_are_at_least_sixty():
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize(("mistake", "error", "names"), MISTAKES, ids=[names for _, _, names in MISTAKES])
def test_a_mistake_gets_a_typed_error_that_names_it(mistake, error, names):
    with pytest.raises(error, match=re.escape(names)) as caught:
        mistake()
    assert isinstance(caught.value, MechkitError)
    message = str(caught.value)
    assert message.endswith(".")
    assert len(message) < 400


def test_nothing_is_left_behind_by_a_mistake():
    before = model().run(IDS).logits
    for mistake, error, _ in MISTAKES:
        with pytest.raises(error):
            mistake()
    assert torch.equal(model().run(IDS).logits, before)
    assert not any(point.has_hooks() for point in model().bridge.hook_dict.values())
