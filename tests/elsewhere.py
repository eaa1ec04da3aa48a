"""What must be the same wherever a model runs: shared by the tests of ``remote="local"`` and of a real service."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import VOCAB, plain, tiny_task

import mechkit as mk
from mechkit.circuits.keep import EdgeKeeper, Keeper

TOLERANCE = 1e-4
FAMILIES = ("gpt2", "llama", "gemma2", "neox")


@functools.cache
def folder(parent: Path, family: str) -> Path:
    """A tiny model of a family with a tokenizer, as ``save_pretrained`` writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    place = parent / f"tiny-{family}"
    plain(family).save_pretrained(place)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    words_only = Tokenizer(models.WordLevel(words, unk_token="w3"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_only, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(place)
    return place


def same(far: mk.Scores | mk.EdgeScores, own: mk.Scores | mk.EdgeScores, column: str = "score") -> None:
    """Two tables of the same things, with the same numbers."""
    keys = [name for name in ("site", "receiver", "position", "source", "target") if name in own.frame]
    assert far.frame[keys].equals(own.frame[keys])
    size = max(1.0, float(own.frame[column].abs().max()))
    assert far.frame[column].to_numpy() == pytest.approx(own.frame[column].to_numpy(), abs=TOLERANCE * size)


def run(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    heads = list(own.heads())
    names = [f"{heads[1]}.pattern", f"{heads[0]}.q", f"{heads[0]}.scores", str(heads[1]), "m1", "resid.1", "embed"]
    edits = [
        mk.ablate(str(heads[2]), mode="mean", reference=task),
        mk.scale("m0", 0.5),
        mk.attend(str(heads[0]), sharpen=2.0),
    ]
    for more in ({}, {"edits": edits}):
        ours, theirs = far.run(task, record=names, **more), own.run(task, record=names, **more)
        assert torch.allclose(ours.logits, theirs.logits, atol=TOLERANCE)
        for name in names:
            seen = theirs[name] > -1e4  # a mask's smallest number
            assert torch.allclose(ours[name][seen], theirs[name][seen], atol=TOLERANCE), name


def generate(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    edits = [mk.ablate(str([*own.heads()][2]), mode="zero"), mk.scale("m0", 0.5)]
    for more in ({}, {"edits": edits}):
        ours, theirs = (one.generate(task.clean[:, :5], max_new_tokens=5, **more) for one in (far, own))
        assert torch.equal(ours, theirs)


def patch(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    for what, more in (
        ("heads mlps resid embed", {}),
        ("q k v patterns scores", {"direction": "noise"}),
        ("m1", {"positions": "each"}),
    ):
        ours, theirs = (mk.patch(one, task, what, progress=False, **more) for one in (far, own))  # type: ignore[arg-type]
        same(ours, theirs)
        assert ours.meta["weights"] == theirs.meta["weights"]


def path_patch(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    last = str([*own.heads()][-1])
    for receivers, more in (
        ("logits", {}),
        (f"{last}.q {last}.v", {"each": True}),
        ("logits", {"through_mlps": False}),
    ):
        ours, theirs = (mk.path_patch(one, task, receivers, progress=False, **more) for one in (far, own))
        same(ours, theirs)


def edges(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    for more in ({"method": "eap"}, {"method": "eap-ig", "steps": 3}):
        ours, theirs = (mk.edges(one, task, progress=False, **more) for one in (far, own))
        same(ours, theirs)


def exact_edges(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    ours, theirs = (mk.edges(one, task, method="exact", progress=False) for one in (far, own))
    same(ours, theirs)


def decompose(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    ours, theirs = (mk.decompose(one, task, progress=False) for one in (far, own))
    same(ours, theirs)


def token_scores(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    text = " ".join(own.to_text([i]).strip() for i in task.clean[0].tolist())
    ours, theirs = (mk.token_scores(one, text) for one in (far, own))
    assert ours.frame.score.to_numpy() == pytest.approx(theirs.frame.score.to_numpy(), abs=TOLERANCE)


def circuits(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    for sets in (Keeper, EdgeKeeper):
        ours, theirs = (sets(one, task, "mean") for one in (far, own))
        kept = [theirs.parts[::2], theirs.parts[:3], ()]
        assert ours.metric(kept) == pytest.approx(theirs.metric(kept), abs=TOLERANCE)
        assert np.allclose(ours.model_metric, theirs.model_metric, atol=TOLERANCE)
    found = [mk.discover(one, task, method="patch", size=3) for one in (far, own)]
    assert list(map(str, found[0].nodes)) == list(map(str, found[1].nodes))
    ours, theirs = (one.evaluate(model, task) for one, model in zip(found, (far, own), strict=True))
    assert ours.faithfulness == pytest.approx(theirs.faithfulness, abs=1e-3)


def weights(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    heads = [str(one) for one in own.heads()]
    for matrix, more in (("ov", {}), ("qk", {}), ("qk", {"offset": 2})):
        for some in (heads[3], heads[2:5]):
            ours, theirs = (mk.svd(one, some, matrix, **more) for one in (far, own))
            assert ours.frame.score.to_numpy() == pytest.approx(theirs.frame.score.to_numpy(), rel=1e-3, abs=TOLERANCE)
    ours, theirs = (mk.composition(one, heads[:2], heads[-2:], kind="q") for one in (far, own))
    assert ours.frame.score.to_numpy() == pytest.approx(theirs.frame.score.to_numpy(), abs=TOLERANCE)


def head_scores(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    patterns = ["previous_token", "entropy", "first_token"]
    for data, how, more in (
        (task, patterns, {}),
        (task, ["leave_one_out", "ships", "gate_gradient", "fisher", "direct"], {}),
        (task.clean, ["leave_one_out", "semantic_distance"], {}),
    ):
        ours, theirs = (mk.score(one, data, how, **more) for one in (far, own))
        for name in how:
            same(ours[name], theirs[name])


def edits(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    heads = [str(one) for one in own.heads()]
    vectors = mk.task_vectors(own, task, heads=heads[:2])
    for edit in (
        mk.attend(heads[1], bias=-1.0, keys=0),
        mk.attend(heads[1], median=1.0, keys=1),
        mk.attend(heads[2], toward="previous", alpha=0.5),
        mk.redistribute(heads[2], keys=0, to=1),
        mk.inject(heads[:2], vectors, gate=0.5),
    ):
        ours, theirs = (one.run(task, edits=[edit]) for one in (far, own))
        assert torch.allclose(ours.logits, theirs.logits, atol=TOLERANCE), edit
    ours, theirs = (
        mk.evaluate(one, task, mk.scale(heads[0], 0.0), controls=2, neutral=task.clean, progress=False)
        for one in (far, own)
    )
    assert ours.frame["metric"].to_numpy() == pytest.approx(theirs.frame["metric"].to_numpy(), abs=TOLERANCE)


def fits(far: mk.Model, own: mk.Model, task: mk.Task) -> None:
    heads = [str(one) for one in own.heads()][:2]
    task = tiny_task(n=10)
    ours, theirs = (mk.fit(one, task, mk.steer(heads), steps=4, every=2, batch=2, progress=False) for one in (far, own))
    same(ours.scores, theirs.scores)
    assert ours.history.validation.to_numpy() == pytest.approx(theirs.history.validation.to_numpy(), abs=1e-3)


CHECKS: tuple[Callable[[mk.Model, mk.Model, mk.Task], None], ...] = (
    run,
    generate,
    patch,
    path_patch,
    edges,
    exact_edges,
    decompose,
    token_scores,
    circuits,
    weights,
    head_scores,
    edits,
    fits,
)
TASK = functools.partial(tiny_task, n=3)
