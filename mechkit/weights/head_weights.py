"""The matrices of every head, brought to one layout, whatever the family.

1. Read W_Q, W_K, W_V and W_O from a model (``HeadWeights.of``) or from a file that has the attention weights
   (``weights.files``). Keys and values stand by group where heads share them; ``expanded`` repeats them.
2. Fold what stands between the stream and the matrices into them, so that they act on the stream itself:
   the norm in front of attention (its gain; with LayerNorm its taking off of the mean, and its bias), the norm behind
   attention (its gain, in Gemma 2, Gemma 3, OLMo 2) and Granite's multiplier. The scale that a norm takes from each
   activation stays out: it is one positive number a position.
3. Centre what is written: where every norm takes the mean off, nobody sees the mean of a write, and taking it off
   changes nothing.

Row convention throughout: ``q = x W_Q + b_Q``, ``score = q k^T``, ``written = pattern (x W_V + b_V) W_O``; so
``W_OV = W_V W_O`` and ``W_QK = W_Q W_K^T``, both ``[d_model, d_model]`` and of rank ``d_head`` at most.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..backends.elsewhere import elsewhere
from ..backends.lens import local_backend
from ..errors import OptionError, SiteError
from ..results import model_provenance
from ..sites import HeadSet, Site, SitesLike, sites
from .folding import Affine, affine, made_how, made_of

if TYPE_CHECKING:
    from ..model import Model

Matrix = Literal["q", "k", "v", "o"]


@dataclass(frozen=True, eq=False, repr=False)
class HeadWeights:
    """W_Q, W_K, W_V and W_O of every head, in float32.

    Attributes:
        name: of the model.
        W_Q: ``[layers, heads, d_model, d_head]``.
        W_K, W_V: ``[layers, groups, d_model, d_head]``; as many groups as heads where heads do not share them.
        W_O: ``[layers, heads, d_head, d_model]``.
        biases: ``"q"``, ``"k"``, ``"v"``: ``[layers, heads or groups, d_head]``; those that are there.
        folded: norms are folded in.
        centred: what is written, and what is read, is without its mean.
        mean_unseen: every norm of the model takes the mean off.
        model: where they are from; None: a file.
        meta: for provenance.
        turns: rotations that were read off the model, by offsets; see ``weights.rotation``.
    """

    name: str
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    folded: bool = False
    centred: bool = False
    mean_unseen: bool = False
    model: Model | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    turns: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        source: Model | HeadWeights | str | Path,
        n_heads: int | None = None,
        *,
        fold_norm: bool = True,
        centre: bool | None = None,
    ) -> HeadWeights:
        """The weights of a model, or of a file that holds at least the attention weights.

        Args:
            source: a loaded model; a ``.safetensors`` file (or several as a folder) under the Hub's names; weights
                that are loaded already, given back as they are.
            n_heads: query heads a layer, of a file whose shapes do not tell.
            fold_norm: fold norms and multipliers in (2 above).
            centre: take the mean off what is written; left out: where it changes nothing (3 above).

        Raises:
            OptionError: ``n_heads`` missing, or one that does not fit.
            LoadError: no such file, or one in which no attention weights are found.
            UnsupportedError: a model with a norm that is neither LayerNorm nor RMSNorm.
            RemoteError: of a kind, of a model that runs elsewhere; its matrices are fetched when they are asked for.
        """
        from ..model import Model

        if isinstance(source, HeadWeights):
            return source
        if isinstance(source, Model):
            if elsewhere(source) is not None:
                from .far_weights import far_weights

                return far_weights(source, fold_norm, centre)
            return cls.of(source, fold_norm=fold_norm, centre=centre)
        if isinstance(source, str | Path):
            from .files import from_file

            return from_file(Path(source), n_heads, fold_norm, centre)
        raise OptionError(f"{type(source).__name__} as weights", expected="a model, or a .safetensors file")

    @classmethod
    def of(cls, model: Model, *, fold_norm: bool = True, centre: bool | None = None) -> HeadWeights:
        """The weights of a local model; see ``load``."""
        found = cls.of_layers(model, range(model.n_layers), fold_norm, centre)
        how = made_how({"folded": found.folded, "centred": found.centred})
        return replace(found, model=model, meta={**model_provenance(model), **how})

    @classmethod
    @torch.no_grad()
    def of_layers(cls, model: Model, layers: Sequence[int], fold_norm: bool, centre: bool | None) -> HeadWeights:
        """The weights of some layers of a local model, which then count from 0; see ``load``."""
        backend = local_backend(model, "Weights of")
        branches = backend.branches
        stacked = {kind: torch.stack([branches.weight(kind, layer) for layer in layers]).float() for kind in "qkvo"}
        biases = {}
        for kind in "qkv":
            found = [branches.bias(kind, layer) for layer in layers]
            if all(one is not None for one in found):
                biases[kind] = torch.stack([one for one in found if one is not None]).float()
        blocks: Any = backend.bridge.blocks
        reads = writes = [Affine(False)] * len(layers)
        unseen = False
        if fold_norm or centre is None:
            reads, writes, later = (
                [affine(getattr(block, name, None), model) for block in blocks] for name in ("ln1", "ln1_post", "ln2")
            )
            others = [one for one in (*writes, *later, affine(backend.bridge.ln_final, model)) if one.there]
            unseen = all(one.there for one in reads) and all(one.centres for one in (*reads, *others))
            reads, writes = ([some[layer] for layer in layers] for some in (reads, writes))
        times = float(getattr(backend.hf.config, "residual_multiplier", 1.0))
        return cls(**made_of(model.name, stacked, biases, reads, writes, times, unseen, fold_norm, centre))

    # -- dimensions -------------------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.W_Q.shape[0]

    @property
    def n_heads(self) -> int:
        """Query heads a layer."""
        return self.W_Q.shape[1]

    @property
    def n_groups(self) -> int:
        """Key and value heads a layer."""
        return self.W_K.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_Q.shape[2]

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.W_Q.shape[3]

    def heads(self, addresses: SitesLike | None = None) -> HeadSet:
        """Every head, or the named ones.

        Raises:
            SiteError: a head that is not there, an address that is no head, or none at all.
        """
        every = [Site(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]
        if addresses is None or addresses == "heads":
            return HeadSet(every, self.n_heads)
        chosen = sites(addresses)
        if not chosen:
            raise SiteError(f"No heads of {self.name}", expected='at least one, such as "0.0"')
        for one in chosen:
            if not one.is_head or one.layer >= self.n_layers or (one.head or 0) >= self.n_heads:
                raise SiteError(
                    f'"{one}" of {self.name}', expected=f'heads "0.0" to "{self.n_layers - 1}.{self.n_heads - 1}"'
                )
        return HeadSet(chosen, self.n_heads)

    def expanded(self, kind: Matrix) -> Tensor:
        """W_Q, W_K, W_V or W_O by query head ``[layers, heads, ...]``, keys and values repeated where shared."""
        matrix = getattr(self, f"W_{kind.upper()}")
        return (
            matrix if matrix.shape[1] == self.n_heads else matrix.repeat_interleave(self.n_heads // matrix.shape[1], 1)
        )

    def of_heads(self, kind: Matrix, heads: HeadSet) -> Tensor:
        """One of the matrices for some heads ``[heads, ...]``."""
        matrix = getattr(self, f"W_{kind.upper()}")
        share = self.n_heads // matrix.shape[1]
        layers = torch.tensor([one.layer for one in heads])
        return matrix[layers, torch.tensor([(one.head or 0) // share for one in heads])]

    def of_bias(self, kind: str, head: Site) -> Tensor | None:
        """A head's bias of q, k or v ``[d_head]``; None where there is none."""
        bias = self.biases.get(kind)
        return None if bias is None else bias[head.layer, (head.head or 0) * bias.shape[1] // self.n_heads]

    def __repr__(self) -> str:
        shared = f" ({self.n_groups} key/value groups)" if self.n_groups != self.n_heads else ""
        return (
            f'HeadWeights("{self.name}", {self.n_layers} layers of {self.n_heads} heads{shared}, '
            f"d_model {self.d_model}, d_head {self.d_head}, norms {'folded' if self.folded else 'left out'}"
            f"{', writes centred' if self.centred else ''})"
        )
