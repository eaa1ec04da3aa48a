"""Attention weights straight from safetensors files, without a model.

Two layouts of names are known, whatever stands before the layer number:

    ...<layer>.attn.c_attn.weight, c_proj        one map to q, k and v (GPT-2; written as (in, out))
    ...<layer>.<attention>.q_proj.weight, k_proj, v_proj, and o_proj, out_proj or dense   (Llama, OPT, GPT-J, Phi)

The norm in front of attention is ``ln_1``, ``input_layernorm`` or ``self_attn_layer_norm``; with a bias it is a
LayerNorm, without one an RMSNorm whose weights are gains. A file does not say more than that: of families with a norm
behind attention, with norms of queries and keys, whose gains are kept less one (Gemma), whose LayerNorm has no bias
(Cohere) or whose writes are multiplied (Granite), load the model. These are refused where names tell, or a
``config.json`` beside the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LoadError, OptionError, UnsupportedError, first_line
from ..results import versions
from .folding import Affine, made_how, made_of
from .head_weights import HeadWeights

_PART = re.compile(r"(?:^|\.)(\d+)\.(?:(?:attn|self_attn|attention)\.)?(?:attention\.)?(\w+)\.(weight|bias)$")
_WANTED = "c_attn c_proj q_proj k_proj v_proj o_proj out_proj dense ln_1 input_layernorm self_attn_layer_norm".split()
_OUT = ("c_proj", "o_proj", "out_proj", "dense")
_EXACT = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NORMS = ("ln_1", "input_layernorm", "self_attn_layer_norm")
_NOT_TOLD = ("pre_feedforward_layernorm", "post_self_attn_layernorm", "q_norm", "k_norm")
_NOT_TOLD_FAMILIES = (
    "gemma",
    "cohere",
    "granite",
    "nemotron",
    "glm",
    "minicpm",
)  # as the model types of config.json begin


def from_file(path: Path, n_heads: int | None, fold_norm: bool, centre: bool | None) -> HeadWeights:
    """The weights of a file, or of all ``.safetensors`` files of a folder; see ``HeadWeights.load``.

    Raises:
        LoadError: nothing there, no attention weights in it, or not all of a layer's.
        OptionError: ``n_heads`` missing, or the widths are no multiple of it.
        UnsupportedError: norms are asked to be folded in, of a family of which a file does not tell enough.
    """
    if n_heads is None:
        raise OptionError(f"n_heads left out for {path.name}", expected="query heads a layer: shapes do not tell it")
    layers = _layers(path)
    sizes = sorted(layers)
    if sizes != list(range(len(sizes))):
        raise LoadError(f"{path.name} has layers {sizes}", expected="every layer from 0")
    read = [_matrices(path, layers[layer], n_heads) for layer in sizes]
    if len({tuple(tuple(one[kind].shape) for kind in "qkvo") for one in read}) > 1:
        raise LoadError(f"{path.name} has layers of different shapes", expected="every layer as the others")
    matrices = {kind: torch.stack([one[kind] for one in read]) for kind in "qkvo"}
    named = {kind: [one[f"b_{kind}"] for one in read if f"b_{kind}" in one] for kind in "qkv"}
    biases = {kind: torch.stack(found) for kind, found in named.items() if len(found) == len(read)}
    if fold_norm and (odd := _not_told(path, layers)):
        raise UnsupportedError(
            f"Norms of {path.name}, which has {odd}", fix="Load the model with mk.load(folder), or pass fold_norm=False"
        )
    norms = [_norm(layers[layer]) for layer in sizes]
    if fold_norm and not any(norm.there for norm in norms):
        raise LoadError(f"{path.name} has no norm in front of attention", fix="Pass fold_norm=False")
    unseen = all(norm.centres for norm in norms)
    none = [Affine(False)] * len(norms)
    made = made_of(path.stem, matrices, biases, norms, none, 1.0, unseen, fold_norm, centre)
    return HeadWeights(**made, meta={"model": path.stem, "path": str(path), "versions": versions(), **made_how(made)})


def _not_told(path: Path, layers: dict[int, dict[str, dict[str, Tensor]]]) -> str | None:
    """What is there that shows that the file does not tell how its norms are folded; None: nothing."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    try:
        family = str(json.loads(config.read_text()).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        family = ""
    if family.startswith(_NOT_TOLD_FAMILIES):
        return f"model_type {family!r}"
    return next((name for name in _NOT_TOLD if any(name in parts for parts in layers.values())), None)


def _layers(path: Path) -> dict[int, dict[str, dict[str, Tensor]]]:
    """Tensors by layer, part, and ``weight`` or ``bias``."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise LoadError(f"There is no file {path}", expected="a .safetensors file, or a folder of some")
    found: dict[int, dict[str, dict[str, Tensor]]] = {}
    towers: set[str] = set()
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no mapping
                    match = _PART.search(name)
                    if not match or match[2] not in (*_WANTED, *_NOT_TOLD) or ".mlp." in name:
                        continue
                    tensor = opened.get_tensor(name)
                    if tensor.dtype not in _EXACT:
                        raise LoadError(
                            f"{name} of {file.name} is {tensor.dtype}", expected="float32 or half precision"
                        )
                    towers.add(name[: match.start(1)])
                    found.setdefault(int(match[1]), {}).setdefault(match[2], {})[match[3]] = tensor.float()
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{file} could not be read: {first_line(error)}", expected="a safetensors file") from error
    if len(towers) > 1:
        raise LoadError(
            f"{path.name} has several stacks of layers: {', '.join(sorted(towers))}",
            fix="Load the language model by itself: mk.HeadWeights.load(mk.load(...))",
        )
    complete = {n: parts for n, parts in found.items() if "c_attn" in parts or "q_proj" in parts}
    if not complete:
        raise LoadError(
            f"No attention weights in {path.name}",
            expected="names such as h.0.attn.c_attn.weight or layers.0.self_attn.q_proj.weight",
            fix="Load the model: mk.HeadWeights.load(mk.load(...))",
        )
    return complete


def _matrices(path: Path, parts: dict[str, dict[str, Tensor]], n_heads: int) -> dict[str, Tensor]:
    """A layer's matrices in the layouts of ``HeadWeights``, and its biases as ``b_q`` and so on."""
    out: dict[str, Tensor] = {}
    last = next((name for name in _OUT if name in parts), "o_proj")
    needed = ("c_attn", last) if "c_attn" in parts else ("q_proj", "k_proj", "v_proj", last)
    if missing := [name for name in needed if "weight" not in parts.get(name, {})]:
        raise LoadError(f"{path.name} has layers without {', '.join(missing)}", expected="q, k, v and o of every layer")
    if "c_attn" in parts:
        fused, written = parts["c_attn"], parts[last]["weight"]
        columns = dict(zip("qkv", fused["weight"].chunk(3, 1), strict=True))
        added: dict[str, Any] = dict(zip("qkv", fused["bias"].chunk(3), strict=True)) if "bias" in fused else {}
    else:
        columns = {kind: parts[f"{kind}_proj"]["weight"].T for kind in "qkv"}
        added = {kind: parts[f"{kind}_proj"]["bias"] for kind in "qkv" if "bias" in parts[f"{kind}_proj"]}
        written = parts[last]["weight"].T
    width = columns["q"].shape[1]
    if n_heads < 1 or width % n_heads or columns["k"].shape[1] % (width // n_heads):
        raise OptionError(
            f"n_heads = {n_heads} for queries of width {width} in {path.name}", expected="a divisor of it"
        )
    d_head = width // n_heads
    for kind, matrix in columns.items():
        out[kind] = matrix.unflatten(1, (-1, d_head)).transpose(0, 1).contiguous()
        if kind in added:
            out[f"b_{kind}"] = added[kind].unflatten(0, (-1, d_head))
    out["o"] = written.unflatten(0, (n_heads, d_head)).contiguous()
    return out


def _norm(parts: dict[str, dict[str, Tensor]]) -> Affine:
    name = next((name for name in _NORMS if name in parts), None)
    if name is None:
        return Affine(False)
    return Affine(True, "bias" in parts[name], parts[name].get("weight"), parts[name].get("bias"))
