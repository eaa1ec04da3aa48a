"""Heads of the packaged model, scored and edited on prompts that nothing was chosen on."""

from __future__ import annotations

import random

import pytest

import mechkit as mk

pytestmark = pytest.mark.real_model


def test_induction_heads_hold_up_repeated_tokens_more_than_others_of_their_layers(smollm2):
    heads = mk.score(smollm2, how="induction").heads(10)
    ids = mk.repeated_tokens(smollm2, n=3, length=24, seed=7)
    found = mk.score(smollm2, ids, "attention_influence", heads=heads, controls=6, progress=False).frame
    assert (found.score > found.random_max).all()


def test_one_head_scaled_makes_memorised_capitals_win(smollm2):
    """Head and factor from eight countries, tried on eight others; the chat format's first token is left out."""
    countries = list(mk.tasks.known_capitals(smollm2, surest=16))
    random.Random(0).shuffle(countries)

    def prompts(some: list[str], n: int, seed: int) -> mk.Task:
        task = mk.tasks.capitals_conflict(smollm2, n=n, seed=seed, countries=some, check=False)
        ids = task.clean[:, 1:], task.corrupt[:, 1:], task.correct, task.wrong
        return mk.Task.from_tokens(*ids, lengths=task.lengths - 1, metric="wrong_rate")

    train, test = prompts(countries[:8], 32, 0), prompts(countries[8:], 48, 1)
    head = mk.score(smollm2, train, "direct", progress=False).top(1, by="negative").site[0]
    chosen = mk.select(smollm2, train, lambda by: mk.scale(head, by), [2, 4, 6], held_out=test, progress=False).edit
    report = mk.evaluate(smollm2, test, chosen, controls=5, neutral=test.clean[:2], progress=False)
    assert report.effect >= 0.3
    assert report.interval[0] > 0
    assert report.beats_every_draw
