"""What token scores ask of a model: which logits, of what run, and the pass that splits them.

1. A decoder is asked for its next token, a classifier for a class, a masked language model for the token at its mask.
2. The answer is what the model itself gives, where it is not told; of two classes the other one is what it is held
   against.
3. Each ask has one function: which positions are relevant in, the relevant part of these logits out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.elsewhere import kept_where_the_model_is
from ..backends.lens import local_backend
from ..backends.memory import OutputBytes, rows_at_once
from ..backends.protocol import Read
from ..errors import OptionError, PromptError, UnsupportedError
from ..library import eager
from ..sites import site
from ..tasks.text import single_token
from .hub_pass import hub_pass
from .split import Rules, Split
from .split_pass import Source, split_pass
from .token_spans import Pieces, pieces, pieces_of

if TYPE_CHECKING:
    from ..model import Model

Choice = str | int | None
_PARTS = 3  # times what a layer puts out for a variant: the part, and what the rules make on the way


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of a model.

    Attributes:
        pieces: the text in tokens.
        answer, against: names of the logits; None: nothing is taken off.
        run: positions of sources ``[sources, pos]`` to the relevant part ``[sources]`` and the total of the difference.
        rows: how many sources fit at once.
        about: of the model, for provenance.
    """

    pieces: Pieces
    answer: str
    against: str | None
    run: Callable[[Tensor], tuple[Tensor, float]]
    rows: int
    about: dict[str, Any]


def of_decoder(model: Model, text: str, answer: Choice, against: Choice, rules: Rules) -> Asked:
    """A model's next token after a text."""
    tokenizer = model.need_tokenizer()
    text_pieces, tokens = pieces_of(model, text), model.tokens(text)
    last = torch.tensor([len(text_pieces.ids) - 1])

    def token(choice: str | int, what: str) -> int:
        if isinstance(choice, str):
            return _known(tokenizer, single_token(text, choice, model, what), choice, what)
        return _in_range(choice, model.info.d_vocab, what)

    own = int(model.read(tokens, last, None)[0].argmax()) if answer is None else answer
    columns = [token(own, "The answer"), *([] if against is None else [token(against, "What it is held against")])]
    runs = _Runs(model, tokens, columns, rules)
    about = {"model": model.name, "source": model.source, "weights": model.weights_hash}
    about |= {"device": model.info.device, "dtype": model.info.dtype}
    names = [repr(model.to_text(column)) for column in columns]
    return Asked(text_pieces, names[0], (*names, None)[1], runs.run, runs.rows, about)


@kept_where_the_model_is
class _Runs:
    """A base run of one text, and passes through it.

    Attributes:
        rows: how many sources fit at once.
    """

    def __init__(self, model: Model, tokens: Tensor, columns: Sequence[int], rules: Rules):
        self._backend, self._rules = local_backend(model, "Token scores of"), rules
        self._replay = self._backend.start(tokens, 0)
        self._read = Read(torch.tensor([tokens.shape[1] - 1]), torch.tensor([columns]))
        self.rows = rows_at_once(_PARTS * self._replay.row_bytes, tokens.shape[1], self._replay.stream(0).device)

    def run(self, where: Tensor) -> tuple[Tensor, float]:
        """See ``Asked.run``."""
        begin, stream = site("embed"), self._replay.stream(0)
        sources = [Source((begin,), mask[None]) for mask in where]
        zero = {("resid", 0): torch.zeros((), dtype=stream.dtype, device=stream.device)}
        out = split_pass(self._backend, self._replay, self._rules, sources, zero, {}, self._read)
        assert out is not None
        return _difference(out)


