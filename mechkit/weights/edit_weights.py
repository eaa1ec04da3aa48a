"""Edits of heads made in the weights instead of while the model runs, and taken back.

1. ``z M + c`` is ``M W_O`` in place of W_O, and ``c W_O`` added to b_O. ``q M + c`` is ``W_Q M`` and ``b_Q M + c``;
   keys and values likewise.
2. What was there is kept, and put back to the last bit by ``undo``, or at the end of a ``with``.
3. What was written is read again: a family whose matrices are copies of what it runs is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from ..backends.lens import LensBackend, local_backend
from ..edits import Ablate, Edit, Scale, Transform, of_site
from ..errors import EditError, UnsupportedError
from ..sites import Site

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..model import Model

_KINDS = ("z", "q", "k", "v")


@dataclass(eq=False)
class WeightEdit:
    """Weights that were changed; ``with mk.edit_weights(...):`` changes them for its length.

    Attributes:
        model: whose.
        frame: a row a matrix: ``site``, ``matrix``, ``norm`` (Frobenius norm of the change), ``share`` (of the norm of
            what was there).
    """

    model: Model
    frame: pd.DataFrame
    _kept: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, repr=False)  # where, was, written

    @property
    def norm(self) -> float:
        """Frobenius norm of all changes together."""
        return float(self.frame["norm"].pow(2).sum() ** 0.5)

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what was there; a second time does nothing.

        Raises:
            EditError: the weights were changed again since. What changed them must be undone first.
        """
        for where, _, written in self._kept:
            if not torch.equal(where, written):
                raise EditError("undo of weights that were changed again since", fix="Undo the later edit first")
        self._put_back()

    @torch.no_grad()
    def _put_back(self) -> None:
        while self._kept:
            where, was, _ = self._kept.pop()
            where.copy_(was)
        _changed(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


@torch.no_grad()
def edit_weights(model: Model, edits: Edit | Sequence[Edit]) -> WeightEdit:
    """Change the weights of heads as edits would change their activations, until ``undo``.

    Args:
        model: a local model.
        edits: transforms, scalings and zero ablations of z, q, k and v of heads, at every position; in order. Keys and
            values that heads share are changed for all of them, so name the group (``"9.kv2.v"``).

    Returns:
        What was changed, by how much, and how to take it back.

    Raises:
        EditError: an edit that is not linear, is of some positions only, or adds something where the family has no
            bias.
        SiteError: a site that is not there.
        UnsupportedError: a model that runs elsewhere, or whose matrices cannot be written to.
    """
    backend = local_backend(model, "Weights of")
    several = [edits] if isinstance(edits, Edit) else list(edits)
    if not several:
        raise EditError("No edits of weights", expected="at least one")
    steps = _merged([step for edit in several for step in _steps(edit, backend)], backend)
    done = WeightEdit(model, pd.DataFrame())
    rows = []
    try:
        for site, matrix, shift in steps:
            for where, new, name in _written(backend, site, matrix, shift):
                was = where.clone()
                done._kept.append((where, was, new))
                where.copy_(new)
                change = (where - was).float()
                rows.append(
                    {
                        "site": str(site),
                        "matrix": name,
                        "norm": float(change.norm()),
                        "share": float(change.norm() / was.float().norm().clamp_min(1e-12)),
                    }
                )
            _check(backend, done)
    except BaseException:
        done._put_back()
        raise
    done.frame = pd.DataFrame(rows)
    _changed(model)
    return done


def _steps(edit: Edit, backend: LensBackend) -> Iterator[tuple[Site, Tensor, Tensor | None]]:
    """What each site of an edit is multiplied by, and what is added."""
    if edit.positions is not None:
        raise EditError("An edit of some positions, of weights", expected="an edit of every position")
    d_head = backend.info.d_head
    for site in edit.sites:
        backend.info.check(site)
        if site.kind not in _KINDS:
            raise EditError(f'"{site}" in the weights', expected='z, q, k or v of heads, such as "9.9" or "9.9.q"')
        if site.kind in ("k", "v") and backend.info.grouped and not site.grouped:
            group = backend.info.shared(site)
            raise EditError(f'"{site}" in the weights, which other heads share', fix=f'Name the group: "{group}"')
        match edit:
            case Transform():
                matrix, shift = of_site(edit.matrix, site), of_site(edit.shift, site)
                if len(matrix) != d_head:
                    raise EditError(f'transform of "{site}" by width {len(matrix)}', expected=f"width {d_head}")
                yield site, matrix, shift
            case Scale() if not edit.missing:
                alpha = torch.as_tensor(of_site(edit.alpha, site)).detach()
                if list(alpha.shape) not in ([], [1], [d_head]):
                    raise EditError(
                        f'scale of "{site}" by shape {list(alpha.shape)}, in the weights',
                        expected=f"a number, or [{d_head}]",
                    )
                yield site, alpha * torch.eye(d_head), None
            case Ablate(mode="zero"):
                yield site, torch.zeros(d_head, d_head), None
            case _:
                raise EditError(f"{type(edit).__name__} in the weights", expected="transform, scale, or ablate to zero")


def _merged(
    steps: Sequence[tuple[Site, Tensor, Tensor | None]], backend: LensBackend
) -> list[tuple[Site, Tensor, Tensor | None]]:
    """The same with what is done to one site made one step: ``x M1 + c1``, then ``x M2 + c2``."""
    found: dict[tuple[str, int, int], tuple[Site, Tensor, Tensor | None]] = {}
    for site, matrix, shift in steps:
        matrix, added = matrix.cpu().double(), None if shift is None else shift.cpu().double()
        key = (site.kind, site.layer, backend.info.slot(site))
        if key in found:
            site, before, first = found[key]
            if first is not None:
                added = first @ matrix if added is None else first @ matrix + added
            matrix = before @ matrix
        found[key] = site, matrix, added
    return list(found.values())


def _written(
    backend: LensBackend, site: Site, matrix: Tensor, shift: Tensor | None
) -> list[tuple[Tensor, Tensor, str]]:
    """Where something is written, what, and its name."""
    kind = "o" if site.kind == "z" else site.kind
    slot = backend.info.slot(site)
    weight, bias = backend.branches.weight(kind, site.layer), backend.branches.bias(kind, site.layer)
    where = weight[slot]
    wide, by = where.float(), matrix.to(where.device).float()
    added = None if shift is None else shift.to(where.device).float()
    out = [(where, (by @ wide if kind == "o" else wide @ by).to(where), f"W_{kind.upper()}")]
    if bias is None and added is not None and bool(added.any()):
        raise EditError(f'Adding to "{site}" of {backend.info.name}, which has no b_{kind.upper()}')
    if bias is not None and kind == "o" and added is not None:
        out.append((bias, (bias.float() + added @ wide).to(bias), "b_O"))
    elif bias is not None and kind != "o":
        own = bias[slot].float() @ by
        out.append((bias[slot], (own if added is None else own + added).to(bias), f"b_{kind.upper()}"))
    return out


def _check(backend: LensBackend, done: WeightEdit) -> None:
    """Whether what was written is in the model's own parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in backend.hf.parameters()}
    if any(where.untyped_storage().data_ptr() not in own for where, *_ in done._kept):
        raise UnsupportedError(
            f"The matrices of {backend.info.name} ({backend.info.family}) cannot be written to",
            fix="Use the same edits while it runs: model.run(..., edits=[...])",
        )


def _changed(model: Any) -> None:
    """What was known of the weights is so no more."""
    vars(model).pop("weights_hash", None)
