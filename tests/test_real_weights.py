"""The weight analyses on SmolLM2-135M."""

from __future__ import annotations

import pytest
import torch

import mechkit as mk

pytestmark = pytest.mark.real_model


def test_a_head_that_suppresses_what_it_looks_at(smollm2):
    """Head 23.3 takes from the token that it attends to; 29.1 does nothing of the kind."""
    tokens = torch.randperm(smollm2.info.d_vocab, generator=torch.Generator().manual_seed(0))[:1000]
    shares = {head: mk.token_circuits(smollm2, head, tokens=tokens, progress=False) for head in ("23.3", "29.1")}
    assert shares["23.3"].suppression() > 0.4 > 0.05 > shares["29.1"].suppression()
    assert shares["23.3"].copying() == 0
    assert shares["23.3"].eigenvalues < -0.9 < -0.3 < shares["29.1"].eigenvalues


def test_products_are_the_matrices(smollm2):
    weights = mk.HeadWeights.load(smollm2)
    for matrix in ("ov", "qk"):
        svd = mk.svd(weights, "23.3 0.8", matrix)
        for head in svd.heads:
            first, second = (
                weights.of_heads(kind, weights.heads([head]))[0] for kind in ("vo" if matrix == "ov" else "qk")
            )
            whole = first @ (second if matrix == "ov" else second.T)
            off = torch.linalg.norm(svd[head].reconstructed() - whole) / torch.linalg.norm(whole)
            assert float(off) < 1e-5


def test_a_channel_matters_more_than_chance(smollm2, ioi):
    """What 20.0 says along the component that 23.0's query reads most is needed; nine random changes are not."""
    composed = mk.composition(smollm2, "20.0", "23.0", "q")
    component = composed.components("20.0", "23.0")[0]
    done = mk.channel_effects(smollm2, ioi, mk.svd(smollm2, "20.0"), component, n_random=9, progress=False)
    assert done.channel > 0.03
    assert done.share_of_random == 0.1
