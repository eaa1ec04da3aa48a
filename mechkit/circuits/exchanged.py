"""What a circuit is written to and read from: its own files, networkx, and the files of MIB's circuit track."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from networkx import MultiDiGraph

    from ..model import Model
    from .circuit import Circuit


class Exchanged:
    """The part of ``Circuit`` that other tools and files see."""

    def to_json(self, path: str | Path) -> Path:
        """Write the circuit, its scores and its provenance; whole or not at all.

        Raises:
            StorageError: the place cannot be written.
        """
        from .exchange import to_json

        return to_json(self, Path(path))  # type: ignore[arg-type]

    @classmethod
    def from_json(cls, path: str | Path) -> Circuit:
        """Read what ``to_json`` wrote, now or in version 1.

        Raises:
            StorageError: no such file, or one that holds no circuit.
        """
        from .exchange import from_json

        return from_json(Path(path))

    def to_networkx(self, model: Model | None = None) -> MultiDiGraph:
        """The circuit as a directed graph of networkx; see ``circuits.exchange``."""
        from .exchange import to_networkx

        return to_networkx(self, model)  # type: ignore[arg-type]

    @classmethod
    def from_networkx(cls, graph: Any, model: Model | None = None) -> Circuit:
        """Read a directed graph of networkx; see ``circuits.exchange``."""
        from .exchange import from_networkx

        return from_networkx(graph, model)

    def to_mib(self, path: str | Path, model: Model | None = None) -> Path:
        """Write the circuit as the circuit track of MIB reads it, ``.json`` or ``.pt``; see ``circuits.mib``."""
        from .mib import to_mib

        return to_mib(self, Path(path), model)  # type: ignore[arg-type]

    @classmethod
    def from_mib(
        cls, path: str | Path, n_kv_heads: int | None = None, level: Literal["node", "edge"] | None = None
    ) -> Circuit:
        """Read a circuit of the circuit track of MIB, ``.json`` or ``.pt``; see ``circuits.mib``."""
        from .mib import from_mib

        return from_mib(Path(path), n_kv_heads, level)
