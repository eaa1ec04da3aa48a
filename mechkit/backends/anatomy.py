"""Where the parts of a model are in the Hub's own module, told from its configuration alone.

A model that runs elsewhere is a plain module of the Hub there, without TransformerLens. Which of its modules is the
projection to queries, or the norm before attention, differs by family; TransformerLens knows, so it is asked:

1. A model of one layer is made from the configuration, with no weights: every matrix is one column of numbers, each row
   having its own, spread over the width without taking memory.
2. TransformerLens builds its bridge around that. Which module of the Hub is behind each of its parts is then read off.
3. A projection that TransformerLens cut out of a larger one has the numbers of its rows: those of the larger one's
   output that it is.
4. What comes out is names and numbers, which can be sent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedError, first_line
from ..library import quiet_library
from .hooks import POINTS
from .protocol import ModelInfo

PARTS = ("ln1", "ln1_post", "ln2", "ln2_post", "mlp", "attn")
_OF_ATTENTION = ("q", "k", "v", "o", "q_norm", "k_norm")


@dataclass(frozen=True)
class Place:
    """A tensor that passes through a module.

    Attributes:
        module: its name, ``{}`` for the layer: ``"model.layers.{}.self_attn.q_proj"``.
        side: what goes in or what comes out.
        numbers: which of the last axis's numbers; None for all.
        times: what the tensor is multiplied by before it is the site's.
    """

    module: str
    side: Literal["in", "out"]
    numbers: tuple[int, ...] | None = None
    times: float = 1.0


@dataclass(frozen=True)
class Anatomy:
    """Names of a model's modules.

    Attributes:
        points: where each kind of site is; patterns and scores are at no module's edge.
        modules: of each part its name, ``{}`` for the layer: ``block``, ``attn``, ``ln1``, ``q_norm``, ``ln_final`` ...
        cfg: dimensions: ``n_layers``, ``n_heads``, ``n_key_value_heads``, ``d_model``, ``d_head``, ``d_vocab``,
            ``n_ctx``, ``eps`` of norms that do not tell theirs, and whether attention and MLP are parallel.
    """

    points: Mapping[str, Place]
    modules: Mapping[str, str]
    cfg: Mapping[str, Any]

    def info(self, name: str, family: str, device: str) -> ModelInfo:
        """Dimensions of a model that is not here, and so of a precision that is not known here."""
        cfg = dict(self.cfg)
        return ModelInfo(
            name=name,
            family=family,
            n_kv_heads=cfg["n_key_value_heads"] or cfg["n_heads"],
            dtype="as served",
            device=device,
            **{key: cfg[key] for key in ("n_layers", "n_heads", "d_model", "d_head", "d_vocab", "n_ctx")},
        )


def anatomy(config: Any, name: str) -> Anatomy:
    """The anatomy of a model with this configuration.

    Args:
        config: the Hub's, of a causal language model.
        name: what to call the model in messages.

    Raises:
        UnsupportedError: TransformerLens does not know the family, or a part is nowhere in the Hub's module.
    """
    from transformers import AutoModelForCausalLM

    try:
        short = _of_one_layer(config)
        with quiet_library():
            with torch.device("meta"):
                hf: Any = AutoModelForCausalLM.from_config(short, attn_implementation="eager").eval()
            names = {id(module): one for one, module in hf.named_modules()}
            _number(hf)
            bridge = _bridge(hf, name)
        cfg = {key: getattr(bridge.cfg, key, None) for key in _DIMENSIONS} | {"n_layers": config.num_hidden_layers}
        found = _Found(bridge, names, getattr(config, "residual_multiplier", 1.0), f"{name} ({type(hf).__name__})")
        return Anatomy(dict(found.points()), dict(found.modules()), cfg)
    except (ValueError, RuntimeError, AttributeError, KeyError, TypeError, NotImplementedError) as error:
        if isinstance(error, UnsupportedError):
            raise
        raise UnsupportedError(
            f"TransformerLens cannot serve {name} ({type(config).__name__}): {first_line(error)}",
            fix="Its supported families are in TransformerBridge.list_supported_models()",
        ) from error


_DIMENSIONS = tuple("n_heads n_key_value_heads d_model d_head d_vocab n_ctx eps parallel_attn_mlp".split())


def _of_one_layer(config: Any) -> Any:
    short = copy.deepcopy(config)
    short.num_hidden_layers = 1
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:1]
    if hasattr(short, "attention_types"):  # GPT-Neo's
        short.attention_types = [[short.attention_layers[:1], 1]]
        short.attention_layers = short.attention_layers[:1]
    return short


def _number(hf: nn.Module) -> None:
    """Give every matrix and bias of a model without weights the numbers of its rows."""
    for module in hf.modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        across = isinstance(module, Conv1D)  # its matrix is [in, out]
        rows = torch.arange(module.weight.shape[1 if across else 0], dtype=torch.float32)
        spread = rows[None] if across else rows[:, None]
        module.weight = nn.Parameter(spread.expand(module.weight.shape), requires_grad=False)
        if module.bias is not None:
            module.bias = nn.Parameter(rows, requires_grad=False)


def _bridge(hf: Any, name: str) -> Any:
    from transformer_lens.model_bridge import sources as lens
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    config = copy.deepcopy(hf.config)
    config.architectures = config.architectures or [type(hf).__name__]
    architecture = determine_architecture_from_hf_config(config)
    return lens.build_bridge_from_module(hf, architecture, hf_config=config, model_name=name)


class _Found:
    """What is read off a bridge of one layer."""

    def __init__(self, bridge: Any, names: Mapping[int, str], times: float, what: str):
        self._bridge, self._names, self._what = bridge, names, what
        self._block, self._times = bridge.blocks[0], times
        self._sides = dict(self._hook_points())

    def points(self) -> Iterator[tuple[str, Place]]:
        """Where each kind of site is."""
        for kind, point in POINTS.items():
            if kind in ("pattern", "scores"):
                continue
            hook = self._bridge.hook_dict.get(point.format(0))
            if hook is None:
                continue
            if kind == "mlp" and id(hook) not in self._sides:  # Granite's, after its multiplier
                yield kind, Place(self._name(self._block.mlp.original_component), "out", None, self._times)
                continue
            part, side = self._sides[id(hook)]
            component = part.original_component
            if id(component) in self._names:
                # Granite multiplies what its embedding puts out, and TransformerLens shows the product.
                yield kind, Place(self._name(component), side, None, getattr(part, "_output_contribution_scale", 1.0))
            else:
                whole = self._name(self._block.attn.qkv.original_component)
                yield kind, Place(whole, side, tuple(int(row) for row in component.weight[:, 0]))

    def modules(self) -> Iterator[tuple[str, str]]:
        """The name of each part."""
        yield "block", self._name(self._block.original_component)
        yield "ln_final", self._name(self._bridge.ln_final.original_component)
        yield "unembed", self._name(self._bridge.unembed.original_component)
        for parent, parts in ((self._block, PARTS), (self._block.attn, _OF_ATTENTION)):
            for part in parts:
                module = parent._modules.get(part)
                if module is not None and id(module.original_component) in self._names:
                    yield part, self._name(module.original_component)

    def _name(self, component: Any) -> str:
        if id(component) not in self._names:
            raise UnsupportedError(f"{self._what} has a {type(component).__name__} that is not the Hub's")
        # The layer's number is the one part of a name that is a number and comes after the list of layers.
        block = self._names[id(self._block.original_component)]
        name = self._names[id(component)]
        return block.removesuffix("0") + "{}" + name.removeprefix(block) if name.startswith(block) else name

    def _hook_points(self) -> Iterator[tuple[int, tuple[Any, Literal["in", "out"]]]]:
        for module in self._bridge.modules():
            for side in ("in", "out"):
                hook = module._modules.get(f"hook_{side}")
                if hook is not None and hasattr(module, "original_component"):
                    yield id(hook), (module, side)
