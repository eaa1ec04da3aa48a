"""What must hold of the literal form of contextual decomposition by itself."""

from __future__ import annotations

import functools
import itertools
import re
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from families import plain, tiny_task
from reference import contextual as literal
from reference.contextual import Setting, contextual
from reference.patching import value_of
from reference.taps import tapped
from torch import Tensor

LAYERS, TOLERANCE = 3, 1e-4  # the Hub's own RMSNorm and softmax compute in single precision
Sources = dict[tuple[str, int], Setting]
RECORDED = [("resid", layer) for layer in range(LAYERS + 1)]
RECORDED += [(kind, layer) for kind in ("q", "k", "v", "z", "mlp") for layer in range(LAYERS)]
NORMS = "ln_1 ln_2 ln_f input_layernorm post_attention_layernorm norm".split()
OPTIONS = [
    dict(zip(("attention", "activation", "biases", "stabilise"), values, strict=True))
    for values in itertools.product(
        ("frozen", "product"), ("remainder", "shapley"), ("shared", "irrelevant"), (True, False)
    )
]

each_family = pytest.mark.parametrize("family", ["gpt2", "llama"])
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda how: "-".join(map(str, how.values())))
close = functools.partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)


@functools.cache
def model_of(family: str) -> Any:
    """In double precision: without the stabiliser the two parts can be 10,000 times their sum."""
    return plain(family, dtype=torch.float64)


def tokens() -> Tensor:
    return tiny_task(n=2, length=7).clean


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(*positions: int) -> Tensor:
    where = torch.zeros(2, 7, dtype=torch.bool)
    where[:, list(positions)] = True
    return where


def several() -> Sources:
    """Sources at every kind of site, later ones in the way of earlier ones, other positions in each prompt."""
    ragged = at(3, 5)
    ragged[1, 3] = False
    return {
        ("resid", 0): Setting(at(1, 2), drawn(2, 7, 32) / 4),  # as large as an embedding
        ("z", 0): Setting(at(*range(7)), drawn(2, 7, 4, 8, seed=1), (1,)),
        ("mlp", 1): Setting(ragged, drawn(32, seed=2)),
        ("z", 2): Setting(ragged, drawn(7, 4, 8, seed=3), (0, 3)),
    }


def everything(site: str = "") -> Sources:
    sites = [("resid", 0), *((kind, layer) for kind in ("z", "mlp") for layer in range(LAYERS))]
    return {(kind, layer): Setting(at(*range(7)), torch.zeros(())) for kind, layer in sites if site in kind}


@each_family
@every_option
def test_the_parts_sum_to_the_hubs_own_activations(family, options):
    hf = model_of(family)
    for source in (several(), {("z", 1): Setting(at(4), torch.zeros(()), (2,))}, {}):
        parts = contextual(hf, tokens(), source, **options)
        assert set(parts) == {*RECORDED, ("logits", LAYERS)}
        for site in RECORDED:
            close(sum(parts[site]), value_of(hf, tokens(), *site), msg=lambda text, site=site: f"{site}: {text}")
        close(sum(parts["logits", LAYERS]), hf(tokens()).logits)


@each_family
@every_option
def test_without_a_source_nothing_is_relevant(family, options):
    nowhere = {site: Setting(torch.zeros_like(one.where), one.values, one.heads) for site, one in several().items()}
    for source in ({}, nowhere):
        for site, (relevant, _) in contextual(model_of(family), tokens(), source, **options).items():
            assert not relevant.any(), site


@each_family
@every_option
@pytest.mark.parametrize("site", ["", "resid"], ids=["everything", "embedding"])
def test_with_everything_a_source_only_biases_can_be_irrelevant(family, options, site, monkeypatch):
    """Where |W r| is small by chance, the share's 1e-8 leaves some of a bias, which later layers can make large."""
    monkeypatch.setattr(literal, "FLOOR", 1e-30)
    parts = contextual(model_of(family), tokens(), everything(site), **options)
    if family == "llama" or options["biases"] == "shared":
        for name, (_, irrelevant) in parts.items():
            assert irrelevant.abs().max() < 1e-9, name
    else:
        assert parts["logits", LAYERS][1].abs().max() > 0.01


