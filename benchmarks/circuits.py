"""CPR and CMD of every method on one behaviour, with its seconds: ``python -m benchmarks.circuits``.

SmolLM2-135M, indirect object identification, 100 prompts: circuits are found on one half and evaluated on the other,
what is left out being resampled from the prompts' own corrupt twins. The table is that of ``docs/circuits.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mechkit as mk
from mechkit.circuits.curve import FRACTIONS, keeper_of, measured

from .measure import machine

HEADS, PARTS = "heads", "heads mlps"
HEAD = "| level | method | found in, s | evaluated in, s | CMD (95% interval) | CPR (95% interval) | f at .01 .05 .2 |"


def main() -> None:
    """Find, evaluate, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.circuits", description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="prompts, halved (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    model = mk.load(options.model, device=options.device)
    found_on, held_out = mk.tasks.ioi(model, n=options.n, seed=options.seed).split(0.5, seed=options.seed)
    print(f"{model}\n{machine()}\n\n{HEAD}\n" + "|---" * 7 + "|", flush=True)
    begun, rows, keepers = time.perf_counter(), [], {}
    for level, name, score in methods(model, found_on):
        if options.only and name not in options.only:
            continue
        started = time.perf_counter()
        scores = score()
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        kinds = level if level == "edges" else " ".join(sorted({*scores.frame["kind"]} - {"embed"}))
        if kinds not in keepers:
            keepers[kinds] = keeper_of(scores, model, held_out, "resample", None)
        curve = measured(keepers[kinds], scores, model, held_out, FRACTIONS, True, options.seed, False, "resample")
        rows.append(_row(level, name, seconds, time.perf_counter() - started, curve))
        print(_line(rows[-1]), flush=True)
    whole = time.perf_counter() - begun
    print(f"\nthe whole table in {whole:.0f} s")
    if options.out:
        about = {"machine": machine(), "model": options.model, "n": options.n, "seed": options.seed, "seconds": whole}
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def methods(model: mk.Model, task: mk.Task) -> list[tuple[str, str, Callable[[], mk.Scores | mk.EdgeScores]]]:
    """Level, name, and what scores."""

    def edges(method: Any, **options) -> Callable[[], mk.EdgeScores]:
        return lambda: mk.edges(model, task, method, progress=False, **options)

    def nodes(method: Any, sites: str, **options) -> Callable[[], mk.Scores | mk.EdgeScores]:
        return lambda: mk.discover(model, task, method, sites=sites, progress=False, **options).scores

    def at_random() -> mk.EdgeScores:
        graph = model.graph()
        return mk.EdgeScores.of_matrix(graph, np.random.default_rng(0).normal(size=graph.exists.shape), "none", {})

    return [
        ("edges", "eap", edges("eap")),
        ("edges", "eap-ig", edges("eap-ig")),
        ("edges", "eap, RelP", edges("eap", gradients="relp")),
        ("edges", "eap, AtP*", edges("eap", correction="atp*")),
        ("edges", "at random", at_random),
        ("heads", "patch", nodes("patch", HEADS)),
        ("heads", "path", nodes("path", HEADS)),
        ("heads and MLPs", "patch", nodes("patch", PARTS)),
        ("heads and MLPs", "eap-ig", nodes("eap-ig", PARTS)),
        ("heads and MLPs", "acdc", nodes("acdc", PARTS, threshold=0.01)),
    ]


def _row(level: str, name: str, found: float, evaluated: float, curve: mk.Curve) -> dict[str, object]:
    by_size = curve.frame[curve.frame["ranking"] == "size"].set_index("fraction")["faithfulness"]
    return {
        "level": level,
        "method": name,
        "found_s": found,
        "evaluated_s": evaluated,
        "cmd": curve.cmd,
        "cmd_interval": curve.cmd_interval,
        "cpr": curve.cpr,
        "cpr_interval": curve.cpr_interval,
        "faithfulness": {str(fraction): float(value) for fraction, value in by_size.items()},
    }


def _line(row: dict) -> str:
    def area(name: str) -> str:
        low, high = row[f"{name}_interval"]
        return f"{row[name]:.3f} ({low:.3f} to {high:.3f})"

    shares = " ".join(f"{row['faithfulness'][fraction]:.2f}" for fraction in ("0.01", "0.05", "0.2"))
    times = f"{row['found_s']:.1f} | {row['evaluated_s']:.1f}"
    return f"| {row['level']} | {row['method']} | {times} | {area('cmd')} | {area('cpr')} | {shares} |"


if __name__ == "__main__":
    main()
