"""The circuit view as a still picture: layers up, columns across; the curve of faithfulness beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from .figures import AGAINST, FOR, Picture, visible

_CUT = "#999999"


def circuit_figure(about: Mapping[str, Any], changes: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> Figure:
    """A graph of what is left in; what is cut is dotted.

    Args:
        about: the data of the view: nodes, edges, columns, curve, title, unit.
        changes: ``size`` and ``cuts``.
        groups: nodes that are one.
    """
    size, cuts = changes["size"], {*changes["cuts"]}
    inside = [one for one in about["nodes"] if one["order"] < size or one["kind"] in ("embed", "logits")]
    group_of = {name: group["name"] for group in groups for name in group["sites"]}
    places = _places(inside, len(about["columns"]))
    curve = about["curve"]
    rows = len({y for _, y in places.values()})
    width = max(5.0, min(9.0, 0.8 * len(about["columns"]) + 2))
    figure = Picture(figsize=(width + (3.4 if curve else 0), max(3.0, 0.42 * rows + 1.2)), layout="constrained")
    figure.suptitle(about["title"], fontsize=11, x=0.01, ha="left")
    if curve:
        graph, line = figure.subplots(1, 2, width_ratios=(width, 3.2))
        line.plot([one["size"] for one in curve], [one["faithfulness"] for one in curve], "-o", color=FOR, markersize=3)
        line.axhline(1, color=_CUT, linewidth=0.8, linestyle="--")
        line.axhline(0, color=_CUT, linewidth=0.8)
        line.set_xlabel("members left in", fontsize=8)
        line.set_ylabel("faithfulness", fontsize=8)
        line.tick_params(labelsize=7)
        line.spines[["top", "right"]].set_visible(False)
    else:
        graph = figure.subplots()
    _edges(graph, [one for one in about["edges"] if one["order"] < size], places, cuts)
    largest = max((abs(one["score"] or 0.0) for one in inside), default=0.0) or 1.0
    for node in inside:
        score = node["score"] or 0.0
        colour = AGAINST if score < 0 else FOR
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "#333333", "linewidth": 0.6}
        x, y = places[node["site"]]
        text = node["site"] + (f"\n{visible(group_of[node['site']])}" if node["site"] in group_of else "")
        mark = {"color": _CUT if node["site"] in cuts else "black", "fontsize": 7, "ha": "center", "va": "center"}
        graph.text(x, y, text, bbox=box, **mark, zorder=3)
        tint = {**box, "facecolor": colour, "alpha": 0.1 + 0.4 * abs(score) / largest}
        graph.text(x, y, text, bbox=tint, **mark, zorder=4)
    graph.set_xlim(-0.6, len(about["columns"]) - 0.4)
    graph.set_ylim(-0.7, rows - 0.3)
    graph.set_xticks(range(len(about["columns"])), [visible(one) for one in about["columns"]], fontsize=7)
    if len(about["columns"]) > 8:
        graph.tick_params(axis="x", rotation=90)
    levels = {y: _row_name(one) for one in inside for y in [places[one["site"]][1]]}
    graph.set_yticks(list(levels), list(levels.values()), fontsize=7)
    graph.tick_params(length=0)
    graph.spines[:].set_visible(False)
    return figure


def _places(nodes: Sequence[Mapping[str, Any]], columns: int) -> dict[str, tuple[float, float]]:
    """Where each node stands: rows that hold one, from the embedding up; those of one cell side by side."""
    rows = sorted({_row(one) for one in nodes})
    cells = defaultdict(list)
    for one in nodes:
        cells[rows.index(_row(one)), one["column"]].append(one["site"])
    places = {}
    for (row, column), names in cells.items():
        step = min(0.34, 0.9 / len(names)) if columns > 1 else 0.9 / len(names)
        for i, name in enumerate(names):
            places[name] = (column + step * (i - (len(names) - 1) / 2), float(row))
    return places


def _row(node: Mapping[str, Any]) -> float:
    if node["kind"] in ("embed", "logits"):
        return -1.0 if node["kind"] == "embed" else float("inf")
    return 2.0 * node["layer"] + (node["kind"] == "mlp")


def _row_name(node: Mapping[str, Any]) -> str:
    return node["kind"] if node["kind"] in ("embed", "logits") else f"layer {node['layer']}"


def _edges(axes: Any, edges: Sequence[Mapping[str, Any]], places: Mapping[str, Any], cuts: set[str]) -> None:
    largest = max((abs(one["score"]) for one in edges), default=0.0) or 1.0
    for one in edges:
        for reader in one["readers"]:
            if one["source"] not in places or reader not in places:
                continue
            gone = bool(cuts & {one["edge"], one["source"], reader})
            share = abs(one["score"]) / largest
            arrow = FancyArrowPatch(
                places[one["source"]],
                places[reader],
                arrowstyle="-",
                connectionstyle="arc3,rad=0.08",
                color=_CUT if gone else AGAINST if one["score"] < 0 else FOR,
                linestyle=":" if gone else "--" if one["score"] < 0 else "-",
                linewidth=0.5 + 2.5 * share,
                alpha=0.25 + 0.6 * share,
                zorder=1,
            )
            axes.add_patch(arrow)