@each_family
def test_with_everything_a_source_no_logit_is_irrelevant_as_published(family):
    parts = contextual(model_of(family), tokens(), everything())
    assert parts["logits", LAYERS][1].abs().max() < 1e-4


@torch.no_grad()
def frozen_run(hf: Any, source: Sources) -> dict[tuple[str, int], Tensor]:
    """The Hub's model with the references set at the sources, its patterns and the scales of its norms kept."""
    patterns = [value_of(hf, tokens(), "pattern", layer) for layer in range(LAYERS)]
    norms = [module for name, module in hf.named_modules() if name.rsplit(".", 1)[-1] in NORMS]
    scales, kept = {}, {}

    def note(norm, args, _):
        spread = (args[0] - args[0].mean(-1, keepdim=True)) if hasattr(norm, "bias") else args[0]
        eps = norm.eps if hasattr(norm, "bias") else norm.variance_epsilon
        scales[norm] = (spread.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    def keep_scale(norm, args, _):
        if not hasattr(norm, "bias"):
            return args[0] / scales[norm] * norm.weight
        return (args[0] - args[0].mean(-1, keepdim=True)) / scales[norm] * norm.weight + norm.bias

    def change(own: Tensor, site: tuple[str, int]) -> Tensor:
        if site in source:
            setting = source[site]
            values = setting.values.expand_as(own)
            for prompt, position in setting.where.nonzero().tolist():
                for head in setting.heads or [slice(None)]:
                    own[prompt, position, head] = values[prompt, position, head]
        kept[site] = own.clone()
        return own

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(note).remove)
        hf(tokens(), use_cache=False)
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(keep_scale).remove)
        for layer, own in enumerate(patterns):
            stack.enter_context(tapped(hf, "pattern", layer, lambda _, own=own: own))
        for site in RECORDED:
            stack.enter_context(tapped(hf, *site, functools.partial(change, site=site)))
        kept["logits", LAYERS] = hf(tokens(), use_cache=False).logits
    return kept


@each_family
def test_the_irrelevant_part_is_the_run_with_the_references_where_that_is_exact(family):
    """Patterns frozen, biases irrelevant, f(i) and the product of irrelevant parts kept: i is a run by itself."""
    hf = model_of(family)
    for source in (several(), *({site: one} for site, one in several().items())):
        expected = frozen_run(hf, source)
        parts = contextual(hf, tokens(), source, biases="irrelevant", stabilise=False)
        for site, (_, irrelevant) in parts.items():
            close(irrelevant, expected[site], msg=lambda text, site=site: f"{site}: {text}")
        assert parts["logits", LAYERS][0].abs().max() > 0.1


