"""The matrices of every head are what the model does: they make its own queries, keys, values and writes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, VOCAB, plain, tiny
from torch.testing import assert_close

import mechkit as mk
from mechkit.backends.norms import default_epsilon
from mechkit.errors import OptionError, SiteError, UnsupportedError
from mechkit.weights.head_weights import HeadWeights

TOKENS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
NO_NORM_BEFORE = {"olmo2"}
NORM_BEHIND = {"gemma2", "gemma3", "olmo2"}
every_family = pytest.mark.parametrize("family", FAMILIES)


def recorded(run, layer: int, kind: str, heads: int = 4) -> torch.Tensor:
    """By query head ``[batch, pos, heads, width]``."""
    return torch.stack([run[f"{layer}.{head}.{kind}"] for head in range(heads)], 2)


def run_of(model: mk.Model, kinds: str, **options):
    layers = range(model.n_layers)
    record = [f"{layer}.{head}.{kind}" for layer in layers for head in range(4) for kind in kinds.split()]
    return model.run(TOKENS, [*record, *(f"m{i}" for i in layers), *(f"resid.{i}" for i in range(4))], **options)


def scale_between(made: torch.Tensor, seen: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The number that brings one nearest to the other, axes kept."""
    return (made * seen).sum(dims, keepdim=True) / made.square().sum(dims, keepdim=True)


@every_family
@torch.no_grad()
def test_queries_keys_and_values_are_the_recorded_ones_up_to_the_scale_of_the_norm(family):
    model = tiny(family)
    weights, run = HeadWeights.of(model), run_of(model, "q k v")
    for layer in range(model.n_layers):
        stream = run[f"resid.{layer}"]
        read = stream - stream.mean(-1, keepdim=True) if weights.mean_unseen else stream
        for kind in "qkv":
            made = torch.einsum("bpd,hde->bphe", stream, weights.expanded(kind)[layer])
            biases = [weights.of_bias(kind, mk.site((layer, head))) for head in range(4)]
            seen = recorded(run, layer, kind)
            seen = seen if biases[0] is None else seen - torch.stack(biases)
            scale = scale_between(made, seen, (-2, -1))
            assert_close(scale * made, seen, atol=1e-5, rtol=1e-4)
            # The same number for all heads, and for q, k and v: the one that the norm takes from the stream.
            mean_square = read.square().mean(-1)[..., None, None] + default_epsilon(model.hf.config)
            norm = torch.ones_like(scale) if family in NO_NORM_BEFORE else mean_square.rsqrt()
            assert_close(scale, norm, atol=0, rtol=1e-4)


@every_family
@torch.no_grad()
def test_what_heads_write_is_recorded_and_reaches_the_stream(family):
    model = tiny(family)
    weights, run = HeadWeights.of(model), run_of(model, "z result")
    for layer in range(model.n_layers):
        made = torch.einsum("bphe,hed->bphd", recorded(run, layer, "z"), weights.W_O[layer])
        reached = run[f"resid.{layer + 1}"] - run[f"resid.{layer}"] - run[f"m{layer}"]
        if family in NORM_BEHIND:
            whole = made.sum(2)
            scale = scale_between(whole, reached, (-1,))
            assert (scale > 0).all()
            assert_close(scale * whole, reached, atol=1e-5, rtol=1e-4)
            continue
        result = recorded(run, layer, "result")
        off = result - made
        assert_close(off, off.mean(-1, keepdim=True).expand_as(off), atol=1e-5, rtol=0)  # a number a position
        assert weights.centred or off.abs().max() < 1e-5
        rest = reached - result.sum(2)
        assert_close(rest, rest[:1, :1].expand_as(rest), atol=1e-4, rtol=0)  # b_O, the same everywhere


@every_family
def test_the_mean_is_taken_off_just_where_nobody_sees_it(family):
    model = tiny(family)
    weights = HeadWeights.of(model)
    run = model.run(TOKENS)
    ones, changes = torch.ones(model.d_model), []
    for layer in range(model.n_layers + 1):
        moved = model.run(TOKENS, edits=[mk.steer(f"resid.{layer}", ones, 2.0)])
        changes.append(float((moved.logits - run.logits).abs().max()))
    assert weights.centred == (max(changes) < 1e-4) == weights.mean_unseen, changes
    if weights.centred:
        for matrix in (weights.W_Q.mean(2), weights.W_K.mean(2), weights.W_V.mean(2), weights.W_O.mean(3)):
            assert matrix.abs().max() < 1e-6


def test_one_norm_that_sees_the_mean_is_enough():
    hf = plain("gpt2")
    hf.transformer.ln_f = torch.nn.RMSNorm(32, eps=1e-5)
    model = mk.load((hf, None), device="cpu")
    weights = HeadWeights.of(model)
    assert not weights.centred
    assert weights.W_Q.mean(2).abs().max() < 1e-6  # the norm in front of attention takes it off
    assert weights.W_O.mean(3).abs().max() > 1e-3
    assert HeadWeights.of(model, centre=True).W_O.mean(3).abs().max() < 1e-6


