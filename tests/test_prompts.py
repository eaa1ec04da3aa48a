"""Prompts: text or ids that the model cannot run are refused with what was given."""

from __future__ import annotations

import pytest
import torch
from own_models import N_CTX, N_VOCAB, random_model, word_tokenizer

import mechkit as mk
from mechkit.errors import PromptError

pytestmark = pytest.mark.usefixtures("hub_offline")


@pytest.fixture(scope="module")
def silent() -> mk.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return mk.load((random_model(), None))


@pytest.fixture(scope="module")
def reading() -> mk.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return mk.load((random_model(), word_tokenizer(bos_token="<start>")))


def test_text_without_a_tokenizer_is_refused(silent):
    with pytest.raises(PromptError, match=r"GPT2LMHeadModel was loaded without a tokenizer.*mk\.load"):
        silent.run("Mary gave milk")


@pytest.mark.parametrize(
    ("ids", "given"),
    [
        (torch.tensor([[1, 100]]), "1 to 100"),
        (torch.tensor([[-1, 5]]), "-1 to 5"),
        (torch.tensor([[0.0, 1.0]]), "torch.float32"),
        (torch.tensor([[True, False]]), "torch.bool"),
        (torch.zeros(1, 0, dtype=torch.long), "[1, 0]"),
        (torch.zeros(0, 4, dtype=torch.long), "[0, 4]"),
        (torch.zeros(1, 2, 2, dtype=torch.long), "[1, 2, 2]"),
        (torch.tensor(3), "[]"),
        (torch.zeros(1, N_CTX + 1, dtype=torch.long), "17 tokens"),
    ],
    ids=["too-high", "negative", "float", "bool", "no-positions", "no-prompts", "three-axes", "no-axes", "too-long"],
)
def test_ids_that_cannot_run_are_refused(ids, given, silent):
    with pytest.raises(PromptError) as caught:
        silent.run(ids)

    assert given in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "given"),
    [
        ("", "empty prompt"),
        (["Mary", ""], "empty prompt"),
        ([], "[]"),
        (["Mary", 3], "['Mary', 3]"),
        ([1, 2, 3], "[1, 2, 3]"),
        (None, "None"),
        (42, "42"),
        ("Mary " * N_CTX, "17 tokens"),
        (["Mary", "Mary " * N_CTX], "17 tokens"),
    ],
    ids=["empty", "one-empty", "none", "mixed", "ids-in-a-list", "None", "int", "too-long", "one-too-long"],
)
def test_prompts_that_cannot_run_are_refused(prompts, given, reading):
    with pytest.raises(PromptError) as caught:
        reading.run(prompts)

    assert given in str(caught.value)


def test_text_of_no_tokens_is_an_empty_prompt():
    model = mk.load((random_model(), word_tokenizer()))

    with pytest.raises(PromptError, match=r"(?i)empty|no token"):
        model.run("   ")


def test_prompt_as_long_as_the_context_runs(reading, silent):
    assert reading.run("Mary " * (N_CTX - 1)).logits.shape == (1, N_CTX, N_VOCAB)
    assert silent.run(torch.zeros(N_CTX, dtype=torch.long)).logits.shape == (1, N_CTX, N_VOCAB)
