"""Circuit: the nodes that are said to carry out a behaviour, and the scores that say so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..errors import StorageError
from ..results import Scores, as_html, write_whole
from ..sites import HeadSet, Site, site

if TYPE_CHECKING:
    from ..edits import Ablation
    from ..model import Model
    from ..tasks.task import Task
    from .evaluate import Evaluation

FORMAT, VERSION = "mechkit circuit", 1


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of nodes in the order in which they were found.

    Attributes:
        nodes: sites; ``str(node)`` is ``"23.3"`` for a head.
        scores: the scores they were chosen by.
        meta: how the circuit was found.
    """

    nodes: tuple[Site, ...]
    scores: Scores
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> HeadSet:
        """The nodes that are heads."""
        return HeadSet([node for node in self.nodes if node.is_head], self.scores.meta.get("n_heads"))

    @property
    def frame(self) -> pd.DataFrame:
        """The rows of ``scores`` that are nodes, in the order of ``nodes``."""
        rows = self.scores.frame.drop_duplicates("site").set_index("site")
        return rows.loc[[str(node) for node in self.nodes]].reset_index()

    def evaluate(
        self,
        model: Model,
        task: Task,
        ablation: Ablation = "mean",
        reference: Task | None = None,
        controls: int = 20,
        curve: bool = True,
        seed: int = 0,
        progress: bool = True,
    ) -> Evaluation:
        """How much of the behaviour the circuit carries out by itself; see ``circuits.evaluate``."""
        from .evaluate import evaluate

        return evaluate(
            self,
            model,
            task,
            ablation=ablation,
            reference=reference,
            controls=controls,
            curve=curve,
            seed=seed,
            progress=progress,
        )

    def to_json(self, path: str | Path) -> Path:
        """Write the circuit, its scores and its provenance; whole or not at all.

        Raises:
            StorageError: the place cannot be written.
        """
        table = self.scores.frame
        content = {
            "format": FORMAT,
            "version": VERSION,
            "nodes": [str(node) for node in self.nodes],
            "meta": dict(self.meta),
            "scores": {
                "unit": self.scores.unit,
                "meta": dict(self.scores.meta),
                "columns": {str(column): str(kind) for column, kind in table.dtypes.items()},
                "rows": table.astype(object).where(table.notna(), None).to_dict("split")["data"],
            },
        }
        return write_whole(Path(path), lambda target: target.write_text(json.dumps(content, indent=1)))

    @classmethod
    def from_json(cls, path: str | Path) -> Circuit:
        """Read what ``to_json`` wrote.

        Raises:
            StorageError: no such file, or one that holds no circuit.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
            kinds = content["scores"]["columns"]
            table = pd.DataFrame(content["scores"]["rows"], columns=list(kinds)).astype(kinds)
            scores = Scores(table, content["scores"]["unit"], content["scores"]["meta"])
            return cls(tuple(site(text) for text in content["nodes"]), scores, content["meta"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise StorageError(
                f"{path} could not be read as a circuit: {error}",
                expected="a file that Circuit.to_json wrote",
            ) from error

    def __len__(self) -> int:
        return len(self.nodes)

    def __contains__(self, node: str | Site) -> bool:
        return site(node) in self.nodes

    def __repr__(self) -> str:
        return f"Circuit of {len(self)} nodes: {' '.join(map(str, self.nodes))}"

    def _repr_html_(self) -> str:
        return as_html(self.frame, f"A circuit of {len(self)} nodes")
