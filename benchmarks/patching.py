"""Activation patching beside TransformerLens and beside the literal code: ``python -m benchmarks.patching``.

The literal code is ``tests/reference``: plain PyTorch hooks on the Hub's own model, one forward pass a cell.
Prompts are those of the IOI task; all of one benchmark have one length, which TransformerLens needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial
from io import StringIO

import torch

import mechkit as mk
from tests.reference import patching as literal

from . import measure


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = measure.parser("patching", __doc__)
    parser.add_argument("--rounds-many", type=int, default=2, help="the work on 16 pairs (default: %(default)s)")
    options = parser.parse_args()
    model = mk.load(options.model, device=options.device)
    hub = _hub_model(options.model).to(options.device)
    pairs = _of_one_length(mk.tasks.ioi(model, n=64, seed=0))
    print(f"{model}\n{measure.machine()}\n", flush=True)
    print(measure.table([]), flush=True)
    rows: list[measure.Row] = []
    compare = partial(measure.compare, device=options.device, done=rows)
    heads = [(layer, head, slice(None)) for layer in range(model.n_layers) for head in range(model.n_heads)]
    for n, rounds in ((1, options.rounds), (16, options.rounds_many)):
        task = pairs[list(range(n))]
        compare(
            f"{model.n_layers * model.n_heads} heads, {n} IOI pair{'s' * (n > 1)}",
            rounds,
            partial(_ours, model, task, "heads"),
            {"TransformerLens": partial(_lens_heads, model, task), "literal": partial(_literal, hub, task, "z", heads)},
        )
    pair = pairs[[0]]
    places = [(layer, None, where) for layer in range(model.n_layers) for where in range(pair.clean.shape[1])]
    compare(
        f"residual, {model.n_layers} layers × {pair.clean.shape[1]} positions, 1 IOI pair",
        options.rounds,
        partial(_ours, model, pair, [f"resid.{layer}" for layer in range(model.n_layers)], positions="each"),
        {
            "TransformerLens": partial(_lens_resid, model, pair),
            "literal": partial(_literal, hub, pair, "resid", places),
        },
    )
    if options.out:
        measure.save(rows, options.out, model=options.model, device=options.device)


def _of_one_length(task: mk.Task) -> mk.Task:
    length = int(task.lengths.mode().values)
    return task[(task.lengths == length).nonzero()[:, 0]]


def _hub_model(name: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    from mechkit.packaged import PACKAGED, local_folder

    folder = local_folder(PACKAGED[name]) if name in PACKAGED else name
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def _metric(task: mk.Task, logits: torch.Tensor) -> torch.Tensor:
    return mk.metrics.logit_diff(logits, task).mean()


def _ours(model: mk.Model, task: mk.Task, sites, **options) -> torch.Tensor:
    return torch.tensor(mk.patch(model, task, sites, progress=False, **options).frame["metric"].to_numpy())


def _lens_heads(model: mk.Model, task: mk.Task) -> torch.Tensor:
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

    return _lens(model, task, get_act_patch_attn_head_out_all_pos)


def _lens_resid(model: mk.Model, task: mk.Task) -> torch.Tensor:
    from transformer_lens.patching import get_act_patch_resid_pre

    return _lens(model, task, get_act_patch_resid_pre)


def _lens(model: mk.Model, task: mk.Task, get_act_patch: Callable) -> torch.Tensor:
    clean, corrupt = task.clean.to(model.info.device), task.corrupt.to(model.info.device)
    with torch.inference_mode(), redirect_stderr(StringIO()):  # it has a progress bar that cannot be turned off
        _, cache = model.bridge.run_with_cache(clean)
        return get_act_patch(model.bridge, corrupt, cache, partial(_metric, task)).flatten()


@torch.inference_mode()
def _literal(hub: torch.nn.Module, task: mk.Task, kind: str, cells: Sequence[tuple]) -> torch.Tensor:
    """One forward pass a cell ``(layer, head, where)``; the clean run's values are taken once a layer."""
    device = next(hub.parameters()).device
    clean, corrupt = task.clean.to(device), task.corrupt.to(device)
    layers = {layer: literal.value_of(hub, clean, kind, layer) for layer in dict.fromkeys(cell[0] for cell in cells)}
    runs = (literal.patch_cell(hub, corrupt, clean, kind, *cell, given=layers[cell[0]]) for cell in cells)
    return torch.stack([_metric(task, logits) for logits in runs])


if __name__ == "__main__":
    main()
