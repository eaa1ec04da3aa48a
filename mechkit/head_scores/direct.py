"""What each head and MLP adds to the answer's logit by itself: direct logit attribution.

1. The stream that leaves the last block is the sum of what was written to it: by the embedding, by every head and MLP,
   and by the biases of attention.
2. The final norm, its scale taken from the run and kept, is linear: the mean off where it takes it off, times scale and
   gain. With the unembedding's columns it makes one direction of each prompt; a part's score is its product with that.
3. What a head writes is z W_O, times Granite's multiplier; W_O goes to the direction first, so that nothing is as wide
   as the stream for each head. With a norm behind attention (Gemma 2, Gemma 3, OLMo 2) its scale is kept as well, and
   heads are parts of what it lets through.
4. What the final norm and the unembedding add themselves is a bias. All of it makes up the model's own logit
   difference; where it does not, the family is refused. A cap on the logits comes after: what is made up is the
   difference before it.

Wang et al. 2022 (arXiv 2211.00593), section 3; Yu, Merullo and Pavlick 2023 (arXiv 2310.15910), section 4, for heads
that are scored by it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from torch import Tensor

from ..backends.elsewhere import where_the_model_is
from ..backends.hooks import TOLERANCE, Function
from ..backends.lens import LensBackend, local_backend
from ..backends.norms import Norm, default_epsilon
from ..backends.window import Key
from ..errors import OptionError, TaskError, UnsupportedError
from ..progress import bar as progress_bar
from ..prompts import check_task
from ..results import Scores
from ..tasks.task import Task
from .ablation_runs import alike
from .tables import head_scores

if TYPE_CHECKING:
    from ..model import Model

WHAT = ("heads", "mlps", "all")


def direct(
    model: Model,
    data: Task,
    *,
    what: Literal["heads", "mlps", "all"] = "heads",
    scale: Literal["frozen"] = "frozen",
    progress: bool = True,
) -> Scores:
    """What each head, and MLP, adds to the logit of the correct answer less that of the wrong one.

    Args:
        model: local or remote.
        data: a task; its clean prompts run, and the answer position is read. Its metric is not used.
        what: which rows: heads, MLPs, or all that writes to the stream, the embedding included.
        scale: of the final norm; the run's own, kept, so far the only one.
        progress: show a bar.

    Returns:
        A row a head (``"9.9"``), MLP (``"m9"``) and ``"embed"`` (all that enters the first block); ``score`` is in
        logits, mean over prompts. ``meta["total"]`` is the model's own logit difference, and ``meta["rest"]`` what of
        it is in no row: ``biases``, and the ``heads``, ``mlps`` and ``embed`` that were not asked for. Rows and rest
        make up the total. Where a family caps its logits, all of it is before the cap, and ``meta["capped"]`` is true.

    Raises:
        TaskError: no task.
        OptionError: another ``what`` or ``scale``.
        PromptError: prompts that the model cannot run.
        UnsupportedError: what is written does not make up the model's own logits.
    """
    started = time.perf_counter()
    if not isinstance(data, Task):
        raise TaskError(
            f"{type(data).__name__}: direct logit attribution needs two answers to tell apart",
            expected="a task",
            fix="Make one with mk.Task.from_frame(frame, model)",
        )
    for name, value, known in (("what", what, WHAT), ("scale", scale, ("frozen",))):
        if value not in known:
            raise OptionError(f"{name} = {value!r}", expected="one of " + ", ".join(known))
    check_task(model, data)
    heads, others, capped = _written(model, data, progress)
    layers = model.n_layers
    parts = {"heads": heads.sum((0, 1)), "mlps": others[:layers].sum(0), "embed": others[layers]}
    parts["biases"] = others[layers + 1]
    scores = head_scores(model, heads, "logits", "direct", started, data, what=what, scale=scale)
    shown = {"heads": ["heads"], "mlps": ["mlps"], "all": ["heads", "mlps", "embed"]}[what]
    rows = {"heads": scores.frame, "mlps": _rows([f"m{i}" for i in range(layers)], "mlp", others[:layers])}
    rows["embed"] = _rows(["embed"], "embed", others[layers : layers + 1])
    rest = {name: float(values.mean()) for name, values in parts.items() if name not in shown}
    total = float(torch.stack(list(parts.values())).sum(0).mean())
    meta = {**scores.meta, "total": total, "rest": rest, "capped": capped}
    frame = pd.concat([rows[name] for name in shown], ignore_index=True)
    return Scores(frame.astype({"head": "Int64"}), scores.unit, meta)


def _rows(sites: list[str], kind: str, values: Tensor) -> pd.DataFrame:
    """Rows as of ``head_scores``, of values ``[sites, n]``."""
    by_prompt = pd.DataFrame(values.double().numpy())
    return pd.DataFrame(
        {
            "site": sites,
            "layer": range(len(sites)) if kind == "mlp" else -1,
            "head": pd.array([None] * len(sites), dtype="Int64"),
            "kind": kind,
            "score": by_prompt.mean(axis=1),
            "se": by_prompt.sem(axis=1),
            "n": values.shape[1],
        }
    )


@where_the_model_is
@torch.no_grad()
def _written(model: Model, task: Task, progress: bool = True) -> tuple[Tensor, Tensor, bool]:
    """Logits of each prompt by heads ``[layers, heads, n]``, and by MLPs, embedding and biases ``[layers + 2, n]``.

    And whether the model caps them afterwards.
    """
    backend = local_backend(model, "Scores of")
    backend.check_readout()
    _ = backend.branches  # refuses families whose parts are not found
    layers = model.n_layers
    heads, others = torch.zeros(layers, model.n_heads, len(task)), torch.zeros(layers + 2, len(task))
    with progress_bar(len(task), "direct", "prompt", show=progress) as bar:
        for prompts in alike(task.lengths, backend.base_tokens()):
            run = _Run(backend, task[prompts])
            for layer in range(layers):
                heads[layer][:, prompts], bias = (part.cpu() for part in run.heads(layer))
                others[layers + 1, prompts] += bias
                others[layer, prompts] = run.along(run.seen["mlp", layer]).cpu()
            others[layers, prompts] = run.along(run.seen["resid", 0]).cpu()
            others[layers + 1, prompts] += run.bias.cpu()
            run.check((heads[:, :, prompts].sum((0, 1)) + others[:, prompts].sum(0)).to(run.own))
            bar.update(len(prompts))
    return heads, others, bool(getattr(backend.hf.config, "final_logit_softcapping", None))


class _Run:
    """A run of some prompts, at their answer positions.

    Attributes:
        seen: what was written there, by (kind, layer): z ``[n, heads, d_head]``, the rest ``[n, d_model]``.
        direction: of the logit difference in the stream, given the run's own scale ``[n, d_model]``.
        bias: what the final norm and the unembedding add to the difference ``[n]``.
        own: the model's own difference before any cap ``[n]``.
    """

    def __init__(self, backend: LensBackend, task: Task):
        self._backend, self.seen = backend, {}
        layers, device = backend.info.n_layers, torch.device(backend.info.device)
        self._at = task.answer_positions.to(device)
        keys: list[Key] = [("resid", 0), ("resid", layers)]
        keys += [(kind, layer) for layer in range(layers) for kind in ("z", "mlp")]
        with backend.hooks({key: self._keep(key) for key in keys}):
            backend.body(task.clean.to(device), use_cache=False)
        last = self.seen["resid", layers]
        out = backend.placed.normalised(last[:, None])[:, 0]
        norm = self._norm(backend.bridge.ln_final)
        _, scaled = norm.parts(last, out)
        unembed, answers = backend.hf.get_output_embeddings(), task.answers.to(device)
        columns = unembed.weight[answers.to(unembed.weight.device)].to(device, torch.float32)  # [n, 2, d_model]
        times = _times(backend.hf.config)
        difference = (columns[:, 0] - columns[:, 1]) * times
        self.direction = norm.centred(scaled.to(device) * difference)  # taking the mean off is its own transpose
        self.bias = torch.zeros(len(task), device=device)
        if norm.bias is not None:
            self.bias += difference @ norm.bias.to(device, torch.float32)
        self.own = (out.float() * difference).sum(-1)
        if (bias := getattr(unembed, "bias", None)) is not None:
            pair = bias.to(device, torch.float32)[answers]
            added = (pair[:, 0] - pair[:, 1]) * times
            self.bias, self.own = self.bias + added, self.own + added

    def along(self, written: Tensor) -> Tensor:
        """What is written ``[n, d_model]``, along the direction ``[n]``."""
        return (written.float() * self.direction).sum(-1)

    def heads(self, layer: int) -> tuple[Tensor, Tensor]:
        """What the heads of a layer add ``[heads, n]``, and what the bias of their attention does ``[n]``."""
        branches, z = self._backend.branches, self.seen["z", layer]
        bias = branches.bias("o", layer)
        if branches.norm_after:
            out = branches.attention_out(layer, z)
            norm = self._norm(self._backend.bridge.blocks[layer].ln1_post)
            _, scaled = norm.parts(out, branches.written(layer, out))
            if norm.bias is not None:
                raise self._odd("a norm with a bias behind its attention")
            direction = norm.centred(scaled * self.direction)
        else:
            direction = branches.written(layer, self.direction)  # times a number, on either side of a product
        weight = branches.weight("o", layer).float()
        found = torch.einsum("nhe,hed,nd->hn", z.float(), weight, direction)
        return found, torch.zeros_like(self.own) if bias is None else direction @ bias.float()

    def check(self, total: Tensor) -> None:
        """Whether the parts make up the model's own difference.

        Raises:
            UnsupportedError: they do not.
        """
        dtype = next(self._backend.hf.parameters()).dtype
        off = float((total - self.own).abs().max()) / max(1.0, float(self.own.abs().max()))
        if not off <= 10 * TOLERANCE.get(dtype, 1e-4):
            raise self._odd(f"parts that do not make up its logits (off by {off:.2g})")

    def _norm(self, module: object) -> Norm:
        return Norm(module, default_epsilon(self._backend.hf.config), self._odd)

    def _odd(self, what: str) -> UnsupportedError:
        info = self._backend.info
        return UnsupportedError(
            f"{info.name} ({info.family}) has {what}", fix="Path patching to the logits makes no such assumption"
        )

    def _keep(self, key: Key) -> Function:
        def function(tensor: Tensor) -> None:
            # OPT's MLPs have all prompts' positions on one axis.
            by_prompt = tensor.view(len(self._at), -1, *tensor.shape[-2:] if key[0] == "z" else tensor.shape[-1:])
            self.seen[key] = by_prompt[torch.arange(len(self._at), device=self._at.device), self._at]

        return function


def _times(config: object) -> float:
    """What a family multiplies its logits by, caps apart; as ``backends.readout.finished``."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
