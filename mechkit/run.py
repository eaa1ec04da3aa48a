"""What one run of a model gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .errors import SiteError
from .sites import Site, site

if TYPE_CHECKING:
    import pandas as pd

    from .model import Model


@dataclass(frozen=True, eq=False)
class Run:
    """What one run gave.

    Attributes:
        logits: ``[batch, pos, vocab]``.
        tokens: the ids that ran ``[batch, pos]``, padded at the right.
        lengths: tokens of each prompt ``[batch]``, padding not counted.
    """

    model: Model
    logits: Tensor
    tokens: Tensor
    lengths: Tensor
    _recorded: Mapping[tuple[str, int], Tensor]

    def __getitem__(self, address: str | Site) -> Tensor:
        """A recorded activation; shapes are in the table of ``mechkit.sites``.

        Raises:
            SiteError: it was not recorded.
        """
        wanted = site(address)
        key = (wanted.kind, wanted.layer)
        if wanted.kind == "logits":
            return self.logits
        if key not in self._recorded:
            raise SiteError(f'"{wanted}" was not recorded', fix=f'Run again with record=["{wanted}"]')
        tensor = self._recorded[key]
        if wanted.head is None:
            return tensor
        slot = self.model.info.slot(wanted)
        return tensor[:, slot] if wanted.kind in ("pattern", "scores") else tensor[:, :, slot]

    def next_tokens(self, k: int = 10, prompt: int = 0) -> pd.DataFrame:
        """The likeliest next tokens after one prompt: columns ``token``, ``logit``, ``prob``, ``rank`` from 1."""
        import pandas as pd

        logits = self.logits[prompt, int(self.lengths[prompt]) - 1].float()
        top = logits.topk(min(k, len(logits)))
        return pd.DataFrame(
            {
                "token": [self.model.to_text(i) for i in top.indices.tolist()],
                "logit": top.values.tolist(),
                "prob": logits.softmax(-1)[top.indices].tolist(),
                "rank": range(1, len(top.values) + 1),
            }
        )
