"""Tiny random models of several families, built here and never downloaded."""

from __future__ import annotations

import functools
from typing import Any

import torch

import mechkit as mk

VOCAB = 97
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ROPE = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _configs() -> dict[str, Any]:
    import transformers as t

    return {
        "gpt2": t.GPT2Config(**_COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        "neox": t.GPTNeoXConfig(
            **_COMMON,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        "llama": t.LlamaConfig(**_ROPE),
        "mistral": t.MistralConfig(**_ROPE, sliding_window=None),
        "qwen2": t.Qwen2Config(**_ROPE),
        "qwen3": t.Qwen3Config(**_ROPE, head_dim=16),
        "gemma": t.GemmaConfig(**_ROPE, head_dim=16),
        "granite": t.GraniteConfig(**_ROPE, logits_scaling=2.0, residual_multiplier=0.5),
    }


FAMILIES = ("gpt2", "neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "granite")


def plain(family: str, seed: int = 0) -> torch.nn.Module:
    """The Hub's own module, with weights large enough that heads matter."""
    import transformers as t

    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(_configs()[family], attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
            elif "norm" in name or "ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.1)  # biases
    return model


@functools.cache
def tiny(family: str) -> mk.Model:
    """A mechkit model of the family, without a tokenizer."""
    return mk.load((plain(family), None), device="cpu")


def tiny_task(n: int = 4, length: int = 9, seed: int = 0, first: int = 3) -> mk.Task:
    """Random prompts whose twins differ from position ``first`` on, at one or more places."""
    draw = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, VOCAB, (n, length), generator=draw)
    corrupt = clean.clone()
    corrupt[:, first] = (clean[:, first] - 3 + 1 + torch.randint(0, VOCAB - 4, (n,), generator=draw)) % (VOCAB - 3) + 3
    correct = torch.randint(3, VOCAB - 1, (n,), generator=draw)
    return mk.Task.from_tokens(clean, corrupt, correct, correct + 1, name="tiny")
