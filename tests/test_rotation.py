"""What stands between a query and a key is what the model's own attention does with them, at every distance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, VOCAB, tiny
from torch.testing import assert_close

import mechkit as mk
from mechkit.errors import OptionError, UnsupportedError
from mechkit.weights.rotation import rotations

TOKENS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(0))
NORMED = {"qwen3": (-1,), "gemma3": (-1,), "olmo2": (-2, -1)}  # queries and keys, over which axes
CAPS = {"gemma2": 3.0}
NOT_ROTATED = {"gpt2", "gpt-neo", "opt", "bloom", "falcon-alibi"}
WINDOWS = {"gpt-neo", "mistral", "gemma2", "gemma3", "starcoder2", "gpt-oss"}
every_family = pytest.mark.parametrize("family", FAMILIES)


def by_head(run, layer: int, kind: str, axis: int) -> torch.Tensor:
    return torch.stack([run[f"{layer}.{head}.{kind}"] for head in range(4)], axis)


def queries_keys_and_scores(family: str, layer: int) -> tuple[torch.Tensor, ...]:
    """Recorded ones of all heads; scores as they would be without a cap and without what ALiBi adds.

    A layer's scores are an odd function of its queries, but for what is added whatever the query is.
    """
    model = tiny(family)
    record = [f"{layer}.{head}.{kind}" for head in range(4) for kind in ("q", "k", "scores")]
    turned = [mk.scale(f"{layer}.{head}.q", -1.0) for head in range(4)]
    run, other = (model.run(TOKENS, record, edits) for edits in ([], turned))
    q, k = (by_head(run, layer, kind, 2) for kind in "qk")
    if family in NORMED:
        epsilon = model.hf.config.rms_norm_eps
        kv = model.n_kv_heads if family == "olmo2" else 4  # a shared key counts once
        once = k[:, :, :: 4 // kv]
        q = q * (q.square().mean(NORMED[family], keepdim=True) + epsilon).rsqrt()
        k = k * (once.square().mean(NORMED[family], keepdim=True) + epsilon).rsqrt()
    scores = (by_head(run, layer, "scores", 1) - by_head(other, layer, "scores", 1)) / 2
    cap = CAPS.get(family)
    return q, k, scores if cap is None else cap * torch.atanh(scores / cap)


@every_family
def test_it_makes_the_models_scores_of_its_queries_and_keys(family):
    found = [rotations(tiny(family), [distance]) for distance in range(4)]
    for layer in range(3):
        q, k, scores = queries_keys_and_scores(family, layer)
        for distance, turns in enumerate(found):
            seen = scores.diagonal(-distance, -2, -1)  # [batch, heads, pos]
            made = torch.einsum("bphd,hde,bphe->bhp", q[:, distance:], turns[layer], k[:, : 9 - distance])
            size = (made * seen).sum((0, 2), keepdim=True) / made.square().sum((0, 2), keepdim=True)
            assert (size > 0).all()
            assert_close(size * made, seen, atol=1e-5 * float(seen.abs().max()), rtol=1e-4)
            if family not in NORMED:  # one and the same scale everywhere
                assert_close(size, size[:, :1].expand_as(size), atol=0, rtol=1e-3)


@every_family
def test_it_is_a_rotation_or_nothing_where_queries_and_keys_have_no_norm(family):
    model, eye = tiny(family), torch.eye(tiny(family).d_head)
    for distance in (0, 3):
        turns = rotations(model, [distance])
        assert turns.shape == (3, 4, model.d_head, model.d_head)
        if family not in NORMED:
            assert_close(turns @ turns.mT, eye.expand_as(turns), atol=1e-5, rtol=0)
        if family in NOT_ROTATED or (distance == 0 and family not in NORMED):
            assert_close(turns, eye.expand_as(turns), atol=1e-5, rtol=0)
    if family == "smollm3":  # the second layer does not rotate
        assert_close(turns[1], eye.expand_as(turns[1]), atol=1e-5, rtol=0)
    assert (family in NOT_ROTATED) == bool((turns[0] - rotations(model, [0])[0]).abs().max() < 1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-j", "olmo2", "gpt2"])
def test_several_distances_are_averaged(family):
    each = torch.stack([rotations(tiny(family), [distance]) for distance in (0, 1, 3)])
    assert_close(rotations(tiny(family), [3, 0, 1]), each.mean(0), atol=1e-6, rtol=0)
    assert_close(rotations(tiny(family), [1, 1]), each[1], atol=0, rtol=0)


@every_family
def test_distances_that_a_window_hides_are_refused(family):
    if family in WINDOWS:
        for offsets in ([4], [0, 4], [40]):
            with pytest.raises(OptionError, match="every layer's attention can see"):
                rotations(tiny(family), offsets)
    else:
        assert rotations(tiny(family), [4, 40]).isfinite().all()


@pytest.mark.parametrize("offsets", [[], [-1], [64], [0, 99]])
def test_distances_that_are_none_are_refused(offsets):
    with pytest.raises(OptionError, match="numbers from 0 to 63"):
        rotations(tiny("llama"), offsets)


def test_a_model_that_runs_elsewhere_is_refused():
    with pytest.raises(UnsupportedError, match="runs elsewhere"):
        rotations(mk.Model(SimpleNamespace(info=tiny("gpt2").info)), [0])  # type: ignore[arg-type]


def test_nothing_is_left_hanging_on_the_model():
    model = tiny("llama")
    before = model.run(TOKENS).logits
    rotations(model, [2])
    assert torch.equal(model.run(TOKENS).logits, before)
