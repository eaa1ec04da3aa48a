"""Small models and tokenizers of one's own, to load in every way, and the logits that the Hub gives for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import mechkit as mk

N_VOCAB, N_CTX = 100, 16
IDS = torch.tensor([[1, 7, 3, 99, 0], [42, 2, 5, 8, 13]])

SIZES = {"vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_LLAMA_LIKE = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
}
# (config, n_layers, n_heads, n_kv_heads, d_model, d_head)
FAMILIES = {
    "gpt2": (GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=N_CTX, **SIZES), 2, 4, 4, 32, 8),
    "llama": (LlamaConfig(**_LLAMA_LIKE), 3, 4, 2, 32, 8),
    "neox": (GPTNeoXConfig(**{**_LLAMA_LIKE, "num_key_value_heads": None}), 3, 4, 4, 32, 8),
    # Heads wider together than the residual stream.
    "qwen3": (Qwen3Config(**_LLAMA_LIKE, head_dim=16), 3, 4, 2, 32, 16),
    "gemma2": (Gemma2Config(**_LLAMA_LIKE, head_dim=16, query_pre_attn_scalar=16), 3, 4, 2, 32, 16),
}


def random_model(family: str = "gpt2") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family][0])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms at one and biases at zero would hide mistakes
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = ["<start>", "<end>", "<unknown>", "Mary", "John", "gave", "milk", "to"]
    vocabulary = {word: i for i, word in enumerate(words + [f"w{i}" for i in range(len(words), N_VOCAB)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unknown>", eos_token="<end>", **special)


def own_logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The Hub's logits, from a copy that mechkit never touches."""
    untouched = copy.deepcopy(model)
    untouched.set_attn_implementation("eager")
    with torch.inference_mode():
        return untouched(input_ids=ids, use_cache=False).logits


def assert_same_logits(model: mk.Model, expected: torch.Tensor, ids: torch.Tensor = IDS) -> None:
    torch.testing.assert_close(model.run(ids).logits, expected, atol=1e-5, rtol=0)
