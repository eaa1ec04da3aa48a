"""What mechkit asks of the Hub's library (transformers): to be quiet, and to de-quantise GGUF files."""

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
