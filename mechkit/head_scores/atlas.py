"""An atlas of attention patterns: every head of a model as a point, heads with patterns of one shape close together.

1. Each head's pattern on each prompt is brought to ``size`` by ``size``, whatever the prompt's length, what lies above
   the diagonal is cut off, and rows are made to sum to one; then the mean over prompts.
2. These pictures, their mean taken off, on their first ``components`` principal components.
3. k-means into ``clusters``, the best of several beginnings. The first two components are where a head is drawn, and
   its score is its distance to the centre of its cluster: the head with the least of a cluster represents it.

Patterns pass by layer after layer and are never all in memory; only the small pictures are.

Li et al. 2023 (arXiv 2303.13731), for vision transformers, with an autoencoder in place of the components.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.hooks import Function
from ..backends.lens import local_backend
from ..backends.window import Key
from ..errors import OptionError
from ..prompts import as_batch
from ..results import Table
from .passes import pattern_numbers, run_past
from .tables import about

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..model import Model
    from ..prompts import Prompts

_BEGINNINGS = 10  # of k-means, which ends where it began


@dataclass(frozen=True, eq=False, repr=False)
class PatternAtlas(Table):
    """Heads as points, by the shape of their attention patterns.

    Attributes:
        frame: a row a head: ``site``, ``layer``, ``head``, ``cluster`` (from 0, the largest first), ``x``, ``y``,
            ``score`` (distance to the cluster's centre).
        unit: of ``score``.
        meta: of every result; ``patterns``: of each cluster the head nearest to its centre, ``site``, and its
            ``pattern`` ``[size, size]``; ``explained``: the share of the variance that each component has.
    """

    _things: ClassVar[str] = "heads"

    def cluster(self, number: int) -> list[str]:
        """The heads of a cluster, the nearest to its centre first.

        Raises:
            OptionError: there is no such cluster.
        """
        rows: Any = self.frame[self.frame["cluster"] == number]
        if not len(rows):
            raise OptionError(f"Cluster {number!r}", expected=f"0 to {int(self.frame['cluster'].max())}")
        return [str(site) for site in rows.sort_values(by="score")["site"]]

    def plot(self) -> Figure:
        """One representative pattern a cluster, and the map of all heads, as a matplotlib figure."""
        from ..view.figures import ATTENTION, Picture

        shown = self.meta["patterns"]
        figure = Picture(figsize=(2.1 * len(shown) + 3.4, 3.0), layout="constrained")
        *small, space = figure.subplots(1, len(shown) + 1, width_ratios=[1.0] * len(shown) + [1.6])
        for number, (axes, one) in enumerate(zip(small, shown, strict=True)):
            axes.imshow(np.sqrt(one["pattern"]), cmap=ATTENTION, vmin=0, vmax=1)
            axes.set_title(f"cluster {number}: {one['site']}\nof {len(self.cluster(number))}", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        for number in range(len(shown)):
            rows = self.frame[self.frame["cluster"] == number]
            space.scatter(rows["x"], rows["y"], s=14, marker=f"${number}$", color="black")
        space.set_xlabel("first component", fontsize=8)
        space.set_ylabel("second component", fontsize=8)
        space.tick_params(labelsize=7)
        return figure


def atlas(
    model: Model,
    data: Prompts,
    *,
    size: int = 32,
    components: int = 16,
    clusters: int = 8,
    seed: int = 0,
) -> PatternAtlas:
    """Group the heads of a model by the shape of their attention patterns.

    Args:
        model: any whose attention patterns can be seen.
        data: text, texts, ids ``[batch, pos]``, or a task (its clean prompts).
        size: of the pictures that patterns are brought to.
        components: principal components that are kept; of fewer heads, as many as there are.
        clusters: how many groups; where fewer are found, there are fewer.
        seed: of the clusters.

    Raises:
        OptionError: a number outside its range.
        UnsupportedError: patterns that cannot be seen.
    """
    started = time.perf_counter()
    heads = list(model.heads())
    for name, value, least, most in (
        ("size", size, 2, 256),
        ("components", components, 2, size * size),
        ("clusters", clusters, 1, len(heads)),
    ):
        if not isinstance(value, int) or not least <= value <= most:
            raise OptionError(f"{name} = {value!r}", expected=f"a whole number from {least} to {most}")
    tokens, lengths = as_batch(model, data)
    pictures = _pictures(model, tokens, lengths, size).flatten(0, 1)
    placed = grouped(pictures, components, clusters, seed)
    frame = pd.DataFrame(
        {
            "site": [str(one) for one in heads],
            "layer": [one.layer for one in heads],
            "head": pd.array([one.head for one in heads], dtype="Int64"),
            "cluster": placed["cluster"],
            "x": placed["points"][:, 0],
            "y": placed["points"][:, 1],
            "score": placed["distance"],
        }
    )
    nearest = frame.loc[frame.groupby("cluster")["score"].idxmin()]
    shown = [
        {"site": site, "pattern": pictures[index].double().numpy().round(5).tolist()}
        for index, site in nearest["site"].items()
    ]
    meta = about(model, data, "atlas", started, size=size, components=components, clusters=clusters, seed=seed)
    return PatternAtlas(
        frame, "distance to the centre", {**meta, "patterns": shown, "explained": placed["explained"].tolist()}
    )


def grouped(pictures: Tensor, components: int, clusters: int, seed: int) -> dict[str, np.ndarray]:
    """Points 2 and 3 of the module.

    Args:
        pictures: ``[heads, size, size]``.
        components, clusters, seed: see ``atlas``.

    Returns:
        ``points`` ``[heads, components]``, ``cluster`` and ``distance`` to its centre ``[heads]``, ``explained``.
    """
    from scipy.cluster.vq import kmeans2

    flat = pictures.double().flatten(1)
    u, s, vt = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    # The sign of a component is nobody's choice; this one is the same on every machine.
    sign = vt.gather(1, vt.abs().argmax(1, keepdim=True))[:, 0].sign()
    points = (u * s * sign)[:, :components].numpy()
    points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))
    explained = (s.square() / s.square().sum().clamp_min(1e-30))[:components].numpy()
    draw, best, least = np.random.default_rng(seed), np.zeros(len(points), int), np.inf
    for _ in range(_BEGINNINGS):
        begun = _begun(points, clusters, draw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a cluster that is left with no head
            centres, labels = kmeans2(points, begun, minit="matrix")
        spread = float(np.square(points - centres[labels]).sum())
        if spread < least:
            best, least = labels, spread
    order = np.argsort(-np.bincount(best), kind="stable")
    order = order[np.bincount(best)[order] > 0]
    cluster = np.argsort(order)[np.searchsorted(np.sort(order), best)]
    centres = np.stack([points[cluster == number].mean(0) for number in range(len(order))])
    distance = np.linalg.norm(points - centres[cluster], axis=1)
    return {"points": points, "cluster": cluster, "distance": distance, "explained": explained}


def _begun(points: np.ndarray, clusters: int, draw: np.random.Generator) -> np.ndarray:
    """Points to begin k-means at, far ones the likelier (k-means++); fewer where fewer differ."""
    chosen = [points[draw.integers(len(points))]]
    while len(chosen) < clusters:
        far = np.square(points[:, None] - np.stack(chosen)).sum(-1).min(1)
        if not far.sum() > 0:
            break
        chosen.append(points[draw.choice(len(points), p=far / far.sum())])
    return np.stack(chosen)


@where_the_model_is
def _pictures(model: Model, tokens: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Mean picture of every head ``[layers, heads, size, size]``."""
    backend = local_backend(model, "Patterns of")
    info = backend.info
    out = torch.zeros(info.n_layers, info.n_heads, size, size)

    def listen(rows: Tensor) -> dict[Key, Function]:
        def pattern(layer: int) -> Callable[[Tensor], None]:
            def function(weights: Tensor) -> None:
                for slot, length in enumerate(lengths[rows].tolist()):
                    out[layer] += picture(weights[slot, :, :length, :length].float(), size).cpu() / len(tokens)

            return function

        return {("pattern", layer): pattern(layer) for layer in range(info.n_layers)}

    run_past(backend, tokens, lengths, pattern_numbers(info, lengths), listen)
    return out


def picture(pattern: Tensor, size: int) -> Tensor:
    """Patterns ``[heads, query, key]`` brought to ``[heads, size, size]``; point 1 of the module."""
    whole: Any = torch.nn.functional.interpolate(
        pattern[None], (size, size), mode="bilinear", antialias=True, align_corners=False
    )[0]
    lower = whole.clamp_min(0).tril()
    return lower / lower.sum(-1, keepdim=True).clamp_min(1e-12)
