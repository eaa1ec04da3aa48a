"""What mechkit asks of the Hub's library (transformers): quiet, attention step by step, GGUF files de-quantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def quiet_library(progress: bool = False) -> Iterator[None]:
    """Keep the Hub's library from printing advice (and, unless ``progress``, bars) while mechkit uses it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def eager(hf: Any, before: str | None = None) -> Iterator[None]:
    """While active, a module computes attention step by step, so that all of it is seen, and drops nothing out.

    Args:
        hf: a module of the Hub.
        before: the way of computing attention that it has afterwards; None: the one that it has now.
    """
    afterwards: str = before or hf.config._attn_implementation
    training = hf.training
    try:
        _set_attention(hf, "eager")
        hf.eval()
        yield
    finally:
        hf.train(training)
        _set_attention(hf, afterwards)


def _set_attention(hf: Any, attention: str) -> None:
    with quiet_library():
        hf.set_attn_implementation(attention)
    if hf.config._attn_implementation != attention:  # Falcon refuses, and then looks there all the same
        hf.config._attn_implementation = attention


def dequantise(gguf: Path, into: Path) -> None:
    """Turn a GGUF file into a folder of safetensors and tokenizer files that the Hub's library loads.

    The values are the dequantised ones in float32, exactly.
    """
    with quiet_library(progress=True):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = str(gguf.parent)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
        # It holds plain float32 weights now; the library refuses to save what still calls itself quantised.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)
