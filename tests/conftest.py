"""Shared fixtures: the packaged model and its IOI task are made once a session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import mechkit as mk

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def smollm2() -> mk.Model:
    return mk.load("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def ioi(smollm2: mk.Model) -> mk.Task:
    return mk.tasks.ioi(smollm2, n=64, seed=0)
