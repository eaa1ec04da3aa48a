"""Redundant heads: which heads of a layer do the same, and what is lost when one does the work of several?

1. Clusters: average linkage on ``1 - similarity`` (see ``similarity``), layer by layer. A head's redundancy is its mean
   similarity to the other heads of its cluster; 0 where it is alone.
2. Merging: every head of a cluster gets the mean z of the cluster, while the model runs. Heads that put out the same
   can be merged at no loss, whatever each makes of it. The score is the rise of the mean next-token loss.

Chen et al. 2024 (arXiv 2406.06567), who merge keys and values.
"""

from __future__ import annotations

import time
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
from ..errors import OptionError, PromptError
from ..prompts import as_batch
from ..results import Scores, Table
from .passes import batches
from .similarity import Measure, Of, similarity
from .tables import about, head_scores

if TYPE_CHECKING:
    from ..model import Model
    from ..prompts import Prompts


@dataclass(frozen=True, eq=False, repr=False)
class MergedHeads(Table):
    """What merging the clusters of heads costs.

    Attributes:
        frame: a row a layer in which heads are merged, and one in which all of them are at once: ``layer`` (missing:
            all), ``heads`` (how many there are less), ``score`` (rise of the mean next-token loss), ``se``, ``n``
            (prompts).
        unit: of ``score``.
        meta: of every result; ``loss``: without merging.
    """

    _things: ClassVar[str] = "merges"


