"""What stands between a head's query and its key: the rotation of rotary models, read off the model itself.

1. A score is linear in the query and in the key, before any rotation: ``score = q T k`` with T ``[d_head, d_head]``,
   one for each distance between them (and layer: some families rotate only in some).
2. Queries and keys are set to unit vectors, and the scores that the model's own attention makes of them are the entries
   of T. Where the heads of a layer have one T, they are given different ones, so that a few short rows are enough; a
   norm over the queries of all heads (OLMo 2) has gains of its own for each.
3. T is brought to the size of a rotation. The scale of scores (by ``d_head``, by a cap, by norms of queries and keys,
   which are no rotation but whose gains are in T) is thus left out: it is one positive number.

No family needs code of its own: halves or pairs, partial rotation, layers without one, and ALiBi, whose T is the
identity, come out as the model has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.lens import LensBackend, local_backend
from ..errors import OptionError

if TYPE_CHECKING:
    from ..model import Model

# Size of the unit vectors: what a cap does to scores as small as theirs is linear; in half precision, not too small.
_SMALL = {torch.float32: 1e-2, torch.float64: 1e-2, torch.bfloat16: 1e-2, torch.float16: 0.1}
_TOKENS_AT_ONCE = 4096


def read_offsets(offset: int | Sequence[int]) -> tuple[int, ...]:
    """One distance or several, as whole numbers.

    Raises:
        OptionError: something else.
    """
    try:
        several = isinstance(offset, Sequence) and not isinstance(offset, str)
        return tuple(map(index, offset)) if several else (index(offset),)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(f"offset = {offset!r}", expected="a whole number, or several") from None


@where_the_model_is
def rotations(model: Model, offsets: Sequence[int]) -> Tensor:
    """T of every head, the mean over some distances ``[layers, heads, d_head, d_head]``, rows as in ``q T k^T``.

    Args:
        model: any loaded model.
        offsets: how many positions the key stands before the query; 0: at the same position.

    Raises:
        OptionError: a distance below 0, beyond the model's context, or beyond what a sliding window sees.
    """
    backend = local_backend(model, "Weights of")
    if not offsets or min(offsets) < 0 or max(offsets) >= model.info.n_ctx:
        raise OptionError(f"Offsets {list(offsets)}", expected=f"numbers from 0 to {model.info.n_ctx - 1}")
    wanted = torch.tensor(sorted(set(offsets)))
    found = _scores_of_units(backend, int(wanted[-1]) + 1)[..., wanted]  # [layers, heads, d_head, d_head, offsets]
    if not bool(found.isfinite().all()) or bool((found.abs().amax((1, 2, 3)) == 0).any()):
        raise OptionError(
            f"Offsets {list(offsets)} on {model.name}", expected="distances that every layer's attention can see"
        )
    sized = found / found.square().sum((2, 3), keepdim=True).sqrt() * model.d_head**0.5
    return sized.mean(-1).expand(-1, model.n_heads, -1, -1)


@torch.inference_mode()
def _scores_of_units(backend: LensBackend, length: int) -> Tensor:
    """Scores of query unit a and key unit b at every distance ``[layers, heads, d_head, d_head, length]``.

    Where heads are the same, there is one for all.
    """
    info = backend.info
    size = _SMALL[next(backend.hf.parameters()).dtype]
    units = torch.eye(info.d_head, device=info.device) * size
    if _by_head(backend):
        queries = torch.arange(info.d_head)[:, None].expand(-1, info.n_heads)
    else:  # left over heads begin again
        n = -(-info.d_head // info.n_heads)
        queries = torch.arange(n * info.n_heads).view(n, info.n_heads) % info.d_head
    shares, by_head = len(queries), _by_head(backend)
    out = torch.zeros(info.n_layers, info.n_heads if by_head else 1, info.d_head, info.d_head, length)
    several = max(1, _TOKENS_AT_ONCE // (length * shares))
    for keys in torch.arange(info.d_head).split(several):
        rows = len(keys) * shares
        q = units[queries.repeat(len(keys), 1)]  # [rows, heads, d_head]
        k = units[keys.repeat_interleave(shares)]  # [rows, d_head]
        tokens = torch.ones(rows, length, dtype=torch.long, device=info.device)
        for sign in (1.0, -1.0):  # what is added to scores whatever the query is, as by ALiBi, goes out
            scores = _scores(backend, tokens, sign * q, k)  # [layers, rows, heads, length]
            scores = scores.unflatten(1, (len(keys), shares)).cpu().float() * sign / (2 * size)
            if by_head:
                out[:, :, :, keys] += scores.permute(0, 3, 2, 1, 4)
            else:
                out[:, 0, :, keys] += scores.flatten(2, 3)[:, :, : info.d_head].transpose(1, 2)
    return out


def _by_head(backend: LensBackend) -> bool:
    """Whether queries or keys are normalised over all heads together, with gains of their own."""
    norms = [getattr(backend.bridge.blocks[0].attn, f"{kind}_norm", None) for kind in "qk"]
    weights = [getattr(norm, "weight", None) for norm in norms]
    return any(weight is not None and weight.numel() != backend.info.d_head for weight in weights)


def _scores(backend: LensBackend, tokens: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Scores of the last query with each key, nearest first ``[layers, rows, heads, length]``."""
    found: dict[int, Tensor] = {}

    def setting(values: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: values.to(x).expand_as(x).clone()

    def keep(layer: int) -> Callable[[Tensor], None]:
        def function(scores: Tensor) -> None:
            found[layer] = scores[:, :, -1].flip(-1).clone()

        return function

    functions = {}
    for layer in range(backend.info.n_layers):
        functions |= {("q", layer): setting(q[:, None]), ("k", layer): setting(k[:, None, None])}
        functions["scores", layer] = keep(layer)
    with backend.hooks(functions):
        backend.body(tokens, use_cache=False)
    return torch.stack([found[layer] for layer in range(backend.info.n_layers)])
