"""Contextual decomposition as its definition reads, on the Hub's own GPT-2 and Llama. Knows nothing of mechkit.

Hsu et al., arXiv 2407.00886, section 3.2 and appendix B.1. The product of two activations and the Shapley forms are
not in the paper.

1. Every activation is a pair (relevant, irrelevant) whose sum is the model's own value. The embedding is irrelevant.
2. Each operation computes both parts, each by its own arithmetic; only of patterns is one the total less the other.
3. Where a source is reached, relevant becomes the total less the reference, and irrelevant the reference.
4. What was carried is kept at every site. All positions, the whole vocabulary, one set of sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
FLOOR = 1e-8  # where both parts are 0, so is the relevant share
FLAT = partial(torch.flatten, start_dim=-2)


@dataclass(frozen=True)
class Setting:
    """A source at one site: the positions ``[n, pos]``, the reference values, and which heads of z (None: all)."""

    where: Tensor
    values: Tensor
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Run:
    """What the blocks of one run share: the sources, the options, and what was kept so far."""

    source: Mapping[tuple[str, int], Setting]
    attention: str
    activation: str
    biases: str
    stabilise: bool
    kept: dict[tuple[str, int], Pair] = field(default_factory=dict)

    def reached(self, kind: str, layer: int, x: Pair) -> Pair:
        """The pair that arrived at a site, set if it is a source, and kept."""
        if (kind, layer) in self.source:
            x = as_source(x, self.source[kind, layer])
        self.kept[kind, layer] = x
        return x

    def settled(self, x: Pair) -> Pair:
        return stabilised(x) if self.stabilise else x


def as_source(x: Pair, setting: Setting) -> Pair:
    total, chosen = x[0] + x[1], setting.where[:, :, None]
    if total.ndim == 4:
        own = torch.tensor([setting.heads is None or head in setting.heads for head in range(total.shape[2])])
        chosen = (chosen & own)[..., None]
    return torch.where(chosen, total - setting.values, x[0]), torch.where(chosen, setting.values, x[1])


def share(x: Pair, biases: str) -> Tensor:
    """The relevant part's share of a bias, by the sizes of the two parts."""
    if biases == "irrelevant":
        return torch.zeros_like(x[0])
    return x[0].abs() / (x[0].abs() + x[1].abs() + FLOOR)


def linear(x: Pair, weight: Tensor, bias: Tensor | None, biases: str) -> Pair:
    relevant, irrelevant = x[0] @ weight.T, x[1] @ weight.T
    part, bias = share((relevant, irrelevant), biases), torch.zeros(()) if bias is None else bias
    return relevant + part * bias, irrelevant + (1 - part) * bias


def layer_norm(x: Pair, norm: Any, biases: str) -> Pair:
    scale = torch.sqrt((x[0] + x[1]).var(-1, keepdim=True, correction=0) + norm.eps)
    relevant, irrelevant = ((part - part.mean(-1, keepdim=True)) / scale * norm.weight for part in x)
    entering = share(x, biases)  # not of what leaves the norm
    return relevant + entering * norm.bias, irrelevant + (1 - entering) * norm.bias


