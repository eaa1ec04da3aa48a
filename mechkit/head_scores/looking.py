"""What a head looks at, as weights on its pattern: ``score = sum over queries and keys of weights * pattern``.

Every score here is the mean, over the queries that it can be measured at, of what the query gives to some keys:

    previous_token    the key before the query
    duplicate_token   earlier keys with the query's own token
    induction         keys right behind earlier ones with the query's own token
    first_token       the first key
    distance          every key, times how many tokens it lies back
    share             the keys of a span

Olsson et al. 2022 (arXiv 2209.11895) for induction; Wang et al. 2022 (arXiv 2211.00593), appendix, for previous and
duplicate tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """Prompts whose patterns are looked at.

    Attributes:
        tokens: ids ``[n, pos]``.
        queries: which queries count ``[n, pos]``, boolean; never padding.
        span: the keys of ``share`` ``[n, pos]``; None where it is not asked for.
    """

    tokens: Tensor
    queries: Tensor
    span: Tensor | None = None

    def rows(self, some: slice) -> Seen:
        """Some of the prompts."""
        return Seen(self.tokens[some], self.queries[some], None if self.span is None else self.span[some])


def _previous(seen: Seen) -> Tensor:
    width = seen.tokens.shape[1]
    return torch.ones(width - 1, device=seen.tokens.device).diag_embed(-1).expand(len(seen.tokens), -1, -1)


def _duplicate(seen: Seen) -> Tensor:
    return (seen.tokens[:, :, None] == seen.tokens[:, None]).float().tril(-1)


def _induction(seen: Seen) -> Tensor:
    behind = torch.nn.functional.pad(_duplicate(seen), (1, 0))[..., :-1]
    return behind.tril(-1)  # a query that repeats the token before it is not its own answer


def _first(seen: Seen) -> Tensor:
    weights = torch.zeros(seen.tokens.shape[1], seen.tokens.shape[1], device=seen.tokens.device)
    weights[1:, 0] = 1.0
    return weights.expand(len(seen.tokens), -1, -1)


def _back(seen: Seen) -> Tensor:
    at = torch.arange(seen.tokens.shape[1], device=seen.tokens.device)
    return (at[:, None] - at).float().tril().expand(len(seen.tokens), -1, -1)


def _span(seen: Seen) -> Tensor:
    assert seen.span is not None
    return seen.span[:, None].float().expand(-1, seen.tokens.shape[1], -1).tril()


LINEAR: dict[str, Callable[[Seen], Tensor]] = {
    "previous_token": _previous,
    "duplicate_token": _duplicate,
    "induction": _induction,
    "first_token": _first,
    "distance": _back,
    "share": _span,
}


def weights(name: str, seen: Seen) -> Tensor:
    """Weights ``[n, query, key]`` of a score; NaN in prompts that have no query to measure it at."""
    raw = LINEAR[name](seen) * seen.queries[..., None]
    counted = (raw != 0).any(-1).sum(-1)  # queries
    return raw / torch.where(counted > 0, counted, torch.nan)[:, None, None]
