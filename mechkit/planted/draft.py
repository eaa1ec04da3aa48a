"""A tiny Llama whose weights are set by hand, one head at a time.

1. The residual stream is divided into rooms, each a few dimensions wide. A head reads some rooms and writes to others;
   what is written to a room that nobody reads has no effect, exactly.
2. The norms do nothing, though they are the Hub's own. Every token's embedding holds 2**16 in one dimension, "one",
   which no part of the model writes to. Beside its square every other one rounds away in float32 (while the rest of
   the stream has a squared length below 256), so that the root mean square is 2**13 at every position, and the norm's
   weights multiply by 2**13 again: bit for bit the identity. In exact arithmetic it is one up to 3e-8. "one" itself
   leaves a norm as 1, and serves as the bias that Llama does not have. The price: an embedding set to zero takes "one"
   with it. Corrupt twins and means keep it.
3. Rotary positions turn dimensions 0 and 8 of a query or key by one radian a position, and all others by 1e-4 or less:
   a head's match is by position or by content, as it was given the one or the others.
4. Heads and MLPs that nobody set are distractors. They attend, read and write with random weights, those after the
   first layer also read what the circuit writes, and all write to "junk", which only distractors read, and to "even",
   which is added to every logit alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..model import Model

VOCAB, N_LAYERS, N_HEADS, N_GROUPS, D_MODEL, D_HEAD = 12, 3, 4, 2, 64, 16
ROOMS = {
    "tok": slice(0, 12),  # the token, one-hot
    "mid": slice(12, 24),
    "shadow": slice(24, 36),
    "out": slice(36, 48),  # read by the unembedding, a dimension a token
    "junk": slice(48, 61),
    "even": slice(61, 62),
    "flag": slice(62, 63),
    "one": slice(63, 64),
}
SHARPNESS = 20.0
"""Score of a match, others having 0: e**-20 (2e-9) of the attention goes elsewhere. At the two middle ones of five
points between twins, two matches differ by a fifth of it, and the softmax's gradient is a 14th of its largest."""

_LARGE, _SCALE, _CONTEXT, _D_MLP = 2.0**16, 2.0**13, 16, 24
_BY_POSITION = (0, 8)
_BY_CONTENT = (*range(1, 8), *range(9, 16))
_OVERSHOOT = 32.0  # scores of a match by position: the next best is cos(1) of it, 15 less
_INPUTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
_READ_FIRST, _READ_LATER = ("tok", "one"), ("tok", "mid", "shadow", "out", "flag", "junk", "one")

Rooms = Mapping[str, Tensor]


def content(pairs: Mapping[int, int], room: str) -> Tensor:
    """Maps dimension i of a room to content dimension j of a query or key: ``[room, d_head]``.

    A query and a key that meet in one content dimension have the score ``SHARPNESS``.
    """
    matrix = torch.zeros(_width(room), D_HEAD)
    for i, j in pairs.items():
        matrix[i, _BY_CONTENT[j]] = math.sqrt(SHARPNESS * math.sqrt(D_HEAD))
    return matrix


def position(offset: int) -> Tensor:
    """From "one", a query whose best match is the key ``position(0)`` that stands ``offset`` tokens earlier."""
    matrix = torch.zeros(_width("one"), D_HEAD)
    size = math.sqrt(_OVERSHOOT * math.sqrt(D_HEAD))
    matrix[0, _BY_POSITION] = size * torch.tensor([math.cos(offset), -math.sin(offset)])
    return matrix


def value(pairs: Mapping[int, int], room: str, gain: float = 1.0) -> Tensor:
    """Maps dimension i of a room to dimension j of a value: ``[room, d_head]``; its transpose maps back."""
    matrix = torch.zeros(_width(room), D_HEAD)
    for i, j in pairs.items():
        matrix[i, j] = gain
    return matrix


def same(indices: range) -> dict[int, int]:
    """Each dimension to the dimension of the same number."""
    return {i: i for i in indices}


