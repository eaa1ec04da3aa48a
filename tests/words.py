"""A tokenizer of whole words, made here, and a tiny model that reads with it."""

from __future__ import annotations

import functools

import mechkit as mk


def tokenizer(words: list[str]):
    """Byte-level BPE trained until every word, with and without its leading space, is a single token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([form for word in words for form in (word, " " + word)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )


@functools.cache
def model() -> mk.Model:
    """A tiny random Llama that reads the words of the IOI task."""
    import re

    import torch
    import transformers

    from mechkit.tasks.ioi import NAMES, PLACES, TEMPLATES, THINGS

    text = " ".join([*TEMPLATES, *NAMES, *PLACES, *THINGS])
    words = sorted(set(re.findall(r"[A-Za-z]+", text)))
    reader = tokenizer(words)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(reader),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return mk.load((transformers.LlamaForCausalLM(config), reader), device="cpu")
