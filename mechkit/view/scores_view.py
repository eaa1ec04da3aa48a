"""Scores of sites, live: a map of layers and heads (or positions), the largest by name, linked with other views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import traitlets

from ..errors import OptionError, SiteError
from .widget import LiveView, linkable, linked, script, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..results import Scores


class ScoresView(LiveView):
    """The view; make one with ``scores.show()``.

    Args:
        scores: of one kind of site, one number a cell of the map.

    Attributes:
        site: what is in focus, as text: ``"9.9"``; of positions ``"resid.4@7"``.
        selection: what is chosen, as text.
    """

    _esm = script("parts", "elements", "painting", "maps", "controls", "frame", "scores")
    _css = style("views")
    _exported = ("about", "site", "selection")
    _shared: ClassVar[dict[str, str]] = {"selection": "selection", "focus": "site"}

    about = traitlets.Dict().tag(sync=True)
    site = traitlets.Unicode("").tag(sync=True)

    def __init__(self, scores: Scores):
        self._scores = scores
        grid = scores.grid()
        cells = _cells(scores)
        if not cells:
            raise OptionError(f"{len(scores)} scores, none of them a finite number", expected="at least one")
        self._names = [cell["site"] for cell in cells]
        by_head = bool(scores.frame["head"].notna().all())
        shared = bool(scores.frame["site"].str.contains("kv").any())
        down = (
            "group"
            if shared
            else "head"
            if by_head
            else "position"
            if grid.shape[1] > 1
            else scores.frame["kind"].iloc[0]
        )
        task, model = scores.meta.get("task"), scores.meta.get("model")
        task = task.get("name") if isinstance(task, dict) else task
        what = [str(one) for one in (scores.meta.get("method"), task, model) if one]
        super().__init__(
            about={
                "title": ": ".join(["Scores", *([", ".join(what)] if what else [])]),
                "unit": scores.unit,
                "rows": [
                    f"{down} {i}" if down in ("head", "group", "position") else down for i in range(grid.shape[1])
                ],
                "columns": list(range(grid.shape[0])),
                "cells": cells,
            },
            site=max(cells, key=lambda cell: abs(cell["score"]))["site"],
        )

    @property
    def title(self) -> str:
        """What stands above it."""
        return self.about["title"]

    def picture(self) -> Figure:
        """The map, as ``scores.plot()`` draws it, with what is chosen framed."""
        from .figures import site_map

        cells = {cell["site"]: (cell["column"], cell["row"]) for cell in self.about["cells"]}
        return site_map(self._scores, mark=[cells[one] for one in self.selection])

    def sentence(self) -> str:
        """The largest scores, in words."""
        ranked = sorted(self.about["cells"], key=lambda cell: -abs(cell["score"]))[:5]
        first = ", ".join(f"{cell['site']} {cell['score']:.3g}" for cell in ranked)
        return f"{self.title}, in {self.about['unit']}. The largest of {len(self._names)}: {first}."

    def _sites(self) -> Sequence[str]:
        return self._names

    @traitlets.validate("site")
    def _valid_site(self, proposal: Any) -> str:
        if str(proposal["value"]) not in self._names:
            raise SiteError(f'"{proposal["value"]}" in the view', expected="one of the sites that were scored")
        return str(proposal["value"])


def scores_view(scores: Scores, kind: str | None = None, link: LiveView | Sequence[LiveView] = ()) -> ScoresView:
    """See ``Scores.show``."""
    view = ScoresView(scores.of_kind(kind))
    linked(view, *linkable(link))
    return view


def _cells(scores: Scores) -> list[dict[str, Any]]:
    """A cell a score: which site, where, and its numbers; what was not scored is left out."""
    frame = scores.frame
    by_head = bool(frame["head"].notna().all())
    places = scores.grid().shape[1] > 1
    cells = []
    for row in frame.to_dict("records"):
        if not np.isfinite(row["score"]):
            continue
        place = row["head"] if by_head else row["position"] if places else 0
        cells.append(
            {
                "site": str(row["site"]) if by_head or not places else f"{row['site']}@{place}",
                "row": int(place),
                "column": max(0, int(row["layer"])),
                **{name: _number(row.get(name)) for name in ("score", "se", "metric")},
            }
        )
    return cells


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{float(value):.6g}")
