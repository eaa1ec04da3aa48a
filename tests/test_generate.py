"""Continuing prompts: forms of input, lengths, ends of texts. Edits on every family: test_conformance.py."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import words
from families import tiny, tiny_task
from reference import patching as literal

import mechkit as mk


def test_ids_come_back_as_ids():
    model, ids = tiny("llama"), tiny_task(n=2, length=5).clean
    made = model.generate(ids, max_new_tokens=3, eos_token_id=None)
    assert made.shape == (2, 8)
    assert torch.equal(made[:, :5], ids)
    assert torch.equal(model.generate(ids[0], max_new_tokens=3, eos_token_id=None), made[0])
    expected = literal.continue_by_rerunning(lambda text: model.run(text).logits, ids, 3)
    assert torch.equal(made, expected)


def test_text_comes_back_as_text_longer_by_what_is_new():
    model, prompt = words.model(), "Mary gave John a book"
    text = model.generate(prompt, max_new_tokens=4, eos_token_id=None)
    assert text.startswith(prompt)
    ids = model.generate(model.tokens(prompt), max_new_tokens=4, eos_token_id=None)[0]
    assert text == model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_texts_of_different_lengths_come_out_as_each_alone():
    model = words.model()
    prompts = ["Mary gave John a book", "Then Mary", "Then John gave Mary a ring at the store"]
    edits = [mk.ablate("1.1"), mk.scale("m0", 0.5, positions=[-1])]
    together = model.generate(prompts, max_new_tokens=5, edits=edits)
    assert together == [model.generate(prompt, max_new_tokens=5, edits=edits) for prompt in prompts]


def test_a_tasks_prompts_are_edited_each_at_its_own_span():
    model = words.model()
    prompts = [("Mary gave John a book", "John gave John a book"), ("Then Mary", "Then John"), ("Mary", "John")]
    answers = {"correct": " Mary", "wrong": " John"}
    frame = pd.DataFrame([{"clean": clean, "corrupt": corrupt, **answers} for clean, corrupt in prompts])
    task = mk.Task.from_frame(frame, model)
    vector = 4 * torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    made = model.generate(task, max_new_tokens=3, edits=[mk.steer("resid.1", vector, positions="END")])
    for row, text in enumerate(made):
        at = int(task.lengths[row]) - 1
        alone = model.generate(task.texts[row], max_new_tokens=3, edits=[mk.steer("resid.1", vector, positions=[at])])
        assert text == alone


def test_a_text_ends_at_the_models_own_end():
    model, ids = tiny("llama"), tiny_task(n=2, length=5).clean
    free = model.generate(ids, max_new_tokens=6, eos_token_id=None)
    end = int(free[0, 6])
    made = model.generate(ids, max_new_tokens=6, eos_token_id=end)
    assert made[0, 6] == end
    assert (made[0, 7:] == model.pad_token).all()


def test_options_of_the_hubs_generate_go_through():
    model, ids = tiny("llama"), tiny_task(n=1, length=5).clean
    torch.manual_seed(0)
    one = model.generate(ids, max_new_tokens=8, do_sample=True, temperature=2.0, eos_token_id=None)
    torch.manual_seed(0)
    again = model.generate(ids, max_new_tokens=8, do_sample=True, temperature=2.0, eos_token_id=None)
    assert torch.equal(one, again)
    assert not torch.equal(one, model.generate(ids, max_new_tokens=8, eos_token_id=None))


def test_hooks_are_off_again_after_an_error_on_the_way(monkeypatch):
    model, ids = tiny("llama"), tiny_task(n=1, length=5).clean
    with pytest.raises(mk.MechkitError):
        model.generate(ids, max_new_tokens=2, edits=[mk.patch_in("0.1", torch.zeros(5, 3))])
    assert not any(point.has_hooks() for point in model.bridge.hook_dict.values())
    assert torch.equal(model.run(ids).logits, model.run(ids).logits)


def test_a_family_whose_cache_gives_something_else_goes_without():
    """MPT's own generation with a cache gives other tokens than the whole text does."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=3, max_seq_len=64)
    hub = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in hub.parameters():
            parameter.normal_(0, 0.25)
    model, ids = mk.load((hub, None), device="cpu"), tiny_task(n=3, length=6).clean
    expected = literal.continue_by_rerunning(lambda text: model.run(text).logits, ids, 4)
    assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=None), expected)
    assert model.backend._exact_cache is False
    assert tiny("llama").backend._cache_is_exact()


@pytest.mark.real_model
def test_the_real_model_writes_and_an_edit_changes_what_it_writes(smollm2):
    prompt = "When Mary and John went to the store, John gave a drink to"
    text = smollm2.generate(prompt, max_new_tokens=1)
    assert text == prompt + " Mary"
    assert smollm2.generate(prompt, max_new_tokens=1, edits=[mk.ablate("m0")]) != text
    ids = smollm2.tokens(prompt)
    for edits in ([mk.ablate("m0 23.3")], [mk.ablate("23.3", "uniform")], [mk.attend("20.0", mask=[0])]):
        made = smollm2.generate(ids, max_new_tokens=5, edits=edits)
        run = lambda text, edits=edits: smollm2.run(text, edits=edits).logits  # noqa: E731
        assert torch.equal(made, literal.continue_by_rerunning(run, ids, 5))
