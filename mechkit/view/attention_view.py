"""Attention of every head, live: a grid of thumbnails, one head large, edits of heads and what they do.

A view knows no model. It gets maps as arrays, and two callbacks: one runs edits, one tells which edits they are.

Of every map there is one byte a cell for all heads; the head in focus is sent in half precision when it gets there.
What the page sets, ``head``, ``selection`` and ``changes``, Python can set too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import traitlets

from ..edits import Edit
from ..errors import OptionError, SiteError
from ..sites import HeadSet, heads, site
from .widget import LiveView, answer, script, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """One number a head, query and key.

    Attributes:
        name: what it is.
        values: ``[layers, heads, query, key]``.
        signed: can be negative.
    """

    name: str
    values: np.ndarray
    signed: bool = False

    @property
    def limit(self) -> float:
        """What has the full colour: 1 of patterns, else the largest size."""
        if self.name == "pattern":
            return 1.0
        sizes = np.abs(self.values)
        return float(sizes.max(initial=0.0, where=np.isfinite(sizes))) or 1.0

    def as_bytes(self) -> bytes:
        """A byte a cell: 0 to 255; of signed maps 1 to 255, 128 for zero."""
        share = np.clip(np.nan_to_num(self.values / self.limit), -1, 1)
        whole = 128 + np.rint(127 * share) if self.signed else np.rint(255 * share)
        return np.ascontiguousarray(whole.astype(np.uint8)).tobytes()


Run = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
ToEdits = Callable[[Sequence[Mapping[str, Any]]], list[Edit]]


class AttentionView(LiveView):
    """The view; make one with ``mk.view.attention``.

    Args:
        title: above it.
        tokens: of the prompt.
        maps: the first one is shown first.
        run: what edits do: rows of next tokens, and a metric; None: not live.
        to_edits: the edits that changes of the page stand for; None: there are none.
        scores: one number a head ``[layers, heads]`` and its unit, as rings.
        compare: there is another prompt to patch from.
        focus: the head that is large first.

    Attributes:
        selection: chosen heads, as text; anything that ``mk.heads`` reads can be assigned.
        head: the head that is shown large.
        map: the name of the map that is shown.
        layer: the one layer that is shown; -1: every one.
        column: the one head of each layer that is shown; -1: every one; -2: those in ``selection``.
        order: of the grid, ``"layer"``, or ``"score"`` where there are scores: the largest in size first.
        token: the token that is locked, from 0; -1: none.
        changes: what is edited, as the page writes it; ``edits`` has it as edits.
        result: what the edits did.
    """

    _esm = script("parts", "elements", "painting", "controls", "asking", "frame", "attention_painting", "attention")
    _css = style("views")
    _exported = tuple(
        "about maps map layer column order head token exact_of exact_values selection changes asked result".split()
    )
    _shared: ClassVar[dict[str, str]] = {"selection": "selection", "focus": "head", "token": "token"}

    about = traitlets.Dict().tag(sync=True)
    maps = traitlets.Bytes().tag(sync=True)
    map = traitlets.Unicode().tag(sync=True)
    layer = traitlets.Int(-1).tag(sync=True)
    column = traitlets.Int(-1).tag(sync=True)
    order = traitlets.Unicode("layer").tag(sync=True)
    head = traitlets.Unicode("0.0").tag(sync=True)
    exact_of = traitlets.Unicode("").tag(sync=True)
    exact_values = traitlets.Bytes(b"").tag(sync=True)
    token = traitlets.Int(-1).tag(sync=True)
    changes = traitlets.List().tag(sync=True)
    asked = traitlets.Int(0).tag(sync=True)
    result = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        title: str,
        tokens: Sequence[str],
        maps: Sequence[AttentionMap],
        run: Run | None = None,
        to_edits: ToEdits | None = None,
        scores: tuple[np.ndarray, str] | None = None,
        compare: bool = False,
        focus: str = "0.0",
    ):
        # What is sent is bytes, and half precision of one head: no more is kept.
        self._maps = {one.name: replace(one, values=one.values.astype(np.float16)) for one in maps}
        self._n_tokens = len(tokens)
        self._run, self._to_edits = run, to_edits
        layers, n_heads = maps[0].values.shape[:2]
        self._shape = (layers, n_heads)
        super().__init__(
            about={
                "title": title,
                "layers": layers,
                "heads": n_heads,
                "tokens": list(tokens),
                "maps": [{"name": one.name, "signed": one.signed, "limit": one.limit} for one in maps],
                "live": run is not None,
                "compare": compare,
                "scores": None if scores is None else {"unit": scores[1], "values": _numbers(scores[0])},
            },
            maps=b"".join(one.as_bytes() for one in maps),
            map=maps[0].name,
            head=focus,
            result={"answered": 0} if run is None else {**run([]), "answered": 0},
        )
        self._send_exact()

    @property
    def title(self) -> str:
        """What stands above it."""
        return self.about["title"]

    @property
    def edits(self) -> list[Edit]:
        """The edits that are active, for ``model.run(..., edits=view.edits)``."""
        return self._to_edits(self.changes) if self._to_edits else []

    def ablate(self, addresses: Any) -> None:
        """Ablate heads, as the page does; an edit of a head takes the place of an earlier one."""
        named = [str(one) for one in self._heads(addresses)]
        kept = [one for one in self.changes if one["head"] not in named]
        self.changes = [*kept, *({"head": one, "how": "ablate"} for one in named)]
        self.asked += 1

    def undo(self, all: bool = False) -> None:
        """Take back the last edit, or all of them."""
        self.changes = [] if all else self.changes[:-1]
        self.asked += 1

    def picture(self) -> Figure:
        """The grid and the head in focus."""
        from .attention_figure import attention_grid

        one = self._maps[self.map]
        layer, head = map(int, self.head.split("."))
        return attention_grid(one.values, one.signed, one.limit, self.title, self.about["tokens"], layer, head)

    def sentence(self) -> str:
        """What is seen, in words."""
        layers, n_heads = self._shape
        edits = f" Edited: {', '.join(one['head'] for one in self.changes)}." if self.changes else ""
        return f"{self.title}. {layers} layers of {n_heads} heads; head {self.head} is large.{edits}"

    def to_circuitsvis(self) -> Any:
        """What is shown, as ``attention_heads`` of CircuitsVis: the chosen heads, or the layer of the head in focus.

        Of signed maps it gets the values as they are, from ``-limit`` to ``limit``.
        """
        from circuitsvis.attention import attention_heads

        one = self._maps[self.map]
        layer = int(self.head.split(".")[0])
        names = list(self.selection) or [name for name in self._sites() if name.startswith(f"{layer}.")]
        chosen = np.stack([one.values[tuple(map(int, name.split(".")))] for name in names])
        return attention_heads(
            chosen,
            self.about["tokens"],
            attention_head_names=names,
            max_value=one.limit,
            min_value=-one.limit if one.signed else 0.0,
            mask_upper_tri=not one.signed,
        )

    def _sites(self) -> list[str]:
        layers, n_heads = self._shape
        return [f"{layer}.{head}" for layer in range(layers) for head in range(n_heads)]

    def _read_chosen(self, chosen: Any) -> list[str]:
        return [str(one) for one in self._heads(chosen)]

    def _heads(self, addresses: Any) -> HeadSet:
        chosen = heads(addresses)
        layers, n_heads = self._shape
        for one in chosen:
            if one.layer >= layers or (one.head or 0) >= n_heads:
                raise SiteError(f'"{one}" in the view', expected=f'heads "0.0" to "{layers - 1}.{n_heads - 1}"')
        return chosen

    @traitlets.validate("head")
    def _valid_head(self, proposal: Any) -> str:
        (one,) = self._heads([site(proposal["value"])])
        return str(one)

    @traitlets.validate("map")
    def _valid_map(self, proposal: Any) -> str:
        if proposal["value"] not in self._maps:
            raise OptionError(f"map = {proposal['value']!r}", expected="one of " + ", ".join(self._maps))
        return proposal["value"]

    @traitlets.validate("order")
    def _valid_order(self, proposal: Any) -> str:
        known = ["layer", *(["score"] if self.about.get("scores") else [])]
        if proposal["value"] not in known:
            raise OptionError(
                f"order = {proposal['value']!r}", expected=" or ".join(known), fix="Make the view with scores="
            )
        return proposal["value"]

    @traitlets.observe("head", "map")
    def _send_exact(self, _: Any = None) -> None:
        if self.map not in self._maps:
            return
        layer, head = map(int, self.head.split("."))
        with self.hold_trait_notifications():
            self.exact_of = f"{self.map}|{layer}.{head}"
            self.exact_values = self._maps[self.map].values[layer, head].astype(np.float16).tobytes()

    @traitlets.observe("asked")
    def _answer(self, change: Any) -> None:
        if self._run is None or not change["new"]:
            return
        run, kept = self._run, {name: value for name, value in self.result.items() if name != "error"}
        self.result = answer(lambda: run(self.changes), change["new"], kept)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if not np.isfinite(value) else round(float(value), 6) for value in values.ravel()]
