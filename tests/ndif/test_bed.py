"""The bed itself: it listens on loopback alone, and a model traced on it says what it says here.

Run by ``make ndif``; skipped where no bed is running.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest
import torch

import mechkit as mk
from mechkit.packaged import SMOLLM2_135M, local_folder

HOST = os.environ.get("MECHKIT_NDIF_HOST")
pytestmark = pytest.mark.skipif(HOST is None, reason="no NDIF is running: make ndif")
_LISTENS = "0A"


def _listening() -> list[str]:
    """Addresses on which something in this network namespace listens."""
    found = []
    for name, size in (("tcp", 4), ("tcp6", 16)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            if state != _LISTENS:
                continue
            raw = bytes.fromhex(local.split(":")[0])  # words of four bytes, each the wrong way round
            found.append(str(ipaddress.ip_address(b"".join(raw[i : i + 4][::-1] for i in range(0, size, 4)))))
    return found


def test_nothing_but_loopback_is_listened_on():
    found = [ipaddress.ip_address(one) for one in _listening()]
    assert len(found) > 5
    for one in found:
        plain = getattr(one, "ipv4_mapped", None) or one
        assert plain.is_loopback, one


@pytest.mark.real_model
def test_a_model_traced_here_and_there_says_the_same():
    import nnsight
    from nnsight.intervention.backends.remote import RemoteBackend

    own = mk.load("smollm2-135m", device="cpu")
    folder = str(local_folder(SMOLLM2_135M))
    there = nnsight.TransformersModel(folder, tokenizer=folder, task="text-generation")
    tokens = own.tokens("When Mary and John went to the store, John gave a drink to")
    with there.trace(tokens, backend=RemoteBackend(_key(there, folder), host=HOST)):
        logits = there.lm_head.output.save()
    assert torch.allclose(logits, own.run(tokens).logits, atol=1e-4)


def _key(model: object, folder: str) -> str:
    """The server's name for a model in a folder; nnsight by itself would ask the Hub for it first."""
    from nnsight.modeling import huggingface

    huggingface._ID_CACHE[folder] = folder
    return model.to_model_key()  # type: ignore[attr-defined]
