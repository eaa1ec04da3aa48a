"""A circuit, live: layers of parts with lines between them, cut, made smaller, put into groups, and how faithful it is.

A view knows no model: it gets the circuit as plain data, a curve, and a callback that measures what is left in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import traitlets

from ..errors import OptionError, SiteError
from ..graph import ARROW, Edge, edge
from ..sites import Site, site
from .widget import LiveView, answer, script, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..circuits.circuit import Circuit

Run = Callable[[int, Sequence[str]], dict[str, Any]]


class CircuitView(LiveView):
    """The view; make one with ``circuit.show()``.

    Args:
        circuit: what is shown.
        data: its nodes, edges and columns; see ``circuit_of``.
        curve: ``{"size", "faithfulness"}``, from small to large.
        run: measures what is left in: the first members, less what is cut; None: not live.

    Attributes:
        changes: what is left in: ``size``, and ``cuts``, edges and nodes as text; ``cut``, ``restore`` and ``resize``
            change them from Python.
        groups: nodes that are drawn as one: ``{"name", "sites"}`` each.
        site: the node in focus, as text.
        selection: chosen nodes, as text.
        result: what the last measurement gave.
    """

    _esm = script("parts", "elements", "painting", "layers", "drawing", "controls", "asking", "frame", "circuit")
    _css = style("views")
    _exported = ("about", "changes", "result", "asked", "groups", "site", "selection")
    _shared: ClassVar[dict[str, str]] = {"selection": "selection", "focus": "site"}

    about = traitlets.Dict().tag(sync=True)
    changes = traitlets.Dict().tag(sync=True)
    asked = traitlets.Int(0).tag(sync=True)
    result = traitlets.Dict().tag(sync=True)
    groups = traitlets.List().tag(sync=True)
    site = traitlets.Unicode("").tag(sync=True)

    def __init__(
        self,
        circuit: Circuit,
        data: Mapping[str, Any],
        curve: Sequence[Mapping[str, Any]] = (),
        run: Run | None = None,
    ):
        self._circuit, self._run = circuit, run
        self._nodes = [node["site"] for node in data["nodes"]]
        first = max(data["nodes"], key=lambda node: abs(node["score"] or 0.0))["site"]
        super().__init__(
            about={**data, "total": len(circuit), "curve": [dict(one) for one in curve], "live": run is not None},
            changes={"size": len(circuit), "cuts": []},
            site=first,
            result={"answered": 0} if run is None else {**run(len(circuit), []), "answered": 0},
        )

    # -- what is left in ----------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many of the circuit's first members are left in."""
        return self.changes["size"]

    @property
    def cuts(self) -> list[Edge | Site]:
        """What is cut."""
        return [edge(one) if ARROW in one else site(one) for one in self.changes["cuts"]]

    @property
    def circuit(self) -> Circuit:
        """The circuit that is left: its first members, less what is cut.

        Raises:
            OptionError: a cut edge in a circuit of nodes, which cannot say so; ``cuts`` has it.
        """
        from ..circuits.circuit import Circuit

        cuts = {*self.cuts}
        if self._circuit.level == "edge":
            readers = self._circuit.scores.graph.readers  # type: ignore[union-attr]
            edges = self._circuit.edges[: self.size]
            # A key or value that several heads read stays as long as one of them is left.
            kept = [one for one in edges if not ({one, one.source} & cuts or {*readers(one.target)} <= cuts)]
            return Circuit.of_edges(kept, self._circuit.scores, self._circuit.meta)  # type: ignore[arg-type]
        if any(isinstance(one, Edge) for one in cuts):
            raise OptionError("A circuit of nodes without some of its edges", expected="cuts of nodes; see view.cuts")
        nodes = tuple(one for one in self._circuit.nodes[: self.size] if one not in cuts)
        return Circuit(nodes, self._circuit.scores, self._circuit.meta)

    def cut(self, *what: str | Edge | Site) -> None:
        """Cut edges (``"9.6->9.9.q"``) or nodes (``"9.6"``), as the page does."""
        self._ask(cuts=list(dict.fromkeys([*self.changes["cuts"], *(self._known(str(one)) for one in what)])))

    def restore(self, *what: str | Edge | Site) -> None:
        """Put back what was cut; named nothing: everything."""
        back = {self._known(str(one)) for one in what} or {*self.changes["cuts"]}
        self._ask(cuts=[one for one in self.changes["cuts"] if one not in back])

    def resize(self, size: int) -> None:
        """Leave in the circuit's first members only."""
        if not 0 <= size <= len(self._circuit):
            raise OptionError(f"size = {size}", expected=f"0 to {len(self._circuit)}")
        self._ask(size=int(size))

    def group(self, name: str, sites: Any) -> None:
        """Draw nodes as one, under a name; a node is in one group at most. Of no nodes: the group is dissolved.

        Raises:
            OptionError: no name, or one that a node has.
            SiteError: nodes that are not in the circuit.
        """
        if not name.strip() or name in self._nodes:
            raise OptionError(f"A group named {name!r}", expected="a name that no node has")
        members = self._read_chosen(sites)
        others = [{**one, "sites": [s for s in one["sites"] if s not in members]} for one in self.groups]
        kept = [one for one in others if one["sites"] and one["name"] != name]
        self.groups = [*kept, *([{"name": name, "sites": members}] if members else [])]

    # -- to look at ---------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What stands above it."""
        return self.about["title"]

    def picture(self) -> Figure:
        """The graph, and the curve where there is one."""
        from .circuit_figure import circuit_figure

        return circuit_figure(self.about, self.changes, self.groups)

    def sentence(self) -> str:
        """What is seen, in words."""
        cuts = self.changes["cuts"]
        parts = [f"{self.title}. {self.size} of {len(self._circuit)} members left in"]
        parts += [f"cut: {', '.join(cuts)}"] if cuts else []
        if "faithfulness" in self.result:
            parts.append(f"faithfulness {self.result['faithfulness']:.2f}")
        return "; ".join(parts) + "."

    def _sites(self) -> Sequence[str]:
        return self._nodes

    def _known(self, what: str) -> str:
        if ARROW in what:
            found = str(self._circuit.graph.check(what)) if self._circuit.graph else str(edge(what))
            if self._circuit.level == "edge" and found not in {str(one) for one in self._circuit.edges}:
                raise SiteError(f'"{found}" is not in the circuit', expected="one of circuit.edges")
            return found
        if what not in self._nodes or what in ("embed", "logits"):
            raise SiteError(f'"{what}" is not in the circuit', expected="one of its nodes, or an edge")
        return what

    def _ask(self, **some: Any) -> None:
        self.changes = {**self.changes, **some}
        self.asked += 1

    @traitlets.validate("site")
    def _valid_site(self, proposal: Any) -> str:
        if proposal["value"] not in self._nodes:
            raise SiteError(f'"{proposal["value"]}" in the view', expected="a node of the circuit")
        return proposal["value"]

    @traitlets.observe("asked")
    def _answer(self, change: Any) -> None:
        if self._run is None or not change["new"]:
            return
        run = self._run
        self.result = answer(lambda: run(self.changes["size"], self.changes["cuts"]), change["new"], {})
