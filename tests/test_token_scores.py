"""Token scores: encoders and decoders of every kind, against the Hub's own logits and a literal form for BERT."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from families import plain
from reference import contextual as literal
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

import mechkit as mk
from mechkit import errors
from mechkit.decomposition.hub_pass import hub_pass
from mechkit.decomposition.split import Rules, Split
from mechkit.decomposition.tokens import TokenScores, token_scores
from mechkit.library import eager

TEXT = "not a very <b>good</b> film though"
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *TEXT.split(), "bad", "it", "was", "NA"]
_BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
_DISTIL = {"vocab_size": len(WORDS), "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0}
_NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
_CONFIGS = {
    "Bert": lambda **more: t.BertConfig(**_BERT, **more),
    "Roberta": lambda **more: t.RobertaConfig(**_BERT, bos_token_id=1, eos_token_id=2, **more),
    "Electra": lambda **more: t.ElectraConfig(**_BERT, embedding_size=16, **more),
    "DistilBert": lambda **more: t.DistilBertConfig(**_DISTIL, max_position_embeddings=24, **more),
    "ModernBert": lambda **more: t.ModernBertConfig(
        **_BERT, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **more
    ),
    "GPT2": lambda **more: t.GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=3, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more
    ),
    "Llama": lambda **more: t.LlamaConfig(**_BERT, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **more),
}
ENCODERS = ("Bert", "Roberta", "Electra", "DistilBert", "ModernBert")


def reader(marks: bool = True, bos: bool = False) -> Any:
    """A tokenizer of whole words that puts [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if marks:
        ends = [("[CLS]", 1), ("[SEP]", 2)]
        tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    names |= {"bos_token": "[CLS]"} if bos else {}
    return t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@functools.cache
def hub(family: str, head: str = "ForSequenceClassification") -> Any:
    torch.manual_seed(0)
    more = _NAMES if head == "ForSequenceClassification" else {}
    hf = getattr(t, family + head)(_CONFIGS[family](**more)).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.25)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return hf


def ids(text: str = TEXT) -> torch.Tensor:
    return torch.tensor([reader()(text)["input_ids"]])


def own_difference(hf: Any, answer: int, against: int) -> float:
    with torch.inference_mode():
        logits = hf(input_ids=ids(), use_cache=False).logits if _is_decoder(hf) else hf(input_ids=ids()).logits
    return float(logits[0, answer] - logits[0, against])


def _is_decoder(hf: Any) -> bool:
    return type(hf).__name__.startswith(("GPT2", "Llama"))


@pytest.mark.parametrize("options", [{}, {"attention": "product"}, {"activation": "shapley", "biases": "irrelevant"}])
@pytest.mark.parametrize("family", [*ENCODERS, "GPT2", "Llama"])
def test_score_and_rest_are_a_classifiers_own_logit_difference(family: str, options: Any):
    hf = hub(family)
    before = hf.config._attn_implementation
    scores = token_scores((hf, reader()), TEXT, answer="positive", phrases=["very <b>good</b>"], **options)
    assert hf.config._attn_implementation == before
    np.testing.assert_allclose(scores.frame.score + scores.frame.rest, own_difference(hf, 1, 0), atol=1e-4)
    assert scores.unit == "logit(positive) - logit(negative)"
    assert list(scores.frame.kind) == ["token"] * 8 + ["phrase"]
    assert scores.frame.iloc[-1][["position", "start", "stop", "token"]].tolist() == [3, 3, 5, " very <b>good</b>"]
    assert "".join(scores.frame.token[1:7]) == TEXT
    assert scores.frame.score.abs().min() > 0


@pytest.mark.parametrize("family", ENCODERS)
def test_totals_of_every_layer_are_the_hubs_own(family: str):
    hf, kept = hub(family), []
    layers = next(one for one in hf.base_model.modules() if isinstance(one, torch.nn.ModuleList))
    with eager(hf), torch.inference_mode():
        hooks = [one.register_forward_hook(lambda _, __, out: kept.append(out)) for one in layers]
        hf(input_ids=ids())
        hub_pass(hf, {"input_ids": ids()}, torch.eye(8).bool(), Rules())
        for hook in hooks:
            hook.remove()
    own, ours = ([one[0] if isinstance(one, tuple) else one for one in part] for part in (kept[:3], kept[3:]))
    assert len(own) == len(ours) == 3
    for a, b in zip(own, ours, strict=True):
        assert isinstance(b, Split)
        assert b.relevant is not None
        assert b.relevant.abs().max() > 0
        torch.testing.assert_close(b.total, a, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [*ENCODERS, "GPT2", "Llama"])
