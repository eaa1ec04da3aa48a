"""report.html: one file that shows what was found, opens offline and needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..results import write_whole
from . import figures

if TYPE_CHECKING:
    from ..circuits.circuit import Circuit
    from ..circuits.evaluate import Evaluation


@dataclass(frozen=True, eq=False)
class Example:
    """One prompt on which attention is shown.

    Attributes:
        tokens: the prompt's tokens as text.
        patterns: attention ``[query, key]`` by head, as ``"23.3"``.
        next_tokens: likeliest next tokens and their probabilities.
    """

    tokens: list[str]
    patterns: Mapping[str, np.ndarray]
    next_tokens: list[tuple[str, float]]


@dataclass(frozen=True, eq=False)
class Behaviour:
    """How well the model does the task at all: values of the metric a prompt."""

    name: str
    unit: str
    values: np.ndarray

    @property
    def positive(self) -> float:
        """Share of prompts above zero."""
        return float((self.values > 0).mean())


def write_report(
    path: str | Path, circuit: Circuit, evaluation: Evaluation, behaviour: Behaviour, example: Example
) -> Path:
    """Write the report; whole or not at all.

    Raises:
        StorageError: the place cannot be written.
    """
    import jinja2

    static = files("mechkit.view") / "static"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((static / "report.html").read_text())
    marked = [(head.layer, head.head) for head in circuit.heads if head.head is not None]
    patterns = [
        (
            _pattern_caption(name, circuit),
            figures.svg(
                figures.attention_pattern(pattern, example.tokens, f"head {name}"), f"Attention of head {name}"
            ),
        )
        for name, pattern in example.patterns.items()
    ]
    text = template.render(
        style=(static / "report.css").read_text(),
        meta=circuit.meta,
        evaluation=evaluation,
        behaviour=behaviour,
        circuit=circuit,
        nodes=circuit.frame.to_dict("records"),
        head_map=figures.svg(
            figures.site_map(circuit.node_scores.of_kind(), marked), "Map of the effect of every head"
        ),
        curve=figures.svg(figures.faithfulness_curve(evaluation), "Faithfulness by number of heads left in"),
        example=example,
        patterns=patterns,
        provenance=json.dumps(
            {"found": dict(circuit.meta), "evaluated": dict(evaluation.meta)}, indent=1, ensure_ascii=False
        ),
    )
    return write_whole(Path(path), lambda target: target.write_text(text))


def _pattern_caption(name: str, circuit: Circuit) -> str:
    effect = float(circuit.frame.set_index("site").score[name])
    return f"{name}: effect {effect:+.2f}"
