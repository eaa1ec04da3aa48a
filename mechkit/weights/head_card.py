"""What does this head do? One page: what its weights do to tokens, where it looks, and whom it hears and speaks to.

1. Token circuits of a sample of tokens, each among the whole vocabulary (``token_circuits``).
2. Its pattern on a prompt, and how much of its attention goes to the first token, the one before, and the query itself.
3. Composition with every other head: the strongest component of each sender into its query, key and value, and of its
   own into each receiver (``composition``), by z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ..errors import OptionError
from ..sites import Site
from .composition import KINDS, composition
from .head_weights import HeadWeights
from .token_circuits import token_circuits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..model import Model

PROMPT = "When Mary and John went to the store, John gave a drink to"


@dataclass(frozen=True, eq=False)
class HeadCard:
    """What was found of one head.

    Attributes:
        head: such as ``"9.9"``.
        model: its name.
        scores: shares and means, by name.
        pattern: on the prompt ``[query, key]``.
        tokens: of the prompt, as text.
        pairs: as of ``TokenCircuits``.
        partners: ``direction`` (``"hears"``, ``"speaks to"``), ``kind``, ``head``, ``component``, ``score``, ``z``.
        directions: tokens at both ends of the first OV components: ``component``, ``side``, ``end``, ``token``,
            ``score``.
    """

    head: str
    model: str
    scores: Mapping[str, float]
    pattern: np.ndarray
    tokens: tuple[str, ...]
    pairs: pd.DataFrame
    partners: pd.DataFrame
    directions: pd.DataFrame

    def plot(self) -> Figure:
        """The page as a matplotlib figure."""
        from ..view.head_card import head_figure

        return head_figure(self)

    def _repr_png_(self) -> bytes:
        return self.plot()._repr_png_()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value:.2f}" for name, value in self.scores.items())
        return f"HeadCard of {self.head} of {self.model}: {told}"


def head_card(
    model: Model,
    head: str | Site | tuple[int, int],
    prompt: str | None = None,
    *,
    sample: int = 2048,
    components: int = 3,
    partners: int = 5,
    seed: int = 0,
) -> HeadCard:
    """What a head does, on one page.

    Args:
        model: a local model.
        head: such as ``"9.9"``.
        prompt: on which its pattern is shown; left out: one about Mary and John (ids 1, 2, 3 ... without a tokenizer).
        sample: of how many tokens the token circuits are made.
        components: of how many singular components the tokens are listed.
        partners: how many heads a direction and kind.
        seed: of the sample.

    Raises:
        SiteError: a head that is not there.
        PromptError: as of ``model.run``.
        OptionError: a number outside its range.
        UnsupportedError: a model that runs elsewhere.
    """
    weights = HeadWeights.load(model)
    (site,) = weights.heads([head])
    name = str(site)
    for what, number in (("sample", sample), ("components", components), ("partners", partners)):
        if not isinstance(number, int) or number < 1:
            raise OptionError(f"{what} = {number!r}", expected="a whole number from 1")
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(model.info.d_vocab, generator=draw)[:sample].sort().values
    circuits = token_circuits(weights, site, tokens=rows, pairs=8, progress=False)
    asked = PROMPT if prompt is None else prompt
    run = model.run(
        torch.arange(1, min(9, model.info.d_vocab))[None] if prompt is None and model.tokenizer is None else asked,
        record=[f"{name}.pattern"],
    )
    pattern = run[f"{name}.pattern"][0].float().cpu()
    looks = {
        "looks at the first token": float(pattern[1:, 0].mean()),
        "looks at the token before": float(pattern.diagonal(-1)[1:].mean()),
        "looks at itself": float(pattern.diagonal()[1:].mean()),
    }
    words = tuple(model.to_text(int(one)) if model.tokenizer is not None else str(int(one)) for one in run.tokens[0])
    return HeadCard(
        name,
        model.name,
        {**circuits.summary, **looks},
        pattern.numpy(),
        words,
        circuits.pairs.reset_index(drop=True),
        _partners(weights, site, partners),
        _directions(weights, site, min(components, weights.d_head)),
    )


def _partners(weights: HeadWeights, head: Site, k: int) -> pd.DataFrame:
    """The heads that speak to a head most, and those it speaks to, by kind."""
    tables = []
    for kind in KINDS:
        for direction, there, ends in (
            ("hears", head.layer > 0, (None, [head])),
            ("speaks to", head.layer < weights.n_layers - 1, ([head], None)),
        ):
            if not there:
                continue
            found = composition(weights, *ends, kind=kind).pairs().nlargest(k, "top_z")
            column = "sender" if direction == "hears" else "receiver"
            found = found.rename(columns={column: "head_named", "top_component": "top"})
            tables.append(
                pd.DataFrame(
                    {
                        "direction": direction,
                        "kind": kind,
                        "head": found["head_named"].astype(str),
                        "component": found["top"],
                        "score": found["top_score"],
                        "z": found["top_z"],
                    }
                )
            )
    if not tables:
        return pd.DataFrame(columns=["direction", "kind", "head", "component", "score", "z"])
    return pd.concat(tables, ignore_index=True)


def _directions(weights: HeadWeights, head: Site, k: int) -> pd.DataFrame:
    """Tokens at the ends of the first OV components."""
    from .svd import svd

    own = svd(weights, [head])
    return pd.concat([own.tokens(i, 5).assign(component=i) for i in range(k)], ignore_index=True)
