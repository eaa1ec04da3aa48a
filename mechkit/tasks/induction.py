"""Induction: what came after this token before?

Random tokens, then the same again: "A B C D A" is followed by B, which nothing but the first time round can tell.
Elhage et al. 2021, "A mathematical framework for transformer circuits"; Olsson et al. 2022, arXiv 2209.11895.

1. Draw ``length`` different tokens r, from the whole vocabulary but its special tokens.
2. The prompt is [BOS, r, first half of r], with BOS where the tokenizer has one. Its last token A stands for the
   second time, and the answer is B, the token after A the first time.
3. In the corrupt twin A goes on otherwise the first time, so that the answer changes.
   ``corrupt="swap"``: B changes places with a later token of r, one that is not in the part repeated either. Both
   twins then have the same tokens, each as often, and only the order tells which is right.
   ``corrupt="random"``: a token that is nowhere else stands in B's place.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import OptionError, TaskError
from .ability import with_ability
from .task import Task
from .twins import check_options

if TYPE_CHECKING:
    from ..metrics import Metric, MetricFunction
    from ..model import Model


def induction(
    model: Model,
    n: int = 64,
    seed: int = 0,
    length: int = 24,
    corrupt: Literal["swap", "random"] = "swap",
    metric: str | Metric | MetricFunction = "logit_diff",
    check: bool = True,
) -> Task:
    """Repeated random tokens for this model's vocabulary; no tokenizer is needed. See the module for the prompts.

    Spans: ``A1`` and ``B1`` (the first A, and what follows it), ``END`` (the second A). All prompts share a template.

    Args:
        model: gives the vocabulary and, where it has a tokenizer, the tokens that are left out of it.
        n: number of prompts.
        seed: same seed, same prompts.
        length: how many random tokens there are before they begin to repeat.
        corrupt: ``"swap"``: the wrong answer stands elsewhere in both twins; ``"random"``: in the corrupt one only.
        metric: a name, a Metric or a function ``(logits [n, vocab], task) -> [n]``.
        check: measure the accuracy, and warn when it is not clearly above chance.

    Raises:
        OptionError: ``n`` is below 1, ``length`` is below 4, or ``corrupt`` is unknown.
        TaskError: a vocabulary with fewer than ``length`` + 1 tokens to draw from.
        PromptError: longer than the model's context.
    """
    check_options(n, corrupt=(corrupt, ("swap", "random")))
    if not isinstance(length, int) or length < 4:
        raise OptionError(f"length = {length!r} tokens", expected="a whole number from 4")
    tokens = vocabulary(model)
    if len(tokens) <= length:
        raise TaskError(
            f"{model.name} has {len(tokens)} tokens to draw from", expected=f"more than length = {length} of them"
        )
    bos = getattr(model.tokenizer, "bos_token_id", None)
    start = [] if bos is None else [bos]
    half = length // 2
    draw = random.Random(seed)
    clean, twins, correct, wrong = [], [], [], []
    for _ in range(n):
        *first, new = draw.sample(tokens, length + 1)
        twin = list(first)
        if corrupt == "swap":
            other = draw.randrange(half + 1, length)
            twin[half], twin[other] = first[other], first[half]
        else:
            twin[half] = new
        clean.append([*start, *first, *first[:half]])
        twins.append([*start, *twin, *first[:half]])
        correct.append(first[half])
        wrong.append(twin[half])
    follows = torch.full((n,), len(start) + half)
    task = Task.from_tokens(
        model.tokens(torch.tensor(clean)),
        torch.tensor(twins),
        torch.tensor(correct),
        torch.tensor(wrong),
        spans={"A1": follows - 1, "B1": follows},
        metric=metric,
        name="induction",
        meta={"about": "induction", "n": n, "seed": seed, "length": length, "corrupt": corrupt},
    )
    return with_ability(model, task, depth=1) if check else task


def vocabulary(model: Model) -> list[int]:
    """Token ids to draw from: those the tokenizer can write, but its special ones; without a tokenizer, all."""
    if model.tokenizer is None:
        return list(range(model.info.d_vocab))
    special = set(model.tokenizer.all_special_ids)
    return [token for token in range(min(model.info.d_vocab, len(model.tokenizer))) if token not in special]