def test_the_whole_text_leaves_no_rest_where_there_are_no_biases(family: str):
    torch.manual_seed(0)
    hf = type(hub(family))(hub(family).config)
    hf.load_state_dict(hub(family).state_dict())
    embeddings = getattr(hf.base_model, "embeddings", None)
    inside = {id(one) for one in embeddings.parameters()} if embeddings is not None else set()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith("bias") and id(parameter) not in inside:
                parameter.zero_()
    scores = token_scores((hf.eval(), reader()), TEXT, phrases=[(0, 8)], biases="irrelevant").frame
    assert scores.rest.iloc[-1] == pytest.approx(0, abs=1e-4)
    assert scores.rest.iloc[:-1].abs().max() > 1e-2
    assert scores.score.iloc[-1] != pytest.approx(scores.score.iloc[:-1].sum(), abs=1e-2)


@pytest.mark.parametrize("stabilise", [True, False])
def test_bert_agrees_with_the_literal_form(stabilise: bool):
    hf = hub("Bert")
    scores = token_scores(
        (hf, reader()), TEXT, answer=1, phrases=[(2, 5)], stabilise=stabilise, activation="remainder"
    ).frame
    for start, stop, score in ((3, 4, scores.score[3]), (2, 5, scores.score[8])):
        assert score == pytest.approx(literal_bert(hf, start, stop, stabilise), abs=1e-4)


def literal_bert(hf: Any, start: int, stop: int, stabilise: bool) -> float:
    """The relevant part of the difference of two classes, each part by its own arithmetic, patterns the model's own."""
    settled = literal.stabilised if stabilise else lambda x: x
    with eager(hf), torch.inference_mode():
        patterns = hf(input_ids=ids(), output_attentions=True).attentions
        hidden = hf.bert.embeddings(input_ids=ids())
        mask = torch.zeros(8, 1)
        mask[start:stop] = 1
        x = (hidden * mask, hidden * (1 - mask))

        def through(x: Any, part: Any) -> Any:
            return literal.linear(x, part.weight, part.bias, "shared")

        for layer, pattern in zip(hf.bert.encoder.layer, patterns, strict=True):
            values = through(x, layer.attention.self.value)
            z = tuple(
                (pattern @ part.unflatten(-1, (4, 8)).transpose(1, 2)).transpose(1, 2).flatten(-2) for part in values
            )
            out = literal.added(through(z, layer.attention.output.dense), x)
            middle = literal.layer_norm(out, layer.attention.output.LayerNorm, "shared")
            wide = settled(through(middle, layer.intermediate.dense))
            wide = literal.activation(wide, torch.nn.functional.gelu, "remainder")
            out = literal.added(settled(through(wide, layer.output.dense)), middle)
            x = settled(literal.layer_norm(out, layer.output.LayerNorm, "shared"))
        pooled = through((x[0][:, 0], x[1][:, 0]), hf.bert.pooler.dense)
        relevant, _ = through(literal.activation(pooled, torch.tanh, "remainder"), hf.classifier)
    return float(relevant[0, 1] - relevant[0, 0])


@pytest.mark.parametrize("family", ENCODERS)
def test_a_masked_model_is_asked_for_the_token_at_its_mask(family: str):
    hf, text = hub(family, "ForMaskedLM"), "it was [MASK] though"
    scores = token_scores((hf, reader()), text, answer="bad", against="film")
    with torch.inference_mode():
        logits = hf(input_ids=ids(text)).logits[0, 3]
    expected = logits[WORDS.index("bad")] - logits[WORDS.index("film")]
    np.testing.assert_allclose(scores.frame.score + scores.frame.rest, float(expected), atol=1e-4)
    raw = token_scores((hf, reader()), text).frame
    np.testing.assert_allclose(raw.score + raw.rest, float(logits.max()), atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "gemma2"])
def test_a_decoder_is_asked_for_its_next_token(family: str):
    model = mk.load((plain(family), reader(marks=False, bos=True)), device="cpu")
    scores = token_scores(model, TEXT, answer="bad", against="film", phrases=["a very", (0, 7)])
    logits = model.run(TEXT).logits[0, -1]
    expected = float(logits[WORDS.index("bad")] - logits[WORDS.index("film")])
    np.testing.assert_allclose(scores.frame.score + scores.frame.rest, expected, atol=1e-4)
    assert scores.frame.token.tolist()[:4] == ["[CLS]", "not", " a", " very"]
    assert scores.frame.iloc[7][["start", "stop"]].tolist() == [2, 4]
    likeliest = token_scores(model, TEXT)
    assert likeliest.meta["total"] == pytest.approx(float(logits.max()), abs=1e-4)
    assert likeliest.unit == f"logit({model.to_text(int(logits.argmax()))!r})"


def test_few_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch):
    whole = token_scores((hub("Bert"), reader()), TEXT).frame
    monkeypatch.setattr("mechkit.decomposition.asked.rows_at_once", lambda *_: 2)
    np.testing.assert_allclose(token_scores((hub("Bert"), reader()), TEXT).frame.score, whole.score, atol=1e-6)