def redundancy(
    model: Model,
    data: Prompts | None = None,
    *,
    of: Of = "output",
    measure: Measure | None = None,
    clusters: int | None = None,
    threshold: float = 0.8,
    tokens: int = 256,
    seed: int = 0,
) -> Scores:
    """How much each head is like the other heads of its cluster.

    Args:
        model, data, of, measure, tokens, seed: as of ``similarity``.
        clusters: how many in each layer; left out: by ``threshold``.
        threshold: clusters are joined as long as the mean similarity between them is at least that.

    Returns:
        A row a head; column ``cluster`` numbers the clusters of a layer from 0, by their first head.

    Raises:
        OptionError, PromptError, UnsupportedError: as of ``similarity``; clusters outside 1 to the number of heads; a
            threshold outside 0 to 1.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    started = time.perf_counter()
    if clusters is not None and (not isinstance(clusters, int) or not 1 <= clusters <= model.n_heads):
        raise OptionError(f"clusters = {clusters!r}", expected=f"a whole number from 1 to {model.n_heads}")
    if not 0 <= threshold <= 1:
        raise OptionError(f"threshold = {threshold!r}", expected="a number from 0 to 1")
    pairs = similarity(model, data, of=of, measure=measure, tokens=tokens, seed=seed)
    scores, labels = torch.zeros(model.n_layers, model.n_heads), np.zeros((model.n_layers, model.n_heads), int)
    for layer in range(model.n_layers if model.n_heads > 1 else 0):
        alike = np.eye(model.n_heads)
        alike[np.triu_indices(model.n_heads, 1)] = pairs.frame["score"][pairs.frame["layer"] == layer]
        alike = np.maximum(alike, alike.T)
        tree = linkage(squareform(np.clip(1 - alike, 0, None), checks=False), "average")
        stop = (1 - threshold, "distance") if clusters is None else (clusters, "maxclust")
        labels[layer] = pd.factorize(fcluster(tree, stop[0], criterion=stop[1]))[0]
        for head in range(model.n_heads):
            others = (labels[layer] == labels[layer, head]) & (np.arange(model.n_heads) != head)
            scores[layer, head] = float(alike[head, others].mean()) if others.any() else 0.0
    how = {"of": of, "measure": pairs.meta["options"]["measure"], "clusters": clusters, "threshold": threshold}
    table = head_scores(model, scores, "mean similarity in its cluster", "redundancy", started, data, **how)
    at = table.frame["layer"].to_numpy(int), table.frame["head"].to_numpy(int)
    return Scores(table.frame.assign(cluster=labels[at]), table.unit, table.meta)


def merged(model: Model, data: Prompts, *, clusters: Scores) -> MergedHeads:
    """What it costs that heads of a cluster put out the same, the mean of all.

    Args:
        model: a model whose heads have been clustered.
        data: text, texts, ids ``[batch, pos]``, or a task (its clean prompts), whose next-token loss is measured.
        clusters: of ``redundancy``; or scores of heads with a column ``cluster``, heads of a layer with the same value
            being one cluster. Heads that are not in it stay as they are.

    Raises:
        OptionError: scores without clusters, or without any cluster of several heads.
        PromptError: prompts of one token.
    """
    started = time.perf_counter()
    if "cluster" not in clusters.frame:
        raise OptionError(f"Scores with columns {list(clusters.frame)}", expected="a column cluster", fix="redundancy")
    maps = torch.eye(model.n_heads).repeat(model.n_layers, 1, 1)
    fewer = [0] * model.n_layers
    for _, some in clusters.frame.groupby(["layer", "cluster"]):
        heads, layer = some["head"].to_numpy(int), int(some["layer"].iloc[0])
        maps[layer][np.ix_(heads, heads)] = 1 / len(heads)
        fewer[layer] += len(heads) - 1
    layers = [layer for layer in range(model.n_layers) if fewer[layer]]
    if not layers:
        raise OptionError("Clusters of one head each", expected="at least one of several", fix="Lower the threshold")
    tokens, lengths = as_batch(model, data)
    if int(lengths.min()) < 2:
        raise PromptError("A prompt of one token", expected="at least two, for a next-token loss")
    several = [[layer] for layer in layers] + ([layers] if len(layers) > 1 else [])
    losses = _losses(model, tokens, lengths, maps, [[], *several])  # [1 + merges, n]
    rises = (losses[1:] - losses[0]).double().numpy()
    n = len(tokens)
    frame = pd.DataFrame(
        {
            "layer": pd.array([one[0] if len(one) == 1 else None for one in several], dtype="Int64"),
            "heads": [sum(fewer[layer] for layer in one) for one in several],
            "score": rises.mean(1),
            "se": rises.std(1, ddof=1) / np.sqrt(n) if n > 1 else np.nan,
            "n": n,
        }
    )
    meta: dict[str, Any] = about(model, data, "merged", started)
    return MergedHeads(frame, "nats a token", {**meta, "loss": float(losses[0].mean())})


@where_the_model_is
def _losses(model: Model, tokens: Tensor, lengths: Tensor, maps: Tensor, merges: list[list[int]]) -> Tensor:
    """Mean next-token loss of each prompt, heads of some layers mixed ``[merges, n]``.

    Args:
        model: any.
        tokens, lengths: ``[n, pos]`` padded at the right, and ``[n]``.
        maps: what each head gets of each ``[layers, heads, heads]``.
        merges: which layers, each time.
    """
    backend = local_backend(model, "Merged heads of")
    out = torch.zeros(len(merges), len(tokens))

    def mix(layer: int) -> Any:
        return lambda z: torch.einsum("gh,bphd->bpgd", maps[layer].to(z), z)

    for rows in batches(backend.info, lengths, 3 * backend.info.d_vocab * int(lengths.max())):
        some = tokens[rows, : int(lengths[rows].max())].to(backend.info.device)
        inside = torch.arange(1, some.shape[1])[None] < lengths[rows, None]
        for number, layers in enumerate(merges):
            functions: dict[Key, Function] = {("z", layer): mix(layer) for layer in layers}
            with torch.inference_mode(), backend.hooks(functions):
                logits = backend.hf(input_ids=some, use_cache=False).logits[:, :-1].float()
            each = torch.nn.functional.cross_entropy(logits.mT, some[:, 1:], reduction="none").cpu()
            out[number, rows] = (each * inside).sum(1) / inside.sum(1)
    return out
