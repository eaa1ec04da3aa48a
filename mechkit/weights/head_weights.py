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

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..backends.norms import Norm, default_epsilon
from ..errors import OptionError, SiteError, UnsupportedError
from ..sites import HeadSet, Site, SitesLike, sites

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
            UnsupportedError: a model that runs elsewhere, or with a norm that is neither LayerNorm nor RMSNorm.
        """
        from ..model import Model

        if isinstance(source, HeadWeights):
            return source
        if isinstance(source, Model):
            return cls.of(source, fold_norm=fold_norm, centre=centre)
        if isinstance(source, str | Path):
            from .files import from_file

            return from_file(Path(source), n_heads, fold_norm, centre)
        raise OptionError(f"{type(source).__name__} as weights", expected="a model, or a .safetensors file")

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, *, fold_norm: bool = True, centre: bool | None = None) -> HeadWeights:
        """The weights of a model; see ``load``."""
        from ..backends.lens import LensBackend

        backend = model.backend
        if not isinstance(backend, LensBackend):
            raise UnsupportedError(f"Weights of {model.name}, which runs elsewhere", expected="a local model")
        branches, info = backend.branches, backend.info
        layers = range(info.n_layers)
        stacked = {kind: torch.stack([branches.weight(kind, layer) for layer in layers]).float() for kind in "qkvo"}
        biases = {}
        for kind in "qkv":
            found = [branches.bias(kind, layer) for layer in layers]
            if all(one is not None for one in found):
                biases[kind] = torch.stack([one for one in found if one is not None]).float()
        blocks: Any = backend.bridge.blocks
        reads = writes = [Affine(False)] * info.n_layers
        unseen = False
        if fold_norm or centre is None:
            reads, writes, later = (
                [affine(getattr(block, name, None), model) for block in blocks] for name in ("ln1", "ln1_post", "ln2")
            )
            others = [one for one in (*writes, *later, affine(backend.bridge.ln_final, model)) if one.there]
            unseen = all(one.there for one in reads) and all(one.centres for one in (*reads, *others))
        times = float(getattr(backend.hf.config, "residual_multiplier", 1.0))
        made = made_of(model.name, stacked, biases, reads, writes, times, unseen, fold_norm, centre)
        meta = {"model": model.name, "weights": model.weights_hash}
        return cls(**made, model=model, meta={**meta, **made_how(made)})

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


@dataclass(frozen=True, eq=False)
class Affine:
    """What a norm does besides scaling: take the mean off, multiply, add.

    Attributes:
        there: there is a norm; without, the rest says nothing.
        centres: it takes the mean off.
        gain, bias: ``[d_model]``; None where it has none.
    """

    there: bool
    centres: bool = False
    gain: Tensor | None = None
    bias: Tensor | None = None

    def before(self, matrix: Tensor) -> Tensor:
        """A matrix that reads what the norm puts out, made to read what goes in: ``[..., d_model, d_head]``."""
        folded = matrix if self.gain is None else self.gain[:, None] * matrix
        return folded - folded.mean(-2, keepdim=True) if self.centres else folded

    def behind(self, matrix: Tensor) -> Tensor:
        """A matrix that writes what goes in, made to write what comes out: ``[..., d_head, d_model]``."""
        folded = matrix - matrix.mean(-1, keepdim=True) if self.centres else matrix
        return folded if self.gain is None else folded * self.gain


def made_of(
    name: str,
    matrices: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    reads: list[Affine],
    writes: list[Affine],
    times: float,
    mean_unseen: bool,
    fold_norm: bool,
    centre: bool | None,
) -> dict[str, Any]:
    """The fields of ``HeadWeights``, folded and centred as asked.

    Args:
        name: of the model.
        matrices: ``"q"``, ``"k"``, ``"v"``, ``"o"``, as they are in the model.
        biases: those of q, k and v that are there.
        reads, writes: the norms before and behind attention, by layer.
        times: what writes are multiplied by.
        mean_unseen: every norm takes the mean off.
        fold_norm, centre: see ``HeadWeights.load``.
    """
    of, biases = dict(matrices), dict(biases)
    if fold_norm:
        for kind in "qkv":
            added = [
                torch.zeros(*of[kind][layer].shape[::2]) if one.bias is None else one.bias.cpu() @ of[kind][layer].cpu()
                for layer, one in enumerate(reads)
            ]
            if any(one.bias is not None for one in reads):
                extra = torch.stack(added).to(of[kind])
                biases[kind] = biases[kind] + extra if kind in biases else extra
            of[kind] = torch.stack([one.before(of[kind][layer]) for layer, one in enumerate(reads)])
        of["o"] = torch.stack([one.behind(of["o"][layer]) for layer, one in enumerate(writes)]) * times
    centred = mean_unseen if centre is None else centre
    if centred:
        of["o"] = of["o"] - of["o"].mean(-1, keepdim=True)
    named = {f"W_{kind.upper()}": matrix for kind, matrix in of.items()}
    told = {"folded": fold_norm, "centred": centred, "mean_unseen": mean_unseen}
    return {"name": name, **named, "biases": biases, **told}


def made_how(made: Mapping[str, Any]) -> dict[str, Any]:
    """What was done to the weights, for provenance."""
    return {"fold_norm": made["folded"], "centre": made["centred"]}


def affine(module: Any, model: Model) -> Affine:
    """What a norm of a model does besides scaling, told from its values; None: there is no norm.

    Raises:
        UnsupportedError: it is neither LayerNorm nor RMSNorm.
    """
    if module is None:
        return Affine(False)
    device = next(model.hf.parameters()).device
    draw = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(8, model.d_model, generator=draw).to(device)  # a mean that is worth taking off
    x = x.to(next(model.hf.parameters()).dtype)
    out = module(x)
    norm = Norm(module, default_epsilon(model.hf.config), lambda what: _odd(model, what))
    norm.parts(x, out)
    return Affine(True, norm.centres, norm.gain, None if norm.bias is None else norm.bias.detach().float())


def _odd(model: Model, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model.name} has {what}", fix="Take the weights as they are: fold_norm=False, centre=False"
    )
