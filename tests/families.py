"""Tiny random models of every tested family, built here and never downloaded."""

from __future__ import annotations

import functools
from typing import Any

import torch

import mechkit as mk

VOCAB = 97
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_PLAIN = {**_COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
_ROPE = {**_PLAIN, "intermediate_size": 48, "num_key_value_heads": 2}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = 4


def _configs() -> dict[str, Any]:
    import transformers as t

    return {
        "gpt2": t.GPT2Config(**_COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        "gpt-neo": t.GPTNeoConfig(
            **_COMMON,
            hidden_size=32,
            num_layers=3,
            num_heads=4,
            attention_types=[[["local", "global", "local"], 1]],
            window_size=WINDOW,
            max_position_embeddings=64,
        ),
        "gpt-j": t.GPTJConfig(**_COMMON, n_embd=32, n_layer=3, n_head=4, rotary_dim=4, n_positions=64),
        "neox": t.GPTNeoXConfig(**_PLAIN, intermediate_size=48),
        "opt": t.OPTConfig(**_PLAIN, ffn_dim=48, word_embed_proj_dim=32),
        "bloom": t.BloomConfig(**_COMMON, hidden_size=32, n_layer=3, n_head=4),
        "falcon": t.FalconConfig(**_PLAIN, multi_query=True, alibi=False, new_decoder_architecture=False),
        "falcon-alibi": t.FalconConfig(**_PLAIN, multi_query=False, alibi=True, new_decoder_architecture=False),
        "llama": t.LlamaConfig(**_ROPE),
        "mistral": t.MistralConfig(**_ROPE, sliding_window=WINDOW),
        "mixtral": t.MixtralConfig(**_ROPE, num_local_experts=4),
        "qwen2": t.Qwen2Config(**_ROPE),
        "qwen3": t.Qwen3Config(**_ROPE, head_dim=16),
        "gemma": t.GemmaConfig(**_ROPE, head_dim=16),
        "gemma2": t.Gemma2Config(
            **_ROPE, head_dim=16, sliding_window=WINDOW, attn_logit_softcapping=3.0, final_logit_softcapping=5.0
        ),
        "gemma3": t.Gemma3TextConfig(**_ROPE, head_dim=16, sliding_window=WINDOW, layer_types=_MIXED),
        "phi": t.PhiConfig(**_ROPE),
        "phi3": t.Phi3Config(**_ROPE),
        "olmo2": t.Olmo2Config(**_ROPE),
        "granite": t.GraniteConfig(
            **_ROPE, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3, embedding_multiplier=2.0
        ),
        "cohere": t.CohereConfig(**_ROPE),
        "starcoder2": t.Starcoder2Config(**_ROPE, sliding_window=WINDOW),
        "smollm3": t.SmolLM3Config(**_ROPE, no_rope_layers=[1, 0, 1]),
        "gpt-oss": t.GptOssConfig(
            **_ROPE,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=WINDOW,
            layer_types=_MIXED,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
    }


FAMILIES = (
    "gpt2 gpt-neo gpt-j neox opt bloom falcon falcon-alibi llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3 "
    "phi phi3 olmo2 granite cohere starcoder2 smollm3 gpt-oss"
).split()


def plain(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
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
                parameter.normal_(0, 0.1)  # biases, attention sinks
    return model.to(dtype)


@functools.cache
def untouched(family: str) -> torch.nn.Module:
    """As ``plain``, one for all tests that only read it."""
    return plain(family)


@functools.cache
def tiny(family: str) -> mk.Model:
    """A mechkit model of the family, without a tokenizer."""
    return mk.load((plain(family), None), device="cpu")


def tiny_task(n: int = 4, length: int = 9, seed: int = 0, first: int = 3) -> mk.Task:
    """Random prompts whose twins differ at position ``first``."""
    draw = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, VOCAB, (n, length), generator=draw)
    corrupt = clean.clone()
    corrupt[:, first] = (clean[:, first] - 3 + 1 + torch.randint(0, VOCAB - 4, (n,), generator=draw)) % (VOCAB - 3) + 3
    correct = torch.randint(3, VOCAB - 1, (n,), generator=draw)
    return mk.Task.from_tokens(clean, corrupt, correct, correct + 1, name="tiny")
