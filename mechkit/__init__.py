"""mechkit: find, test and show circuits in transformer language models.

    import mechkit as mk

    model = mk.load("smollm2-135m")
    task = mk.tasks.ioi(model, n=64)
    found, held_out = task.split(0.5)
    circuit = mk.discover(model, found, method="patch", size=13)
    circuit.evaluate(model, held_out)
    mk.path_patch(model, found, receivers="23.3.q").top(5)

The public names below are imported when first used, so that ``import mechkit`` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import metrics, planted, remote, tasks, view
    from .circuits.circuit import Circuit
    from .circuits.compare import CircuitDiff, Overlap
    from .circuits.criteria import completeness, minimality
    from .circuits.curve import Curve, curve
    from .circuits.discover import discover
    from .circuits.evaluate import Evaluation
    from .decomposition.cdt import decompose
    from .decomposition.tokens import TokenScores, token_scores
    from .edge_scores import EdgeScores
    from .edits import ablate, attend, gate, inject, patch_in, redistribute, scale, steer, transform
    from .errors import MechkitError, MechkitWarning
    from .evidence.edit_evaluation import EditEvaluation
    from .evidence.evaluate import evaluate
    from .evidence.groups import GroupComparison, compare_groups
    from .fitting.fit import Fit, fit
    from .fitting.select import Selection, select
    from .graph import Edge, Graph, edge
    from .head_scores.needles import needles
    from .head_scores.repeated import repeated_tokens
    from .head_scores.score import score
    from .head_scores.top_heads import top_heads
    from .head_scores.vectors import steering_vectors, task_vectors
    from .model import Model
    from .patching.activation import patch
    from .patching.edges import edges
    from .patching.path import path_patch
    from .results import Scores
    from .sites import HeadSet, Site, heads, site
    from .sources import load
    from .tasks.task import Task
    from .view.explorer import explore
    from .weights.channels import ChannelEffects, channel_effects
    from .weights.composition import Composition, composition
    from .weights.edit_weights import WeightEdit, edit_weights
    from .weights.head_card import HeadCard, head_card
    from .weights.head_weights import HeadWeights
    from .weights.subspace import Subspace
    from .weights.suppression import CopySuppression, copy_suppression
    from .weights.svd import HeadSVD, svd
    from .weights.token_circuits import TokenCircuits, token_circuits

_HOMES = {
    "Circuit": "circuits.circuit",
    "CircuitDiff": "circuits.compare",
    "Overlap": "circuits.compare",
    "completeness": "circuits.criteria",
    "minimality": "circuits.criteria",
    "Curve": "circuits.curve",
    "curve": "circuits.curve",
    "discover": "circuits.discover",
    "explore": "view.explorer",
    "Evaluation": "circuits.evaluate",
    "decompose": "decomposition.cdt",
    "EdgeScores": "edge_scores",
    "ablate": "edits",
    "attend": "edits",
    "patch_in": "edits",
    "scale": "edits",
    "steer": "edits",
    "transform": "edits",
    "MechkitError": "errors",
    "MechkitWarning": "errors",
    "Edge": "graph",
    "Graph": "graph",
    "edge": "graph",
    "Model": "model",
    "patch": "patching.activation",
    "edges": "patching.edges",
    "path_patch": "patching.path",
    "Scores": "results",
    "score": "head_scores.score",
    "needles": "head_scores.needles",
    "task_vectors": "head_scores.vectors",
    "steering_vectors": "head_scores.vectors",
    "compare_groups": "evidence.groups",
    "GroupComparison": "evidence.groups",
    "select": "fitting.select",
    "Selection": "fitting.select",
    "fit": "fitting.fit",
    "Fit": "fitting.fit",
    "EditEvaluation": "evidence.edit_evaluation",
    "evaluate": "evidence.evaluate",
    "repeated_tokens": "head_scores.repeated",
    "top_heads": "head_scores.top_heads",
    "redistribute": "edits",
    "gate": "edits",
    "inject": "edits",
    "HeadSet": "sites",
    "Site": "sites",
    "heads": "sites",
    "site": "sites",
    "load": "sources",
    "Task": "tasks.task",
    "TokenScores": "decomposition.tokens",
    "token_scores": "decomposition.tokens",
    "Composition": "weights.composition",
    "composition": "weights.composition",
    "HeadWeights": "weights.head_weights",
    "Subspace": "weights.subspace",
    "HeadSVD": "weights.svd",
    "svd": "weights.svd",
    "HeadCard": "weights.head_card",
    "head_card": "weights.head_card",
    "CopySuppression": "weights.suppression",
    "copy_suppression": "weights.suppression",
    "TokenCircuits": "weights.token_circuits",
    "token_circuits": "weights.token_circuits",
    "ChannelEffects": "weights.channels",
    "channel_effects": "weights.channels",
    "WeightEdit": "weights.edit_weights",
    "edit_weights": "weights.edit_weights",
}
_MODULES = ("errors", "metrics", "planted", "remote", "sites", "tasks", "view")

__all__ = [
    "ChannelEffects",
    "Circuit",
    "CircuitDiff",
    "Composition",
    "CopySuppression",
    "Curve",
    "Edge",
    "EdgeScores",
    "EditEvaluation",
    "Evaluation",
    "Fit",
    "Graph",
    "GroupComparison",
    "HeadCard",
    "HeadSVD",
    "HeadSet",
    "HeadWeights",
    "MechkitError",
    "MechkitWarning",
    "Model",
    "Overlap",
    "Scores",
    "Selection",
    "Site",
    "Subspace",
    "Task",
    "TokenCircuits",
    "TokenScores",
    "WeightEdit",
    "__version__",
    "ablate",
    "attend",
    "channel_effects",
    "compare_groups",
    "completeness",
    "composition",
    "copy_suppression",
    "curve",
    "decompose",
    "discover",
    "edge",
    "edges",
    "edit_weights",
    "evaluate",
    "explore",
    "fit",
    "gate",
    "head_card",
    "heads",
    "inject",
    "load",
    "metrics",
    "minimality",
    "needles",
    "patch",
    "patch_in",
    "path_patch",
    "planted",
    "redistribute",
    "remote",
    "repeated_tokens",
    "scale",
    "score",
    "select",
    "site",
    "steer",
    "steering_vectors",
    "svd",
    "task_vectors",
    "tasks",
    "token_circuits",
    "token_scores",
    "top_heads",
    "transform",
    "view",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'mechkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
