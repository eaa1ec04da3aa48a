"""Relevance propagation's rules written into copies of the Hub's own GPT-2 and Llama, module by module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class FixedScaleLayerNorm(nn.Module):
    def __init__(self, own: nn.LayerNorm):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        centre = x - x.mean(-1, keepdim=True)
        scale = torch.sqrt((centre**2).mean(-1, keepdim=True) + self.own.eps)
        return centre / scale.detach() * self.own.weight + self.own.bias


class FixedScaleRMSNorm(nn.Module):
    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sqrt((x**2).mean(-1, keepdim=True) + self.own.variance_epsilon)
        return x / scale.detach() * self.own.weight


class LinearActivation(nn.Module):
    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.own(x) / x).detach()


class HalvedMLP(nn.Module):
    def __init__(self, own: nn.Module):
        super().__init__()
        self.gate, self.up, self.down, self.act = own.gate_proj, own.up_proj, own.down_proj, own.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        product = gate * (self.act(gate) / gate).detach() * self.up(x)
        return self.down(product / 2 + (product / 2).detach())


def by_relevance(model: nn.Module) -> nn.Module:
    """A copy of a GPT-2 or Llama with the same values and the rules' gradients."""
    model = copy.deepcopy(model)
    if type(model).__name__ == "GPT2LMHeadModel":
        body = model.transformer
        body.ln_f = FixedScaleLayerNorm(body.ln_f)
        for block in body.h:
            block.ln_1, block.ln_2 = FixedScaleLayerNorm(block.ln_1), FixedScaleLayerNorm(block.ln_2)
            block.mlp.act = LinearActivation(block.mlp.act)
        return model
    body = model.model
    body.norm = FixedScaleRMSNorm(body.norm)
    for block in body.layers:
        block.input_layernorm = FixedScaleRMSNorm(block.input_layernorm)
        block.post_attention_layernorm = FixedScaleRMSNorm(block.post_attention_layernorm)
        block.mlp = HalvedMLP(block.mlp)
    return model