def test_bad_input_is_told():
    bert, masked = (hub("Bert"), reader()), (hub("Bert", "ForMaskedLM"), reader())
    causal = (hub("GPT2", "LMHeadModel"), reader())
    for model, text, options, kind, words in [
        (bert, "", {}, errors.PromptError, "empty"),
        (bert, " ", {}, errors.PromptError, "no text"),
        (bert, "it " * 30, {}, errors.PromptError, "32 tokens"),
        ((bert[0], None), TEXT, {}, errors.PromptError, "without a tokenizer"),
        (bert, TEXT, {"answer": "happy"}, errors.OptionError, "'negative', 'positive'"),
        (bert, TEXT, {"answer": 2}, errors.OptionError, "class 2"),
        (bert, TEXT, {"phrases": ["bad"]}, errors.PromptError, "not in the text"),
        (bert, TEXT, {"phrases": ["ver"]}, errors.PromptError, "inside a token"),
        (bert, "it was it", {"phrases": ["it"]}, errors.PromptError, "twice"),
        (bert, TEXT, {"phrases": [(3, 9)]}, errors.OptionError, "phrase"),
        (bert, TEXT, {"phrases": "very"}, errors.OptionError, "list of phrases"),
        (bert, TEXT, {"method": "lime"}, errors.OptionError, "cd-t"),
        (bert, TEXT, {"reference": "mean"}, errors.OptionError, "zero"),
        (bert, TEXT, {"attention": "none"}, errors.OptionError, "frozen"),
        (masked, TEXT, {}, errors.PromptError, "0 mask"),
        (masked, "it [MASK]", {"answer": "not bad"}, errors.OptionError, "2 tokens"),
        (masked, "it [MASK]", {"answer": "qqq"}, errors.OptionError, "knows"),
        (masked, "it [MASK]", {"answer": 99}, errors.OptionError, "id from 0"),
        (causal, TEXT, {}, errors.UnsupportedError, "mk.load"),
        ((bert[0],), TEXT, {}, errors.OptionError, "hf_model, tokenizer"),
    ]:
        with pytest.raises(kind, match=re.escape(words)):
            token_scores(model, text, **options)


def test_parts_past_all_bounds_are_told(monkeypatch: pytest.MonkeyPatch):
    grown = Split(torch.zeros(1, 2), torch.full((8, 1, 2), torch.nan), Rules())
    monkeypatch.setattr("mechkit.decomposition.asked.hub_pass", lambda *_: grown)
    with pytest.raises(errors.OptionError, match="stabilise=True"):
        token_scores((hub("Bert"), reader()), TEXT, stabilise=False)


def test_a_model_without_embeddings_is_named():
    sizes: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48}
    config = t.OPTConfig(**sizes, num_hidden_layers=1, word_embed_proj_dim=32, pad_token_id=0)
    with pytest.raises(errors.UnsupportedError, match="OPTForSequenceClassification"):
        token_scores((t.OPTForSequenceClassification(config), reader()), TEXT)


def test_a_decoder_without_tokenizer_or_of_several_tokens_is_told():
    with pytest.raises(errors.PromptError, match="without a tokenizer"):
        token_scores(mk.load((plain("gpt2"), None), device="cpu"), TEXT)
    model = mk.load((plain("gpt2"), reader(marks=False, bos=True)), device="cpu")
    with pytest.raises(errors.TaskError, match="2 tokens"):
        token_scores(model, TEXT, answer="bad film")
    with pytest.raises(errors.OptionError, match="id from 0"):
        token_scores(model, TEXT, answer=10_000)


def test_the_picture_holds_every_token_and_nothing_of_the_texts_own_markup():
    scores = token_scores((hub("Bert"), reader()), TEXT, phrases=["not a"])
    html = scores._repr_html_()
    assert "<b>" not in html
    assert "&lt;b&gt;good&lt;/b&gt;" in html
    shown = re.findall(r'<span role="listitem" title="([^"]*)"[^>]*>([^<]*)</span>', html)
    assert [one.strip() for _, one in shown] == [
        *["[CLS]", *TEXT.replace("<", "&lt;").replace(">", "&gt;").split(), "[SEP]"],
        "not a",
    ]
    for (title, _), score in zip(shown, scores.frame.score, strict=True):
        assert f"{score:+.3f}" in title
    written = [one.get_text() for one in scores.plot().axes[0].texts]
    assert written[::2] == [token.strip() for token in scores.frame.token]
    plain_text = repr(scores.show())
    assert all(token.strip() in plain_text for token in scores.frame.token)


def test_a_saved_table_comes_back(tmp_path: Any):
    scores = token_scores((hub("Roberta"), reader()), TEXT, phrases=["film though"])
    for name in ("scores.parquet", "scores.csv"):
        again = TokenScores.load(scores.save(tmp_path / name))
        assert again.frame.token.tolist() == scores.frame.token.tolist()
        np.testing.assert_allclose(again.frame.score, scores.frame.score)
        assert again.meta["answer"] == scores.meta["answer"]
        assert again.unit == scores.unit
    assert "tokens and phrases" in repr(scores)
