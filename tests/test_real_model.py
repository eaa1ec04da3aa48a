"""SmolLM2-135M: the whole way, on real weights, against TransformerLens.

Bounds are those of the project's own claims, with discovery and evaluation on different prompts.
"""

from __future__ import annotations

import pytest
import torch

import mechkit as mk

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def circuit(smollm2: mk.Model, ioi: mk.Task) -> mk.Circuit:
    return mk.discover(smollm2, ioi.split(0.5)[0], method="patch", size=13, progress=False)


def test_the_model_is_the_one_it_says(smollm2):
    shape = (smollm2.n_layers, smollm2.n_heads, smollm2.n_kv_heads, smollm2.d_model, smollm2.d_head)
    assert shape == (30, 9, 3, 576, 64)
    run = smollm2.run("When Mary and John went to the store, John gave a drink to")
    assert run.next_tokens(1).token[0] == " Mary"
    logits = run.logits[0, -1]
    mary, john = (smollm2.encode(name)[0] for name in (" Mary", " John"))
    assert float(logits[mary] - logits[john]) == pytest.approx(5.29, abs=0.02)  # measured before mechkit was


def test_it_does_the_task(smollm2, ioi):
    answers = smollm2.read(ioi.clean, ioi.answer_positions, ioi.answers)
    difference = answers[:, 0] - answers[:, 1]
    assert float(difference.mean()) > 4
    assert float((difference > 0).float().mean()) >= 0.95


def test_the_bridge_and_nnsight_underneath_give_the_same_logits(smollm2):
    tokens = smollm2.tokens("The capital of France is")
    ours = smollm2.run(tokens).logits
    with torch.inference_mode():
        torch.testing.assert_close(smollm2.bridge(tokens), ours, atol=1e-4, rtol=1e-4)
    with smollm2.nnsight.trace(tokens):
        theirs = smollm2.nnsight.output.logits.save()
    torch.testing.assert_close(theirs.detach(), ours, atol=1e-4, rtol=1e-4)


def test_the_sweep_equals_transformer_lens_for_all_270_heads(smollm2, ioi):
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

    pair = ioi[5]
    with torch.inference_mode():
        _, clean = smollm2.bridge.run_with_cache(pair.clean)
        theirs = get_act_patch_attn_head_out_all_pos(
            smollm2.bridge, pair.corrupt, clean, lambda logits: mk.metrics.logit_diff(logits, pair).mean()
        )
    ours = mk.patch(smollm2, pair, "heads", progress=False)
    assert theirs.shape == (30, 9)
    metric = torch.tensor(ours.frame.metric.to_numpy()).view(30, 9)
    torch.testing.assert_close(metric.float(), theirs.float(), atol=1e-4, rtol=0)


def test_the_circuit_explains_the_behaviour_on_prompts_it_was_not_found_on(smollm2, ioi, circuit):
    held_out = ioi.split(0.5)[1]
    assert not set(held_out.texts) & set(ioi.split(0.5)[0].texts)
    assert len(circuit) <= 13
    evaluation = circuit.evaluate(smollm2, held_out, controls=20, progress=False)
    assert 0.85 <= evaluation.faithfulness <= 1.15
    assert evaluation.control.faithfulness.mean() < 0.35
    assert evaluation.interval[0] > evaluation.control.faithfulness.mean()


def test_the_circuit_has_heads_for_and_against(circuit):
    assert (circuit.frame.score > 0).any()
    assert (circuit.frame.score < 0).any()


def test_noising_finds_the_same_heads(smollm2, ioi, circuit):
    found = ioi.split(0.5)[0]
    noise = mk.patch(smollm2, found[:4], str(circuit.heads), direction="noise", progress=False).frame
    denoise = mk.patch(smollm2, found[:4], str(circuit.heads), progress=False).frame
    # The twins are each other's mirror image, so that each direction tells nearly the same.
    assert (noise.score * denoise.score > 0).all()


def test_saved_circuits_tell_the_same_story(smollm2, ioi, circuit, tmp_path):
    again = mk.Circuit.from_json(circuit.to_json(tmp_path / "circuit.json"))
    few = ioi.split(0.5)[1][:4]
    ours, theirs = (one.evaluate(smollm2, few, controls=0, curve=False, progress=False) for one in (circuit, again))
    assert ours.faithfulness == theirs.faithfulness