def of_hub(hf: Any, tokenizer: Any, text: str, answer: Choice, against: Choice, rules: Rules) -> Asked:
    """A class of a Hub classifier, or the token at the mask of a masked language model."""
    name = getattr(hf.config, "name_or_path", "") or type(hf).__name__
    kinds = [kind for kind in ("ForSequenceClassification", "ForMaskedLM") if _is(hf, kind)]
    if not kinds:
        raise UnsupportedError(
            f"Token scores of {type(hf).__name__}",
            expected="a sequence classifier or masked language model of the Hub, or an mk.Model",
            fix="Load a decoder as mk.load((hf_model, tokenizer))",
        )
    if tokenizer is None:
        raise PromptError(f"{name} was given without a tokenizer", expected="(hf_model, tokenizer)")
    read, inputs = _encoded(hf, tokenizer, text, name)
    masks = [i for i, one in enumerate(read.ids) if one == tokenizer.mask_token_id]
    classifier = kinds[0] == "ForSequenceClassification"
    if not classifier and len(masks) != 1:
        raise PromptError(f"A text with {len(masks)} mask tokens", expected=f"one {tokenizer.mask_token}")
    place = (0,) if classifier else (0, masks[0])
    with torch.inference_mode(), eager(hf), OutputBytes() as spent:
        own = hf(**inputs).logits[place]
    if classifier:
        names = {i: str(hf.config.id2label.get(i, i)) for i in range(len(own))}
        columns = _classes(names, int(own.argmax()) if answer is None else answer, against)
        shown = [names[column] for column in columns]
    else:
        chosen = [int(own.argmax()) if answer is None else answer, *([] if against is None else [against])]
        columns = [_vocabulary(tokenizer, one, len(own)) for one in chosen]
        shown = [repr(tokenizer.decode([column])) for column in columns]

    def run(where: Tensor) -> tuple[Tensor, float]:
        with eager(hf):
            out = hub_pass(hf, inputs, where, rules)
        assert out.relevant is not None
        return _difference(
            Split(out.total[place][columns][None], out.relevant[(slice(None), *place)][:, None, columns], rules)
        )

    layer = spent.total // max(1, getattr(hf.config, "num_hidden_layers", 1))
    logits = own.numel() * own.element_size() * (1 if classifier else len(read.ids))
    about = {"model": name, "class": type(hf).__name__, "device": str(own.device), "dtype": str(own.dtype)[6:]}
    rows = rows_at_once(_PARTS * (layer + logits), len(read.ids), own.device)
    return Asked(read, shown[0], (*shown, None)[1], run, rows, about)


def _is(hf: Any, kind: str) -> bool:
    return any(one.__name__.endswith(kind) for one in type(hf).__mro__)


def _difference(out: Split) -> tuple[Tensor, float]:
    """The relevant part of the first logit less that of the second ``[sources]``, and the same of the total."""
    assert out.relevant is not None
    relevant, total = (part[..., 0, :].double().cpu() for part in (out.relevant, out.total))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)[: total.shape[-1]]
    return relevant @ signs, float(total @ signs)


def _encoded(hf: Any, tokenizer: Any, text: str, name: str) -> tuple[Pieces, dict[str, Any]]:
    """The tokens of a text, and what the module is called with."""
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"{text!r} is no text" if text else "An empty text", expected="text of at least one token")
    fast = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(text, return_offsets_mapping=fast)
    ids: list[int] = list(found["input_ids"])
    position = getattr(getattr(hf.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(position, "padding_idx", None)  # RoBERTa's positions are counted from behind it
    limit = min(
        getattr(hf.config, "max_position_embeddings", len(ids)) - (0 if padding is None else padding + 1),
        tokenizer.model_max_length,
    )
    if not ids or len(ids) > limit:
        raise PromptError(f"A text of {len(ids)} tokens", expected=f"1 to {limit}, which is what {name} reads")
    if max(ids) >= (size := hf.get_input_embeddings().num_embeddings):
        raise PromptError(f"Token id {max(ids)}", expected=f"ids below {size}", fix="Give the model's own tokenizer")
    offsets = [tuple(one) for one in found["offset_mapping"]] if fast else None
    taken = inspect.signature(hf.forward).parameters
    device = hf.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {
        key: torch.tensor([found[key]], device=device)
        for key in ("input_ids", "attention_mask", "token_type_ids")
        if key in found and key in taken
    }
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return pieces(tokenizer, text, ids, offsets), inputs


def _classes(names: dict[int, str], answer: str | int, against: Choice) -> list[int]:
    """Indices of the class asked for and of the one it is held against; of two classes, the other one."""

    def index(choice: str | int) -> int:
        found = [i for i, name in names.items() if name == choice]
        if len(found) != 1 and (type(choice) is not int or choice not in names):
            raise OptionError(f"The class {choice!r}", expected="one of " + ", ".join(map(repr, names.values())))
        return found[0] if found else int(choice)

    columns = [index(answer)]
    if against is not None:
        columns.append(index(against))
    elif len(names) == 2:
        columns.append(1 - columns[0])
    return columns


def _vocabulary(tokenizer: Any, choice: str | int, size: int) -> int:
    if not isinstance(choice, str):
        return _in_range(choice, size, "The answer")
    ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise OptionError(
            f"The answer {choice!r} is {len(ids)} tokens: {tokenizer.convert_ids_to_tokens(ids)}",
            expected="a single token",
        )
    return _known(tokenizer, ids[0], choice, "The answer")


def _known(tokenizer: Any, token: int, text: str, what: str) -> int:
    if token == tokenizer.unk_token_id and text.strip() != tokenizer.unk_token:
        raise OptionError(f"{what} {text!r}", expected="a word that the tokenizer knows")
    return token


def _in_range(choice: Any, size: int, what: str) -> int:
    if type(choice) is not int or not 0 <= choice < size:
        raise OptionError(f"{what} {choice!r}", expected=f"a token, as text or as an id from 0 to {size - 1}")
    return choice