def rms_norm(x: Pair, norm: Any) -> Pair:
    scale = torch.sqrt((x[0] + x[1]).pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return x[0] / scale * norm.weight, x[1] / scale * norm.weight


def activation(x: Pair, f: Callable[[Tensor], Tensor], how: str) -> Pair:
    r, i = x
    if how == "remainder":
        return f(r + i) - f(i), f(i)
    nothing = f(torch.zeros_like(r))
    return (f(r + i) - f(i) + f(r) - nothing) / 2, (f(r + i) + f(i) - f(r) + nothing) / 2


def product(a: Pair, b: Pair, how: str) -> Pair:
    (ar, ai), (br, bi) = a, b
    if how == "remainder":
        return ar * br + ar * bi + ai * br, ai * bi
    return (ar * (br + bi) + (ar + ai) * br) / 2, (ai * (br + bi) + (ar + ai) * bi) / 2


def both(x: Pair, reshape: Callable[[Tensor], Tensor]) -> Pair:
    return reshape(x[0]), reshape(x[1])


def pattern(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Causal attention ``[n, heads, query, key]``."""
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k) * scale
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


def attention(q: Pair, k: Pair, v: Pair, scale: float, how: str) -> Pair:
    """z ``[n, pos, heads, d_head]``; keys and values are of groups, queries and keys already rotated."""
    repeat = partial(torch.repeat_interleave, repeats=q[0].shape[2] // k[0].shape[2], dim=2)
    (kr, ki), (vr, vi) = both(k, repeat), both(v, repeat)
    mix = partial(torch.einsum, "nhqk,nkhd->nqhd")
    total = pattern(q[0] + q[1], kr + ki, scale)
    if how == "frozen":
        return mix(total, vr), mix(total, vi)
    relevant = pattern(q[0], kr, scale)
    return mix(relevant, vr), mix(relevant, vi) + mix(total - relevant, vr) + mix(total - relevant, vi)


def rotated(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = part.chunk(2, -1)
    return part * cos[:, :, None] + torch.cat([-second, first], -1) * sin[:, :, None]


def stabilised(x: Pair) -> Pair:
    """Where the parts have opposite signs, the larger gets the total and the smaller nothing."""
    r, i = x
    opposed, larger = r.sign() * i.sign() < 0, r.abs() > i.abs()
    zero, total = torch.zeros_like(r), r + i
    relevant = torch.where(opposed, torch.where(larger, total, zero), r)
    return relevant, torch.where(opposed, torch.where(larger, zero, total), i)


def added(x: Pair, y: Pair) -> Pair:
    return x[0] + y[0], x[1] + y[1]


def block_gpt2(block: Any, layer: int, stream: Pair, run: Run) -> Pair:
    attn, mlp = block.attn, block.mlp
    fused = linear(layer_norm(stream, block.ln_1, run.biases), attn.c_attn.weight.T, attn.c_attn.bias, run.biases)
    by_head = partial(torch.unflatten, dim=-1, sizes=(3, -1, attn.head_dim))
    q, k, v = (both(fused, lambda part, i=i: by_head(part)[:, :, i]) for i in range(3))
    run.kept.update({("q", layer): q, ("k", layer): k, ("v", layer): v})
    z = run.reached("z", layer, attention(q, k, v, attn.scaling, run.attention))
    stream = added(stream, linear(both(z, FLAT), attn.c_proj.weight.T, attn.c_proj.bias, run.biases))
    normed = layer_norm(stream, block.ln_2, run.biases)
    entered = run.settled(linear(normed, mlp.c_fc.weight.T, mlp.c_fc.bias, run.biases))
    hidden = activation(entered, mlp.act, run.activation)
    out = run.settled(linear(hidden, mlp.c_proj.weight.T, mlp.c_proj.bias, run.biases))
    return run.settled(added(stream, run.reached("mlp", layer, out)))


def block_llama(block: Any, layer: int, stream: Pair, run: Run, rotate: Callable[[Tensor], Tensor]) -> Pair:
    def through(x: Pair, part: Any) -> Pair:
        return linear(x, part.weight, part.bias, run.biases)

    attn, mlp = block.self_attn, block.mlp
    normed = rms_norm(stream, block.input_layernorm)
    by_head = partial(torch.unflatten, dim=-1, sizes=(-1, attn.head_dim))
    q, k, v = (both(through(normed, part), by_head) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    run.kept.update({("q", layer): q, ("k", layer): k, ("v", layer): v})
    q, k = both(q, rotate), both(k, rotate)
    z = run.reached("z", layer, attention(q, k, v, attn.scaling, run.attention))
    stream = added(stream, through(both(z, FLAT), attn.o_proj))
    normed = rms_norm(stream, block.post_attention_layernorm)
    gate = activation(run.settled(through(normed, mlp.gate_proj)), mlp.act_fn, run.activation)
    hidden = product(gate, run.settled(through(normed, mlp.up_proj)), run.activation)
    out = run.settled(through(hidden, mlp.down_proj))
    return run.settled(added(stream, run.reached("mlp", layer, out)))


@torch.no_grad()
def contextual(
    hf: Any,
    tokens: Tensor,
    source: Mapping[tuple[str, int], Setting],
    *,
    attention: str = "frozen",
    activation: str = "remainder",
    biases: str = "shared",
    stabilise: bool = True,
) -> dict[tuple[str, int], Pair]:
    """Both parts at every site of ``tokens [n, pos]``; sources are ``("z", l)``, ``("mlp", l)`` and ``("resid", 0)``.

    Keys: ``resid`` 0 to n_layers, ``q k v z mlp`` of each layer (z and mlp after a source was set), and
    ``("logits", n_layers)``.
    """
    choices = {attention: "frozen product", activation: "remainder shapley", biases: "shared irrelevant"}
    if wrong := {given: known for given, known in choices.items() if given not in known.split()}:
        raise ValueError(f"options and what they can be: {wrong}")
    layers, family = hf.config.num_hidden_layers, type(hf).__name__
    if family not in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        raise TypeError(f"no literal form of {family} is written")
    if unknown := set(source) - {("resid", 0)} - {(kind, layer) for kind in ("z", "mlp") for layer in range(layers)}:
        raise ValueError(f"no source can be at {unknown}")
    run, positions = Run(source, attention, activation, biases, stabilise), torch.arange(tokens.shape[1])[None]
    stream = hf.get_input_embeddings()(tokens)
    if family == "GPT2LMHeadModel":
        stream = stream + hf.transformer.wpe(positions)
        blocks = [partial(block_gpt2, block) for block in hf.transformer.h]
        final = partial(layer_norm, norm=hf.transformer.ln_f, biases=biases)
    else:
        cos, sin = hf.model.rotary_emb(stream, positions)
        rotate = partial(rotated, cos=cos, sin=sin)
        blocks = [partial(block_llama, block, rotate=rotate) for block in hf.model.layers]
        final = partial(rms_norm, norm=hf.model.norm)
    x = run.reached("resid", 0, (torch.zeros_like(stream), stream))
    for layer, block in enumerate(blocks):
        x = run.reached("resid", layer + 1, block(layer=layer, stream=x, run=run))
    run.reached("logits", layers, linear(final(x), hf.lm_head.weight, hf.lm_head.bias, biases))
    return run.kept
