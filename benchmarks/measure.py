"""Measure ways of doing the same work in turn, in one process, and say how they compare.

1. Every way runs once to warm up where that is cheap, then all of them in turn, round by round, so that a slow or
   noisy machine slows all.
2. A ratio is taken within a round; its median is what to quote, its smallest and largest the spread.
3. Memory is the most that the process held while one way ran, above what it held before; what was freed is given
   back to the system first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch

Way = Callable[[], torch.Tensor]


@dataclass
class Row:
    """One piece of work, done by mechkit and by another.

    Attributes:
        what: the work.
        other: who else did it.
        seconds: of mechkit, by round.
        other_seconds: of the other, by round.
        peak_mb, other_peak_mb: memory above what was held before, the most of all rounds.
        difference: largest difference of the results.
    """

    what: str
    other: str
    seconds: list[float] = field(default_factory=list)
    other_seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    other_peak_mb: float = 0.0
    difference: float = 0.0

    @property
    def ratios(self) -> list[float]:
        """How many times longer the other took, by round."""
        return [slow / fast for fast, slow in zip(self.seconds, self.other_seconds, strict=True)]


def parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """What the benchmarks of a model by name can be told; each adds its own.

    Args:
        name: of the module.
        about: its docstring.
    """
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    found.add_argument("--rounds", type=int, default=3, help="how often (default: %(default)s)")
    found.add_argument("--model", default="smollm2-135m", help="(default: %(default)s)")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--out", type=Path, help="a JSON file to write")
    return found


def compare(
    what: str, rounds: int, ours: Way, others: dict[str, Way], device: str, done: list[Row], part: float = 1.0
) -> None:
    """Measure, print a line for each of the others, and add to ``done``.

    Args:
        what: the work.
        rounds: how often.
        ours, others: do it, and give what came out; the others as much of it as mechkit's result is of.
        device: where.
        done: gets the rows.
        part: the share of the work that the others do; their seconds are those of the whole.
    """
    rows = [Row(what, name) for name in others]
    ours()  # warm up
    for _ in range(rounds):
        mine, seconds, peak = _timed(ours, device)
        for row, theirs in zip(rows, others.values(), strict=True):
            result, other_seconds, other_peak = _timed(theirs, device)
            row.seconds.append(seconds)
            row.other_seconds.append(other_seconds / part)
            row.peak_mb, row.other_peak_mb = max(row.peak_mb, peak), max(row.other_peak_mb, other_peak)
            row.difference = max(row.difference, float((mine - result).abs().max()))
    for row in rows:
        print(_line(row), flush=True)
    done += rows


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    head = "| work | beside | mechkit, s | other, s | ratio (spread) | mechkit, MB | other, MB | largest difference |"
    return "\n".join([head, "|" + "---|" * 8, *map(_line, rows)])


def save(rows: Sequence[Row], path: Path, **about: object) -> None:
    """The same as JSON, with the machine it was taken on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **about, "rows": [asdict(row) for row in rows]}, indent=1)
    path.write_text(text + "\n")


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _line(row: Row) -> str:
    ratio = f"{statistics.median(row.ratios):.1f} ({min(row.ratios):.1f} to {max(row.ratios):.1f})"
    times = f"{statistics.median(row.seconds):.2f} | {statistics.median(row.other_seconds):.1f}"
    return (
        f"| {row.what} | {row.other} | {times} | {ratio} | {row.peak_mb:.0f} | {row.other_peak_mb:.0f} "
        f"| {row.difference:.0e} |"
    )


def _timed(way: Way, device: str) -> tuple[torch.Tensor, float, float]:
    with _peak(device) as peak:
        start = time.perf_counter()
        result = way().float().cpu()
        seconds = time.perf_counter() - start
    return result, seconds, peak[0]


def _give_back() -> None:
    """Return what was freed to the system, so that using it again counts."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def _peak(device: str) -> Iterator[list[float]]:
    """Megabytes above what was held at the beginning; filled in at the end."""
    peak = [0.0]
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak[0] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    _give_back()
    process, over = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], (process.memory_info().rss - before) / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
