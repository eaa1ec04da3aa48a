"""Leave in, at each token, only the heads of a layer that write the most.

1. What a head writes at a token is z W_O, of length sqrt(z G z) with G = W_O W_O^T ``[d_head, d_head]``; G is read off
   the model once, where the model runs.
2. At each token, heads of a layer are ordered by that length; all but the first k get z = 0.

With a trained router this is Mixture-of-Head attention (MoH, 2410.11842); without one, it tells how many heads a token
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.lens import local_backend
from ..edits import TopHeads
from ..edits.reading import Positions, where
from ..errors import EditError, OptionError

if TYPE_CHECKING:
    from ..model import Model
    from ..sites import Site, SitesLike


def top_heads(model: Model, k: int, heads: SitesLike | None = None, positions: Positions = None) -> TopHeads:
    """An edit that sets to zero, at each token, all but the ``k`` heads of a layer that write the most there.

    Args:
        model: whose heads; the edit is for this model.
        k: how many of a layer's heads are left in, from 1; a layer with no more than that is not changed.
        heads: the heads to choose among, in each layer those that are named; other heads are not changed. None: all.
        positions: token positions from 0 (negative: from the end), or a span of the task; None for all.

    Raises:
        OptionError: ``k`` is not a whole number from 1.
        EditError: no heads.
        SiteError: a head this model does not have.
        UnsupportedError: its weights cannot be seen.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise OptionError(f"k = {k!r}", expected="a whole number from 1")
    chosen = tuple(model.heads(heads))
    if not chosen:
        raise EditError("top_heads of no heads", expected='at least one, such as "9.9"')
    return TopHeads(chosen, where(positions), k, dict(zip(chosen, _grams(model, chosen), strict=True)))


@where_the_model_is
@torch.no_grad()
def _grams(model: Model, heads: Sequence[Site]) -> list[Tensor]:
    """W_O W_O^T of each head ``[d_head, d_head]``, in float32."""
    branches = local_backend(model, "Weights of").branches
    found: dict[Site, Tensor] = {}
    for layer in sorted({one.layer for one in heads}):
        weight = branches.weight("o", layer).float()  # [heads, d_head, d_model]
        for one in heads:
            if one.layer == layer:
                own = weight[model.info.slot(one)]
                found[one] = (own @ own.T).cpu()
    return [found[one] for one in heads]
