"""A sweep sent to a running NDIF beside the same sweep here, in one run.

    python tests/ndif/apart.py <server's python> tests/ndif/bed.py --folder runs/ndif -- python -m benchmarks.remote

Both run on this machine, one after the other, with as many threads each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mechkit as mk

_TIMES = 3


def timed(measure: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    measure()
    return time.perf_counter() - started


def main() -> None:
    """Print a line a measurement."""
    host = os.environ["MECHKIT_NDIF_HOST"]
    own, far = mk.load("smollm2-135m", device="cpu"), mk.load("smollm2-135m", remote=host)
    task = mk.tasks.ioi(own, n=16, seed=0)
    jobs: dict[str, Callable[[mk.Model], Any]] = {
        "a run of 16 prompts": lambda model: model.read(task.clean, task.answer_positions, task.answers),
        "heads, 16 prompts": lambda model: mk.patch(model, task, "heads", progress=False),
        "paths to the logits": lambda model: mk.path_patch(model, task, progress=False),
        "edges, EAP": lambda model: mk.edges(model, task, progress=False),
    }
    for name, job in jobs.items():
        for model in (own, far):
            job(model)  # what a first time is for
        pairs = [(timed(lambda job=job: job(own)), timed(lambda job=job: job(far))) for _ in range(_TIMES)]
        here, there = (median(times) for times in zip(*pairs, strict=True))
        print(f"{name:22}  here {here:6.2f} s  there {there:6.2f} s  ratio {there / here:.2f}", flush=True)


if __name__ == "__main__":
    main()