@each_family
@pytest.mark.parametrize("attention", ["frozen", "product"])
@pytest.mark.parametrize("activation", ["remainder", "shapley"])
def test_direct_attribution_to_the_logits(family, attention, activation):
    """The last z a source and the last MLP wholly irrelevant: only the direct path is left, linear in z."""
    options = {"attention": attention, "activation": activation, "biases": "irrelevant", "stabilise": False}
    hf, last, heads = model_of(family), LAYERS - 1, (0, 2)
    own, reference = value_of(hf, tokens(), "z", last), drawn(2, 7, 4, 8)
    source = {
        ("z", last): Setting(at(*range(7)), reference, heads),
        ("mlp", last): Setting(at(*range(7)), value_of(hf, tokens(), "mlp", last)),
    }
    relevant, _ = contextual(hf, tokens(), source, **options)["logits", LAYERS]
    difference = torch.zeros_like(own)
    difference[:, :, list(heads)] = (own - reference)[:, :, list(heads)]
    stream = value_of(hf, tokens(), "resid", LAYERS)
    with torch.no_grad():
        if family == "gpt2":
            written = difference.flatten(-2) @ hf.transformer.h[last].attn.c_proj.weight
            written, norm = written - written.mean(-1, keepdim=True), hf.transformer.ln_f
            scale = (stream.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
        else:
            written, norm = hf.model.layers[last].self_attn.o_proj(difference.flatten(-2)), hf.model.norm
            scale = (stream.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        close(relevant, hf.lm_head(written / scale * norm.weight))


@each_family
@every_option
def test_a_source_sets_its_heads_and_positions_and_nothing_before_them(family, options):
    hf, where, values = model_of(family), at(3, 6), drawn(2, 7, 4, 8)
    earlier = {("resid", 0): Setting(at(2), torch.zeros(()))}
    before = contextual(hf, tokens(), earlier, **options)
    after = contextual(hf, tokens(), {**earlier, ("z", 1): Setting(where, values, (0, 2))}, **options)
    for site in [("resid", 1), ("q", 1), ("v", 1), ("mlp", 0)]:
        assert torch.equal(after[site][0], before[site][0]), site
    for position, head in itertools.product(range(7), range(4)):
        cell = (slice(None), position, head)
        irrelevant, arrived = after["z", 1][1][cell], before["z", 1][1][cell]
        assert torch.equal(irrelevant, values[cell] if position in (3, 6) and head in (0, 2) else arrived)
    alone = contextual(hf, tokens(), {("z", 1): Setting(where, values, (0, 2))}, **options)
    assert not alone["logits", LAYERS][0][:, :3].any()
    assert alone["logits", LAYERS][0][:, 3:].abs().amax((0, 2)).min() > 1e-3


def test_the_stabiliser_clamps_the_relevant_part_between_nothing_and_the_total():
    numbers = torch.tensor([-3.0, -1.0, -0.5, -1e-300, 0.0, 1e-300, 0.5, 1.0, 3.0], dtype=torch.float64)
    r, i = (grid.flatten() for grid in torch.meshgrid(numbers, numbers, indexing="ij"))
    r, i = torch.cat([r, drawn(500)]), torch.cat([i, drawn(500, seed=1)])
    relevant, irrelevant = literal.stabilised((r, i))
    total, nothing = r + i, torch.zeros_like(r)
    assert torch.equal(relevant, torch.clamp(r, torch.minimum(total, nothing), torch.maximum(total, nothing)))
    assert torch.equal(irrelevant, torch.clamp(i, torch.minimum(total, nothing), torch.maximum(total, nothing)))


@each_family
@torch.no_grad()
def test_it_is_stabilised_after_the_linear_maps_of_mlps_and_after_blocks(family, monkeypatch):
    hf, own, before, outputs = model_of(family), literal.stabilised, [], []
    monkeypatch.setattr(literal, "stabilised", lambda x: before.append(sum(x)) or own(x))
    names = re.compile(r".*(mlp\.(c_fc|c_proj|gate_proj|up_proj|down_proj)|\.(h|layers)\.\d)")
    with ExitStack() as stack:
        for module in (module for name, module in hf.named_modules() if names.fullmatch(name)):
            stack.callback(module.register_forward_hook(lambda _, __, out: outputs.append(out)).remove)
        hf(tokens(), use_cache=False)
    contextual(hf, tokens(), several())
    assert len(before) == LAYERS * {"gpt2": 3, "llama": 4}[family]
    for given, expected in zip(before, outputs, strict=True):
        close(given, expected)
    contextual(hf, tokens(), several(), stabilise=False)
    assert len(before) == len(outputs)


@torch.no_grad()
def test_relevant_attention_is_the_softmax_of_the_relevant_scores():
    """Against torch's own attention, with two heads a group."""
    q, k, v = ((drawn(2, 7, n, 8, seed=n), drawn(2, 7, n, 8, seed=n + 9)) for n in (4, 2, 2))
    v = (drawn(2, 7, 2, 8, seed=5), drawn(2, 7, 2, 8, seed=6))

    def own(*parts: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in parts)
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        return z.transpose(1, 2)

    whole = own(q[0] + q[1], k[0] + k[1], v[0] + v[1])
    for how, expected in (("product", own(q[0], k[0], v[0])), ("frozen", own(q[0] + q[1], k[0] + k[1], v[0]))):
        relevant, irrelevant = literal.attention(q, k, v, 0.3, how)
        close(relevant, expected)
        close(irrelevant, whole - expected)


@torch.no_grad()
@pytest.mark.parametrize("f", [torch.nn.functional.silu, lambda x: torch.sigmoid(x) + x**2], ids=["silu", "f(0) not 0"])
def test_the_shapley_forms_are_the_mean_over_both_orders(f):
    a, b = ((drawn(50, seed=n), drawn(50, seed=n + 1)) for n in (0, 2))
    together, first = literal.activation(a, f, "remainder")[0], f(a[0]) - f(torch.zeros_like(a[0]))
    relevant, irrelevant = literal.activation(a, f, "shapley")
    close(relevant, (together + first) / 2, atol=1e-6)
    close(relevant + irrelevant, f(a[0] + a[1]), atol=1e-6)
    with_others, alone = literal.product(a, b, "remainder")[0], a[0] * b[0]
    relevant, irrelevant = literal.product(a, b, "shapley")
    close(relevant, (with_others + alone) / 2, atol=1e-6)
    close(relevant + irrelevant, sum(a) * sum(b), atol=1e-6)


@torch.no_grad()
def test_biases_are_shared_by_size_or_not_at_all():
    block = model_of("gpt2").transformer.h[0]
    weight, bias = block.mlp.c_fc.weight.T, block.mlp.c_fc.bias
    x = drawn(2, 7, 32)
    for share, biases in ((0.5, "shared"), (0.25, "shared"), (0.5, "irrelevant")):
        pair = (share * x, (1 - share) * x)
        got = literal.linear(pair, weight, bias, biases), literal.layer_norm(pair, block.ln_2, biases)
        for (relevant, irrelevant), whole, own in zip(
            got, (x @ weight.T + bias, block.ln_2(x)), (bias, block.ln_2.bias), strict=True
        ):
            expected = share * (whole - own) + (share * own if biases == "shared" else 0)
            close(relevant, expected)
            close(irrelevant, whole - expected)
    norm, shift = block.ln_2, torch.full_like(x, 2.0)  # centring takes the whole of this part away, not its share
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
    relevant, irrelevant = literal.layer_norm((x, shift), norm, "shared")
    close(relevant, normed * norm.weight + x.abs() / (x.abs() + 2) * norm.bias)
    close(irrelevant, 2 / (x.abs() + 2) * norm.bias)
    x = (drawn(2, 7, 32), drawn(2, 7, 32, seed=1))
    for operation in (functools.partial(literal.linear, weight=weight, bias=bias),
                      functools.partial(literal.layer_norm, norm=block.ln_2)):  # fmt: skip
        for mine, theirs in zip(
            operation(x, biases="shared"), reversed(operation((x[1], x[0]), biases="shared")), strict=True
        ):
            close(mine, theirs)


def test_what_the_literal_form_cannot_do_is_an_error():
    wrong: dict[str, Any]
    for wrong in ({"attention": "half"}, {"activation": "half"}, {"biases": "half"}):
        with pytest.raises(ValueError, match="half"):
            contextual(model_of("gpt2"), tokens(), {}, **wrong)
    with pytest.raises(ValueError, match="no source can be at"):
        contextual(model_of("llama"), tokens(), {("z", 3): Setting(at(1), torch.zeros(()), (0,))})
    with pytest.raises(TypeError, match="Mistral"):
        contextual(model_of("mistral"), tokens(), {})
