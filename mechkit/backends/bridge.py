"""A Hub model to a TransformerLens bridge that gives the same logits.

1. Attention is set to the one implementation that hands out patterns.
2. TransformerLens builds its bridge around the model, without looking anything up on a hub.
3. A few tokens are run before and after: a family that comes out otherwise is refused.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..errors import UnsupportedError, first_line
from ..library import quiet_library
from .hooks import TOLERANCE
from .lens import LensBackend
from .placed import check_placed


def bridged(model: Any, tokenizer: Any, name: str) -> LensBackend:
    """A Hub model, served by TransformerLens.

    Args:
        model: a causal language model; it gets TransformerLens' hook points.
        tokenizer: the Hub's, or None.
        name: what to call the model in tables and messages.

    Raises:
        UnsupportedError: no decoder with attention, or a family that TransformerLens does not serve as it is.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{name} ({type(model).__name__}) is an encoder-decoder", expected="a decoder")
    if not any("attn" in part or "attention" in part for part, _ in model.named_modules()):
        raise UnsupportedError(f"{name} ({type(model).__name__}) has no attention", expected="a transformer")
    check_placed(model, name)
    with quiet_library():
        from transformer_lens.model_bridge import sources as lens
        from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

        model.eval().set_attn_implementation("eager")  # the only one that hands out patterns
        own, parameters = _last_logits(model), dict(model.named_parameters())
        try:
            config = copy.deepcopy(model.config)
            # A model made from a config, and not loaded, has not been told its own class.
            config.architectures = config.architectures or [type(model).__name__]
            architecture = determine_architecture_from_hf_config(config)
            bridge = lens.build_bridge_from_module(model, architecture, hf_config=config, model_name=name)
        except (ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
            raise UnsupportedError(
                f"TransformerLens cannot serve {name} ({type(model).__name__}): {first_line(error)}",
                fix="Its supported families are in TransformerBridge.list_supported_models()",
            ) from error
        if tokenizer is not None:
            # Given only now: while building, TransformerLens loads a tokenizer again by its name, from the hub.
            bridge.tokenizer = tokenizer
            flags = lens.detect_tokenizer_bos_eos(tokenizer)
            bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = flags
    _keep_half_precision(bridge)
    _check_bridge(model, own, name)
    return LensBackend(bridge, name, parameters=parameters)


def _last_logits(model: Any) -> Any:
    """Logits ``[vocab]`` after a few tokens."""
    with torch.inference_mode():
        ids = torch.arange(1, min(5, model.config.get_text_config().vocab_size), device=model.device)[None]
        return model(input_ids=ids, use_cache=False).logits[0, -1]


def _check_bridge(model: Any, own: Any, name: str) -> None:
    """Compare the model as TransformerLens serves it with what it gave before.

    Raises:
        UnsupportedError: it does not run, or gives something else.
    """
    family = type(model).__name__
    try:
        off = float((_last_logits(model) - own).abs().max())
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedError(
            f"TransformerLens cannot run {name} ({family}): {first_line(error)}", expected="a family that it serves"
        ) from error
    if not off <= TOLERANCE.get(own.dtype, 1e-4) * max(1.0, float(own.abs().max())):
        raise UnsupportedError(
            f"{name} ({family}) gives other logits when TransformerLens serves it (off by {off:.2g})",
            expected="a family that it serves exactly",
        )


def _keep_half_precision(bridge: Any) -> None:
    """Make rotated queries and keys as wide as they were before, as the Hub's own are.

    Some families rotate by float32 angles (OLMo 2); TransformerLens then hands float32 to values in half precision.
    """
    for block in bridge.blocks:
        for name in ("hook_rot_q", "hook_rot_k"):
            if (point := getattr(block.attn, name, None)) is not None:
                point.register_forward_hook(lambda _, __, out: out.to(bridge.cfg.dtype))
