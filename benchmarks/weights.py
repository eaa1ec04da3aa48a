"""What the weights alone say, its speed and what it finds: ``python -m benchmarks.weights``.

* ``speed``: q-composition of every head of GPT-2 small's shape with every later one, whole and by component. Beside it
  the dense computation: W_OV and W_QK as ``d_model`` by ``d_model`` matrices, their product for each pair, and for each
  component the rank-one matrix times W_QK (the SVD is made before the clock). Of a few pairs, its time taken for all.
  Of ``--file``, or random weights.
* ``tokens``: the token circuits of one head of the model.
* ``ioi``: do heads that path patching finds compose more than others? Pairs of the found heads beside all other pairs
  of the same two layers; then the channels with the largest z among them are taken out on other prompts, beside random
  changes of the same size.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu

import mechkit as mk

from . import measure

LAYERS, HEADS, D_MODEL, D_HEAD = 12, 12, 768, 64
FOUND_ON, HELD_OUT, SIZE, CHANNELS = 50, 100, 13, 8


def main() -> None:
    """Measure and print."""
    parser = measure.parser("weights", __doc__)
    parser.add_argument("--file", type=Path, help="GPT-2 small's attention weights, as safetensors")
    parser.add_argument("--pairs", type=int, default=6, help="dense code on so many pairs (default: %(default)s)")
    parser.add_argument("--parts", nargs="*", default=["speed", "tokens", "ioi"])
    options = parser.parse_args()
    rows: list[measure.Row] = []
    print(f"{measure.machine()}\n", flush=True)
    if "speed" in options.parts:
        _speed(options.file, options.pairs, options.rounds, rows)
    if "tokens" in options.parts:
        _tokens(mk.load(options.model, device=options.device))
    if "ioi" in options.parts:
        _ioi(mk.load(options.model, device=options.device))
    if options.out:
        measure.save(rows, options.out)


def _speed(file: Path | None, pairs: int, rounds: int, rows: list[measure.Row]) -> None:
    weights = mk.HeadWeights.load(file, n_heads=HEADS) if file else _random()
    later = [(a, b) for a in weights.heads() for b in weights.heads() if a.layer < b.layer]
    some = later[:: len(later) // pairs][:pairs]
    print(measure.table([]), flush=True)
    measure.compare(
        f"q-composition of {len(later)} pairs and {len(later) * D_HEAD} components (dense: {len(some)} pairs)",
        rounds,
        partial(_ours, weights, some),
        {"dense": partial(_dense, weights, mk.svd(weights), some)},
        device="cpu",
        done=rows,
        part=len(some) / len(later),
    )


def _random() -> mk.HeadWeights:
    draw = torch.Generator().manual_seed(0)
    shape = (LAYERS, HEADS, D_MODEL, D_HEAD)
    q, k, v = (torch.randn(shape, generator=draw) for _ in "qkv")
    return mk.HeadWeights("random, of GPT-2 small's shape", q, k, v, torch.randn(shape, generator=draw).mT.contiguous())


def _ours(weights: mk.HeadWeights, some: list) -> torch.Tensor:
    frame = mk.composition(weights).frame
    picked = [frame.loc[(frame["sender"] == str(a)) & (frame["receiver"] == str(b)), "score"] for a, b in some]
    return torch.tensor(np.concatenate(picked))


def _dense(weights: mk.HeadWeights, svd: mk.HeadSVD, some: list) -> torch.Tensor:
    found = []
    for a, b in some:
        ov = weights.W_V[a.layer, a.head] @ weights.W_O[a.layer, a.head]
        qk = weights.W_Q[b.layer, b.head] @ weights.W_K[b.layer, b.head].T
        found.append(torch.linalg.norm(ov @ qk) / torch.linalg.norm(ov) / torch.linalg.norm(qk))
        parts = svd[a]
        for i in range(D_HEAD):
            one = parts.S[i] * torch.outer(parts.U[:, i], parts.Vh[i])
            found.append(torch.linalg.norm(one @ qk) / torch.linalg.norm(one) / torch.linalg.norm(qk))
    return torch.stack(found)


def _tokens(model: mk.Model) -> None:
    print(
        "\n| token circuits of a head | seconds | MB | copying, suppressing itself, own key first |\n|---|---|---|---|"
    )
    for head in ("23.3", "29.1"):
        with measure._peak(str(model.info.device)) as peak:
            started = time.perf_counter()
            found = mk.token_circuits(model, head, progress=False)
            seconds = time.perf_counter() - started
        about = f"{found.copying():.3f}, {found.suppression():.3f}, {found.attends_itself():.3f}"
        print(f"| {head}, {len(found):,} tokens | {seconds:.1f} | {peak[0]:.0f} | {about} |", flush=True)


def _ioi(model: mk.Model) -> None:
    task = mk.tasks.ioi(model, n=FOUND_ON + HELD_OUT, seed=0)
    found_on, held_out = task[list(range(FOUND_ON))], task[list(range(FOUND_ON, len(task)))]
    circuit = mk.discover(model, found_on, "path", size=SIZE, min_share=0.0, progress=False)
    heads = [one for one in circuit.nodes if one.is_head]
    print(f"\nHeads by path patching, {FOUND_ON} prompts: {' '.join(map(str, heads))}\n", flush=True)
    print("| kind | pairs | whole: median z, random | U, p | top component: median z, random | U, p |")
    print("|---|---|---|---|---|---|")
    best = []
    for kind in ("q", "k", "v"):
        composed = mk.composition(model, kind=kind)
        table = composed.pairs()
        layers = [table[column].astype(str).str.split(".").str[0].astype(int) for column in ("sender", "receiver")]
        names = {str(one) for one in heads}
        ours = table["sender"].isin(names) & table["receiver"].isin(names)
        ends = set(zip(layers[0][ours], layers[1][ours], strict=True))
        same = np.array([pair in ends for pair in zip(*layers, strict=True)]) & ~ours.to_numpy()
        cells = []
        for column in ("z", "top_z"):
            mine, others = table.loc[ours, column], table.loc[same, column]
            u, p = mannwhitneyu(mine, others, alternative="greater")
            cells.append(f"{mine.median():.1f}, {others.median():.1f} | {u / len(mine) / len(others):.2f}, {p:.2g}")
        print(f"| {kind} | {int(ours.sum())} of {int(same.sum())} | {' | '.join(cells)} |", flush=True)
        best += [(row.top_z, kind, composed, row) for row in table.loc[ours].itertuples()]
    print("\n| channel taken out | z | effect (se) | random: mean size, largest | as large as the channel's |")
    print("|---|---|---|---|---|")
    taken: set[tuple[str, int]] = set()
    for z, kind, composed, row in sorted(best, key=lambda one: -one[0]):
        component = composed.components(row.sender, row.receiver)[0]
        if (row.sender, component) in taken or len(taken) == CHANNELS:  # each once, by the pair that it is strongest in
            continue
        taken.add((row.sender, component))
        done = mk.channel_effects(model, held_out, mk.svd(model, row.sender), component, n_random=20, progress=False)
        random = done.frame["score"].iloc[1:].abs()
        about = f"{done.channel:.3f} ({done.frame['se'].iloc[0]:.3f}) | {random.mean():.3f}, {random.max():.3f}"
        as_large = int((random >= abs(done.channel)).sum())
        name = f"{row.sender} to {row.receiver}.{kind}, {component}"
        print(f"| {name} | {z:.0f} | {about} | {as_large} of 20 |", flush=True)


if __name__ == "__main__":
    main()
