"""Run every benchmark and print one table.

Each row is a ratio of two measurements made in turn in this process, so that a slow or noisy machine slows both. The
median of the ratios of ``--runs`` rounds is what to quote.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO

import torch

import mechkit as mk


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    model = mk.load(options.model)
    pair = mk.tasks.ioi(model, n=8, seed=0)[0]
    print(f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'what':<58}{'mechkit s':>11}{'other s':>10}{'ratio':>8}{'largest difference':>20}")
    _row("all heads, one IOI pair, against TransformerLens", options.runs, *head_sweep(model, pair))
    _row("all heads, one IOI pair, against one hooked forward a head", options.runs, *literal_sweep(model, pair))


def head_sweep(model: mk.Model, pair: mk.Task) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """``mk.patch`` and ``get_act_patch_attn_head_out_all_pos``, each from nothing but the pair: metric by head."""
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

    def theirs() -> torch.Tensor:
        with torch.inference_mode(), redirect_stderr(StringIO()):  # it has a progress bar that cannot be turned off
            _, clean = model.bridge.run_with_cache(pair.clean)
            return get_act_patch_attn_head_out_all_pos(
                model.bridge, pair.corrupt, clean, lambda logits: mk.metrics.logit_diff(logits, pair).mean()
            ).flatten()

    return _ours(model, pair), theirs


def literal_sweep(model: mk.Model, pair: mk.Task) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """``mk.patch`` and one whole forward pass a head with an edit."""

    def literal() -> torch.Tensor:
        heads = [str(head) for head in model.heads()]
        clean = model.run(pair.clean, record=heads)
        runs = (model.run(pair.corrupt, edits=[mk.patch_in(head, clean[head])]).logits for head in heads)
        return torch.stack([mk.metrics.logit_diff(logits, pair).mean() for logits in runs])

    return _ours(model, pair), literal


def _ours(model: mk.Model, pair: mk.Task) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(mk.patch(model, pair, progress=False).frame["metric"].to_numpy()).float()


def _row(what: str, runs: int, ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor]) -> None:
    ours()  # warm up
    seconds, difference = [], 0.0
    for _ in range(runs):
        start = time.perf_counter()
        mine = ours()
        middle = time.perf_counter()
        other = theirs()
        seconds.append((middle - start, time.perf_counter() - middle))
        difference = max(difference, float((mine - other).abs().max()))
    fast, slow = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(slow / fast for fast, slow in seconds)
    print(f"{what:<58}{fast:>11.2f}{slow:>10.2f}{ratio:>7.1f}×{difference:>20.1e}", flush=True)


if __name__ == "__main__":
    main()
