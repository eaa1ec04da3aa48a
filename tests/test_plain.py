"""A Hub model without TransformerLens gives what TransformerLens' bridge gives, on every family."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from families import FAMILIES, plain, tiny, tiny_task

import mechkit as mk
from mechkit.backends.anatomy import anatomy
from mechkit.backends.plain import plain_backend
from mechkit.circuits.keep import EdgeKeeper, Keeper
from mechkit.errors import UnsupportedError
from mechkit.library import eager
from mechkit.model import Model

every_family = pytest.mark.parametrize("family", FAMILIES)
EVERYTHING = "heads q k v patterns scores mlps resid embed"


@functools.cache
def bare(family: str) -> Model:
    hf = plain(family)
    return Model(plain_backend(hf, anatomy(hf.config, family), family))


@every_family
def test_dimensions(family):
    ours, theirs = bare(family).info, tiny(family).info
    assert [ours.n_layers, ours.n_heads, ours.n_kv_heads, ours.d_model, ours.d_head, ours.d_vocab, ours.n_ctx] == [
        theirs.n_layers,
        theirs.n_heads,
        theirs.n_kv_heads,
        theirs.d_model,
        theirs.d_head,
        theirs.d_vocab,
        theirs.n_ctx,
    ]


@every_family
def test_every_site_can_be_patched(family):
    task = tiny_task(n=3)
    with eager(bare(family).hf):
        ours, theirs = (mk.patch(one(family), task, EVERYTHING, progress=False).frame for one in (bare, tiny))
    assert list(ours.site) == list(theirs.site)
    assert ours.metric.to_numpy() == pytest.approx(theirs.metric.to_numpy(), abs=1e-4)


@every_family
def test_recordings(family):
    tokens = tiny_task(n=2).clean
    names = "0.1.z 1.1.q 1.0.pattern 2.1.scores 1.1.result m1 resid.1 resid.3 embed 2.0.v 2.0.k".split()
    ours, theirs = (one(family).run(tokens, record=names) for one in (bare, tiny))
    for name in names:
        mine, its = ours[name], theirs[name]
        seen = its > -1e4  # a mask's smallest number is not the same everywhere
        assert torch.allclose(mine[seen], its[seen], atol=1e-4), name
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-4)


@every_family
def test_paths(family):
    task = tiny_task(n=3)
    for receivers in ("logits", "2.0.q 2.1.v", "m2"):
        ours, theirs = (
            mk.path_patch(one(family), task, receivers, "heads mlps embed", progress=False).frame
            for one in (bare, tiny)
        )
        assert ours.metric.to_numpy() == pytest.approx(theirs.metric.to_numpy(), abs=1e-4), receivers


@every_family
def test_gradients(family):
    task = tiny_task(n=3)
    for more in [{"method": "eap-ig", "steps": 2}] + [{"correction": "atp*"}] * (
        family != "olmo2"
    ):  # one norm for all q
        ours, theirs = (mk.edges(one(family), task, progress=False, **more).frame for one in (bare, tiny))
        size = max(1.0, float(theirs.score.abs().max()))
        assert ours.score.to_numpy() == pytest.approx(theirs.score.to_numpy(), abs=1e-4 * size), more


@every_family
def test_contextual_decomposition(family):
    task = tiny_task(n=2)
    ours, theirs = (mk.decompose(one(family), task, progress=False).frame for one in (bare, tiny))
    size = max(1.0, float(theirs.score.abs().max()))
    assert ours.score.to_numpy() == pytest.approx(theirs.score.to_numpy(), abs=2e-4 * size)


@every_family
def test_edges_kept(family):
    task = tiny_task(n=3)
    edges = tiny(family).graph().edges
    kept = [edges[::3], edges[1::2], ()]
    ours, theirs = (EdgeKeeper(one(family), task).metric(kept) for one in (bare, tiny))
    assert ours == pytest.approx(theirs, abs=1e-4)
    ours, theirs = (Keeper(one(family), task, "mean", kinds=("z", "mlp")) for one in (bare, tiny))
    some = [theirs.parts[::2], ()]
    assert ours.metric(some) == pytest.approx(theirs.metric(some), abs=1e-4)


@every_family
def test_nothing_is_left_on_the_model(family):
    model = bare(family)
    mk.path_patch(model, tiny_task(n=2), "2.0.pattern 2.1.z", progress=False)
    for name, module in model.hf.named_modules():
        left = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert (left, "forward" in vars(module)) == ([], False), name


def test_a_part_that_is_not_there():
    parts = anatomy(plain("gpt2").config, "gpt2")
    with pytest.raises(UnsupportedError, match=r"GPTNeoXForCausalLM has no module 'transformer.h.0'"):
        plain_backend(plain("neox"), parts, "neox")


def test_a_family_that_nobody_knows():
    with pytest.raises(UnsupportedError, match="mamba"):
        anatomy(transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97), "mamba")


@every_family
def test_weights(family):
    ours, theirs = (mk.HeadWeights.load(one(family)) for one in (bare, tiny))
    for kind in "QKVO":
        assert torch.allclose(getattr(ours, f"W_{kind}"), getattr(theirs, f"W_{kind}"), atol=1e-5)


@every_family
def test_generation_with_edits(family):
    tokens = tiny_task(n=2).clean[:, :5]
    edits = [mk.ablate("0.1", mode="zero"), mk.scale("m1", 0.5)]
    ours, theirs = (one(family).generate(tokens, max_new_tokens=4, edits=edits) for one in (bare, tiny))
    assert torch.equal(ours, theirs)
