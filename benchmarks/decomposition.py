"""Contextual decomposition, its speed and what it finds: ``python -m benchmarks.decomposition``.

SmolLM2-135M, indirect object identification. The literal form is ``tests/reference/contextual.py``: both parts through
every operation, one source a run, every position, the whole vocabulary. Circuits are found on 25 prompts and evaluated
on 100 others, all other heads resampled from their twins.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr

import mechkit as mk
from mechkit.references import TemplateMeans, template_means
from tests.reference.contextual import Setting, contextual

from . import measure
from .patching import _hub_model

FOUND_ON, EVALUATED_ON, SIZE = 25, 100, 13
HOW: dict[str, dict[str, Any]] = {
    "as published (mean, stabilised)": {"reference": "mean"},
    "against the twin, stabilised": {"reference": "corrupt"},
    "against the twin, halves": {"reference": "corrupt", "activation": "shapley"},
    "against the twin, not stabilised": {"reference": "corrupt", "stabilise": False},
}


def main() -> None:
    """Measure, print the tables, and write the first as JSON where asked."""
    parser = measure.parser("decomposition", __doc__)
    parser.add_argument("--senders", type=int, default=5, help="literal code on so many heads (default: %(default)s)")
    parser.add_argument("--parts", nargs="*", default=["speed", "ranks", "circuits"])
    options = parser.parse_args()
    model = mk.load(options.model, device=options.device)
    task = mk.tasks.ioi(model, n=FOUND_ON + EVALUATED_ON, seed=0)
    found_on, held_out = task[list(range(FOUND_ON))], task[list(range(FOUND_ON, len(task)))]
    print(f"{model}\n{measure.machine()}\n", flush=True)
    rows: list[measure.Row] = []
    if "speed" in options.parts:
        print(measure.table([]), flush=True)
        hub = _hub_model(options.model).to(options.device)
        heads = [str(one) for one in model.heads()]
        means = template_means(model, found_on, list(model.heads()))  # before the clock
        some = heads[:: len(heads) // options.senders][: options.senders]
        measure.compare(
            f"CD-T of {len(heads)} heads to the logits, {FOUND_ON} IOI prompts (literal: {len(some)} of them)",
            options.rounds,
            partial(_ours, model, found_on, some),
            {"literal": partial(_literal, hub, found_on, some, means)},
            device=options.device,
            done=rows,
            part=len(some) / len(heads),
        )
    if "ranks" in options.parts:
        _ranks(model, found_on)
    if "circuits" in options.parts:
        _circuits(model, found_on, held_out)
    if options.out:
        measure.save(rows, options.out)


def _ours(model: mk.Model, task: mk.Task, some: list[str]) -> torch.Tensor:
    scores = mk.decompose(model, task, "heads", reference="mean", progress=False).frame.set_index("site")["score"]
    return torch.tensor(scores.loc[some].to_numpy())


def _literal(hub: Any, task: mk.Task, some: list[str], means: TemplateMeans) -> torch.Tensor:
    scores = []
    rows, where = torch.arange(len(task)), torch.ones_like(task.clean, dtype=torch.bool)
    for name in some:
        head = mk.site(name)
        source = {("z", head.layer): Setting(where, means.rows(("z", head.layer), task), (head.head or 0,))}
        with torch.inference_mode():
            logits = contextual(hub, task.clean, source)["logits", hub.config.num_hidden_layers][0]
        ends = logits[rows, task.answer_positions].gather(1, task.answers)
        scores.append(float((ends[:, 0] - ends[:, 1]).mean()))
    return torch.tensor(scores)


def _ranks(model: mk.Model, task: mk.Task) -> None:
    """Spearman with exact activation patching and path patching, by size, and how many of the 13 largest are shared."""
    others = {
        "patch, noise": mk.patch(model, task, "heads", direction="noise", progress=False),
        "patch, denoise": mk.patch(model, task, "heads", direction="denoise", progress=False),
        "paths to the logits": mk.path_patch(model, task, progress=False),
    }
    print("\n| CD-T | seconds | beside | rank correlation of sizes | of signed scores | shared of the 13 largest |")
    print("|---|---|---|---|---|---|")
    for how, options in HOW.items():
        started = time.perf_counter()
        scores = mk.decompose(model, task, "heads", progress=False, **options)
        seconds = time.perf_counter() - started
        ours = scores.frame.set_index("site")["score"]
        for name, other in others.items():
            theirs = other.frame.set_index("site")["score"].loc[ours.index]
            size, signed = spearmanr(ours.abs(), theirs.abs())[0], spearmanr(ours, theirs)[0]
            shared = {*map(str, scores.heads(SIZE))} & {*map(str, other.heads(SIZE))}
            print(f"| {how} | {seconds:.1f} | {name} | {size:.2f} | {signed:.2f} | {len(shared)} |", flush=True)


def _circuits(model: mk.Model, found_on: mk.Task, held_out: mk.Task) -> None:
    """Circuits of equal size, by method."""
    print("\n| method | found in, s | nodes | faithfulness (95% interval) | random heads |\n|---|---|---|---|---|")
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "path": ("path", {"min_share": 0.0}),
        "eap-ig": ("eap-ig", {"min_share": 0.0}),
    }
    ways |= {f"cd-t, {how}": ("cd-t", {"min_share": 0.0, "prune": False, **options}) for how, options in HOW.items()}
    ways["cd-t, as published, pruned"] = ("cd-t", {"min_share": 0.0, "ablation": "mean"})
    for name, (method, options) in ways.items():
        started = time.perf_counter()
        circuit = mk.discover(model, found_on, method, size=SIZE, progress=False, **options)
        seconds = time.perf_counter() - started
        done = circuit.evaluate(model, held_out, ablation="resample", progress=False)
        low, high = done.interval
        about = f"{done.faithfulness:.2f} ({low:.2f} to {high:.2f})"
        random = f"{done.control['faithfulness'].mean():.2f}"
        print(f"| {name} | {seconds:.1f} | {len(circuit.nodes)} | {about} | {random} |", flush=True)


if __name__ == "__main__":
    main()
