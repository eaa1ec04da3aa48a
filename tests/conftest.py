"""Shared fixtures: the packaged model and its IOI task are made once a session."""

from __future__ import annotations

import os

import pytest
import torch

import mechkit as mk


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """One thread for tiny models: two spend their time waiting for each other."""
    torch.set_num_threads(os.cpu_count() or 1 if request.node.get_closest_marker("real_model") else 1)


@pytest.fixture(scope="session")
def smollm2() -> mk.Model:
    return mk.load("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def ioi(smollm2: mk.Model) -> mk.Task:
    return mk.tasks.ioi(smollm2, n=64, seed=0)
