"""The attention view as a still picture: every head small, one head large."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .figures import ATTENTION, SIGNED, Picture, visible


def attention_grid(
    values: np.ndarray, signed: bool, limit: float, title: str, tokens: Sequence[str], layer: int, head: int
) -> Figure:
    """A grid of maps ``[layers, heads, query, key]``, layers down and heads across, with one of them large.

    Args:
        values: the maps.
        signed: they can be negative.
        limit: what has the full colour.
        title: above the grid.
        tokens: on the axes of the large one.
        layer, head: which is large.
    """
    layers, heads, n, _ = values.shape
    low, colours = (-limit, SIGNED) if signed else (0.0, ATTENTION)
    tall = max(3.4, min(9.0, 0.3 * layers + 1.0))
    figure = Picture(figsize=(10.5, tall), layout="constrained")
    figure.suptitle(f"{title} · head {layer}.{head} at the right", fontsize=11, x=0.01, ha="left")
    small, large = figure.subplots(1, 2, width_ratios=(1.25, 1))
    step = n + max(1, n // 12)
    mosaic = np.full((layers * step, heads * step), np.nan)
    for i in range(layers):
        for j in range(heads):
            mosaic[i * step : i * step + n, j * step : j * step + n] = values[i, j]
    small.imshow(mosaic, cmap=colours, vmin=low, vmax=limit, aspect="auto", interpolation="nearest")
    middle = n / 2
    every = 1 if layers <= 16 else 2
    small.set_xticks([j * step + middle for j in range(heads)], range(heads), fontsize=7)
    small.set_yticks([i * step + middle for i in range(0, layers, every)], range(0, layers, every), fontsize=7)
    small.set_xlabel("head", fontsize=8)
    small.set_ylabel("layer", fontsize=8)
    from matplotlib.patches import Rectangle

    corner = (head * step - 1.5, layer * step - 1.5)
    small.add_patch(Rectangle(corner, n + 2, n + 2, fill=False, edgecolor="#E69F00", linewidth=1.8))
    large.imshow(values[layer, head], cmap=colours, vmin=low, vmax=limit, interpolation="nearest")
    shown = [visible(token) for token in tokens]
    size = 7 if n <= 32 else 5
    if n <= 64:
        large.set_xticks(range(n), shown, rotation=90, fontsize=size)
        large.set_yticks(range(n), shown, fontsize=size)
    large.set_xlabel("looks at", fontsize=8)
    for axes in (small, large):
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure
