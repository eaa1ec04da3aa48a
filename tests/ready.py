"""What tests of the ready-made tasks share: a tokenizer of their words, a tiny model that reads with it, the cases."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import words

import mechkit as mk
from mechkit.tasks.capitals_conflict import CAPITALS
from mechkit.tasks.colored_objects import BEGINNINGS, COLORS, OBJECTS, PLACES
from mechkit.tasks.docstring import NAMES, WORDS
from mechkit.tasks.gendered_pronoun import KINDS, MEN, PEOPLE, WOMEN
from mechkit.tasks.greater_than import DECADES, NOUNS
from mechkit.tasks.laundry_list import OBJECTS as BOUGHT

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
    ("laundry_list", {}, "wrong_got"),
    ("laundry_list", {"objects": 7, "index": -1}, "wrong_got"),
]
each_case = pytest.mark.parametrize(("name", "options", "differ"), CASES)


def reader(digits: int):
    """A tokenizer of the tasks' words that takes digits one, two or three at a time."""
    from tokenizers import Regex, pre_tokenizers

    prose = (
        "The lasted from the year to So is a an really isn't Q On there you see I What color A: and she he capital of "
        "city def self param Today Mike has buy First he got Then went get"
    )
    lists = [NOUNS, WOMEN, MEN, KINDS, PEOPLE, OBJECTS, COLORS, PLACES, NAMES, WORDS, CAPITALS]
    lists += [CAPITALS.values(), BOUGHT]
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
def model(digits: int = 1) -> mk.Model:
    import transformers

    tokenizer = reader(digits)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return mk.load((transformers.LlamaForCausalLM(config), tokenizer), device="cpu")


def make(name: str, of: mk.Model | None = None, n: int = 24, seed: int = 0, **options) -> mk.Task:
    return getattr(mk.tasks, name)(of or model(), n=n, seed=seed, **{"check": False, **options})


def at(task: mk.Task, span: str, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The token ``[n]`` at a span."""
    return (task.clean if ids is None else ids).gather(1, task.span(span)[:, :1])[:, 0]


def words_at(task: mk.Task, span: str, of: mk.Model | None = None) -> list[str]:
    return [(of or model()).to_text(token).strip() for token in at(task, span).tolist()]


def whole_words(known: list[str]) -> mk.Model:
    """The same model with a tokenizer of whole words, for which all others are one unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", *known])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return mk.Model(model().backend, PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>"))
