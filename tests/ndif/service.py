"""What the tests of a running NDIF share: models there and here, and its worker processes."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import elsewhere
import pytest

import mechkit as mk

HOST = os.environ.get("MECHKIT_NDIF_HOST", "")
FOLDER = Path(os.environ.get("MECHKIT_NDIF_FOLDER", "."))
running = pytest.mark.skipif(not HOST, reason="no NDIF is running: make ndif")


@functools.cache
def tiny(family: str) -> tuple[mk.Model, mk.Model]:
    """A tiny model of a family, there and here."""
    place = elsewhere.folder(FOLDER / "models", family)
    return mk.load(place, remote=HOST), mk.load(place, device="cpu")


@functools.cache
def smollm2() -> tuple[mk.Model, mk.Model]:
    """The default model, there and here."""
    return mk.load("smollm2-135m", remote=HOST), mk.load("smollm2-135m", device="cpu")


def workers() -> list[int]:
    """Process ids of the service's model actors."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(b"ray::CPUModelActor"):
                found.append(int(entry.name))
    return found
