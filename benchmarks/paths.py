"""Path patching beside its literal definition and beside TransformerLens: ``python -m benchmarks.paths``.

The literal code is ``tests/reference/paths.py``: two whole forward passes a sender, every other head held by a hook.
TransformerLens patches direct paths between heads, one forward pass a pair, on multi-head models.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from functools import partial
from io import StringIO

import torch

import mechkit as mk
from tests.reference.patching import value_of
from tests.reference.paths import path_patch as literal_path

from . import measure
from .patching import _hub_model, _metric, _of_one_length

LATE = "20.0.q 21.1.q 22.5.q 23.3.q 24.4.q"
PAIRS = 8


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = measure.parser("paths", __doc__)
    parser.add_argument("--senders", type=int, default=0, help="literal code on so many senders only (default: all)")
    options = parser.parse_args()
    model = mk.load(options.model, device=options.device)
    hub = _hub_model(options.model).to(options.device)
    task = _of_one_length(mk.tasks.ioi(model, n=64, seed=0))[list(range(PAIRS))]
    print(f"{model}\n{measure.machine()}\n", flush=True)
    print(measure.table([]), flush=True)
    rows: list[measure.Row] = []
    compare = partial(measure.compare, device=options.device, done=rows)
    end, known = int(task.answer_positions[0]), _values(hub, model, task)
    works = (
        ("heads to logits, direct", "logits", False, "all", slice(None)),
        ("heads to logits, through MLPs", "logits", True, "all", slice(None)),
        ("heads to queries of five late heads, through MLPs", LATE, True, "all", slice(None)),
        ("the same, at END only", LATE, True, "END", end),
    )
    for what, receivers, through, positions, where in works:
        senders = [str(one) for one in model.heads() if receivers == "logits" or one.layer < 24]
        some = senders[:: max(1, len(senders) // options.senders)] if options.senders else senders
        part = len(some) / len(senders)
        note = f" (literal: {len(some)} of {len(senders)} senders, taken as the whole)" if part < 1 else ""
        compare(
            f"{what}, {PAIRS} IOI pairs{note}",
            options.rounds,
            partial(_ours, model, task, receivers, senders, some, through, positions),
            {"literal": partial(_literal, hub, model, task, receivers, some, through, where, known)},
            part=part,
        )
    small = _gpt2_size(options.device)
    pairs = _random_pairs(small, PAIRS)
    later = [f"{layer}.{head}.q" for layer in range(1, small.n_layers) for head in range(small.n_heads)]
    compare(
        f"GPT-2 size, random: 0.1 to the queries of {len(later)} heads, {PAIRS} pairs",
        options.rounds,
        partial(_ours_each, small, pairs, later),
        {"TransformerLens": partial(_lens_direct, small, pairs)},
    )
    if options.out:
        measure.save(rows, options.out, model=options.model, device=options.device)


def _ours(model, task, receivers, senders, shown, through, positions) -> torch.Tensor:
    options = {"through_mlps": through, "positions": positions, "progress": False}
    frame = mk.path_patch(model, task, receivers, senders, **options).frame.set_index("sender")
    return torch.tensor(frame.loc[shown, "metric"].to_numpy())


@torch.inference_mode()
def _values(hub, model, task) -> dict:
    """Both prompts' z and MLPs, taken before anything is timed: the literal code is its two passes a sender."""
    device, keys = next(hub.parameters()).device, [(kind, at) for kind in ("z", "mlp") for at in range(model.n_layers)]
    runs = {"base": task.clean.to(device), "source": task.corrupt.to(device)}
    return {(name, *key): value_of(hub, ids, *key) for name, ids in runs.items() for key in keys}


@torch.inference_mode()
def _literal(hub, model, task, receivers, senders, through, where, known) -> torch.Tensor:
    device = next(hub.parameters()).device
    clean, corrupt = task.clean.to(device), task.corrupt.to(device)
    sites = [model.info.shared(one) for one in mk.sites.sites(receivers)]
    last = ("resid", model.n_layers, None)
    to = [last if one.kind == "logits" else (one.kind, one.layer, one.head) for one in sites]
    values = []
    for sender in map(mk.site, senders):
        part = ("z", sender.layer, sender.head)
        values.append(_metric(task, literal_path(hub, clean, corrupt, part, to, through, where, known)))
    return torch.stack(values)


def _gpt2_size(device: str) -> mk.Model:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return mk.load((GPT2LMHeadModel(GPT2Config()), None), device=device)


def _random_pairs(model: mk.Model, n: int, length: int = 15, first: int = 9) -> mk.Task:
    """Prompts as long as those of the IOI task, with twins that differ where its twins do."""
    draw = torch.Generator().manual_seed(0)
    clean = torch.randint(3, model.info.d_vocab, (n, length), generator=draw)
    corrupt = clean.clone()
    corrupt[:, first] = (clean[:, first] + 1) % model.info.d_vocab
    answers = torch.randint(3, model.info.d_vocab - 1, (n,), generator=draw)
    return mk.Task.from_tokens(clean, corrupt, answers, answers + 1, name="random pairs")


def _ours_each(model: mk.Model, task: mk.Task, receivers: list[str]) -> torch.Tensor:
    options = {"through_mlps": False, "direction": "denoise", "each": True, "progress": False}
    return torch.tensor(mk.path_patch(model, task, receivers, "0.1", **options).frame["metric"].to_numpy())


def _lens_direct(model: mk.Model, task: mk.Task) -> torch.Tensor:
    from transformer_lens.patching import get_act_patch_direct_path

    clean, corrupt = task.clean.to(model.info.device), task.corrupt.to(model.info.device)
    with torch.inference_mode(), redirect_stderr(StringIO()):
        _, clean_cache = model.bridge.run_with_cache(clean)
        _, corrupt_cache = model.bridge.run_with_cache(corrupt)
        metric = partial(_metric, task)
        found = get_act_patch_direct_path(model.bridge, corrupt, clean_cache, corrupt_cache, metric, 0, 1, "q")
    return found[1:].flatten()


if __name__ == "__main__":
    main()