class Draft:
    """A Llama in the making: set heads, then ``finished``.

    Args:
        seed: of the distractors' weights, and of ``random``, from which all else is drawn.
        grouped: heads 0 and 1, and 2 and 3, share keys and values; else every head has its own.
    """

    def __init__(self, seed: int, grouped: bool):
        from transformers import LlamaConfig, LlamaForCausalLM

        self.groups = N_GROUPS if grouped else N_HEADS
        self.random = torch.Generator().manual_seed(seed)
        # A generator of their own, so that the distractors are the same whatever else is drawn.
        own_seed = int(torch.randint(2**31, (), generator=self.random))
        self._filling = torch.Generator().manual_seed(own_seed)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=D_MODEL,
            intermediate_size=_D_MLP,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            num_key_value_heads=self.groups,
            head_dim=D_HEAD,
            max_position_embeddings=_CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 1e32},
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):  # the Hub's own random weights, all replaced below
            self._model: Any = LlamaForCausalLM(config)
        self._taken: set[tuple[int, str, int]] = set()
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.zero_()
            for name, norm in self._model.named_modules():
                if name.endswith("norm"):
                    norm.weight.fill_(_SCALE)
                    norm.weight[ROOMS["one"]] = _SCALE / _LARGE
            embedding = self._model.model.embed_tokens.weight
            embedding[:, ROOMS["tok"]] = torch.eye(VOCAB)
            embedding[:, ROOMS["one"]] = _LARGE
            self.unembed("out", torch.eye(VOCAB))
            self.unembed("even", torch.ones(1, VOCAB))

    @torch.no_grad()
    def unembed(self, room: str, matrix: Tensor) -> None:
        """Have the logits read a room: ``[room, vocab]``."""
        self._model.lm_head.weight[:, ROOMS[room]] = matrix.T

    @torch.no_grad()
    def head(self, layer: int, head: int, *, q: Rooms, k: Rooms, v: Rooms, o: Rooms) -> None:
        """Set a head: what its query, key and value read, and what it writes, by room.

        Args:
            layer, head: which.
            q, k, v: ``[room, d_head]``.
            o: ``[d_head, room]``.
        """
        attention = self._model.model.layers[layer].self_attn
        for slot, rooms in (("q", q), ("k", k), ("v", v)):
            place = head if slot == "q" else self.group(head)
            self._taken.add((layer, slot, place))
            weight = getattr(attention, _INPUTS[slot]).weight
            for room, matrix in rooms.items():
                weight[_rows(place), ROOMS[room]] = matrix.T
        for room, matrix in o.items():
            attention.o_proj.weight[ROOMS[room], _rows(head)] = matrix.T

    def group(self, head: int) -> int:
        """Index of the key and value that a query head has."""
        return head * self.groups // N_HEADS

    def slot(self, layer: int, head: int, kind: str) -> str:
        """A head's q, k or v as text: ``"1.0.q"``, and ``"1.kv0.v"`` where it is a group's."""
        if kind == "q" or self.groups == N_HEADS:
            return f"{layer}.{head}.{kind}"
        return f"{layer}.kv{self.group(head)}.{kind}"

    def finished(self, name: str, linear: bool = False) -> Model:
        """The model, its distractors filled in.

        Args:
            name: what it is called.
            linear: distractors attend evenly to every key, and MLPs write nothing.
        """
        from ..sources import load

        with torch.no_grad():
            for layer, block in enumerate(self._model.model.layers):
                self._fill_attention(layer, block.self_attn, linear)
                if not linear:
                    self._fill_mlp(layer, block.mlp)
        self._model.config.name_or_path = name
        return load((self._model, None), device="cpu")

    def _fill_attention(self, layer: int, attention: Any, linear: bool) -> None:
        idle = [head for head in range(N_HEADS) if (layer, "q", head) not in self._taken]
        for head in idle:
            for slot, name in _INPUTS.items():
                place = head if slot == "q" else self.group(head)
                if (layer, slot, place) in self._taken or (linear and slot != "v"):
                    continue
                self._taken.add((layer, slot, place))
                self._scatter(getattr(attention, name).weight[_rows(place)], _read(layer), _size(layer))
            for room in ("junk", "even"):
                self._scatter(attention.o_proj.weight[ROOMS[room], _rows(head)], None, 0.08)

    def _fill_mlp(self, layer: int, mlp: Any) -> None:
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            self._scatter(weight, _read(layer), _size(layer))
        for room in ("junk", "even"):
            self._scatter(mlp.down_proj.weight[ROOMS[room]], None, 0.06)

    def _scatter(self, weight: Tensor, rooms: tuple[str, ...] | None, size: float) -> None:
        """Random weights, into the columns of some rooms or into all of them."""
        for columns in [slice(None)] if rooms is None else [ROOMS[room] for room in rooms]:
            weight[:, columns] = size * torch.randn(weight[:, columns].shape, generator=self._filling)


def _read(layer: int) -> tuple[str, ...]:
    return _READ_LATER if layer else _READ_FIRST


def _size(layer: int) -> float:
    """Of the weights that read, so that queries, keys and values come out at about 1: the stream grows."""
    return 0.25 if layer else 1.0


def _rows(head: int) -> slice:
    return slice(head * D_HEAD, (head + 1) * D_HEAD)


def _width(room: str) -> int:
    return ROOMS[room].stop - ROOMS[room].start