@every_family
@torch.no_grad()
def test_without_folding_they_are_the_models_own(family):
    model = tiny(family)
    weights, run = HeadWeights.of(model, fold_norm=False, centre=False), run_of(model, "q k v z result")
    times = getattr(model.hf.config, "residual_multiplier", 1.0)
    own = {id(parameter) for parameter in model.hf.parameters()}
    assert not any(id(getattr(weights, f"W_{kind}")) in own for kind in "QKVO")
    for layer in range(model.n_layers):
        normed = model.backend.branches.norm(layer, run[f"resid.{layer}"])
        for kind in "qkv":
            made = torch.einsum("bpd,hde->bphe", normed, weights.expanded(kind)[layer])
            biases = [weights.of_bias(kind, mk.site((layer, head))) for head in range(4)]
            made = made if biases[0] is None else made + torch.stack(biases)
            assert_close(made, recorded(run, layer, kind), atol=1e-5, rtol=1e-4)
        wrote = torch.einsum("bphe,hed->bphd", recorded(run, layer, "z"), weights.W_O[layer])
        assert_close(wrote * times, recorded(run, layer, "result"), atol=1e-5, rtol=1e-4)
    assert not weights.folded
    assert not weights.centred


def test_they_are_those_of_the_hubs_own_parameters():
    """GPT-2's one map to q, k and v, and Llama's three, cut up here."""
    weights, block = HeadWeights.of(tiny("gpt2"), fold_norm=False, centre=False), plain("gpt2").transformer.h[1]
    for number, kind in enumerate("QKV"):
        columns = block.attn.c_attn.weight[:, 32 * number + 16 : 32 * number + 24]
        assert_close(getattr(weights, f"W_{kind}")[1, 2], columns, atol=0, rtol=0)
        assert_close(weights.biases[kind.lower()][1, 2], block.attn.c_attn.bias[32 * number + 16 : 32 * number + 24])
    assert_close(weights.W_O[1, 2], block.attn.c_proj.weight[16:24], atol=0, rtol=0)
    folded = HeadWeights.of(tiny("gpt2"), centre=False)
    by_hand = torch.diag(block.ln_1.weight) @ block.attn.c_attn.weight[:, 16:24]
    assert_close(folded.W_Q[1, 2], by_hand - by_hand.mean(0), atol=1e-6, rtol=0)
    weights, block = HeadWeights.of(tiny("llama"), centre=False), plain("llama").model.layers[1]
    gain = block.input_layernorm.weight
    assert_close(weights.W_Q[1, 3], (block.self_attn.q_proj.weight[24:] * gain).T, atol=1e-6, rtol=0)
    assert_close(weights.W_K[1, 1], (block.self_attn.k_proj.weight[8:] * gain).T, atol=1e-6, rtol=0)
    assert_close(weights.W_O[1, 3], block.self_attn.o_proj.weight[:, 24:].T, atol=0, rtol=0)


@every_family
def test_shared_keys_and_values_stand_by_group(family):
    model = tiny(family)
    weights = HeadWeights.of(model)
    sizes = (weights.n_layers, weights.n_heads, weights.n_groups, weights.d_model, weights.d_head)
    assert sizes == (model.n_layers, model.n_heads, model.n_kv_heads, model.d_model, model.d_head)
    assert HeadWeights.load(weights) is weights
    assert f"{model.n_kv_heads} key/value groups" in repr(weights) or not model.info.grouped
    heads = weights.heads("2.3 0.1 1.0 1.3")
    for kind in "qkvo":
        whole, own = weights.expanded(kind), getattr(weights, f"W_{kind.upper()}")
        assert whole.shape == (weights.n_layers, 4, *own.shape[2:])
        for i, head in enumerate(heads):
            slot = model.info.group_of(head.head) if kind in "kv" else head.head
            assert torch.equal(whole[head.layer, head.head], own[head.layer, slot])
            assert torch.equal(weights.of_heads(kind, heads)[i], own[head.layer, slot])
            if kind in weights.biases:
                assert torch.equal(weights.of_bias(kind, head), weights.biases[kind][head.layer, slot])
            else:
                assert weights.of_bias(kind, head) is None


@pytest.mark.parametrize("bad", ["3.0", "0.4", "0.0.q", "m1", "resid.0", "1.kv0.k", ""])
def test_heads_that_are_not_there_are_named(bad):
    weights = HeadWeights.of(tiny("llama"))
    with pytest.raises(SiteError, match=f'"{bad}" of|not a whole head|No heads' if bad else "No heads"):
        weights.heads(bad)
    assert len(weights.heads()) == len(weights.heads("heads")) == 12


def test_what_has_no_weights_here_is_refused():
    with pytest.raises(OptionError, match="int as weights"):
        HeadWeights.load(3)  # type: ignore[arg-type]
    elsewhere = mk.Model(SimpleNamespace(info=tiny("gpt2").info))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="runs elsewhere"):
        HeadWeights.load(elsewhere)


def test_a_norm_of_another_kind_is_refused_unless_left_out():
    model = mk.load((plain("gpt2"), None), device="cpu")
    assert model.backend.branches  # compared with the model as it still is
    vars(model.bridge.blocks[1].ln1)["forward"] = torch.abs
    with pytest.raises(UnsupportedError, match="no LayerNorm and no RMSNorm"):
        HeadWeights.of(model)
    weights = HeadWeights.of(model, fold_norm=False, centre=False)
    assert torch.equal(weights.W_O, HeadWeights.of(tiny("gpt2"), fold_norm=False, centre=False).W_O)
