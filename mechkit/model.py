"""Model: what a user holds. Dimensions, tokens, and runs with recordings and edits; a backend does the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .backends.elsewhere import where_the_model_is
from .backends.protocol import Backend, Forward, ModelInfo, Read
from .edits import Edit
from .errors import PromptError, UnsupportedError
from .graph import Graph
from .prompts import as_batch
from .run import Run
from .sites import HeadSet, Site, SitesLike, sites
from .tasks.task import Task

_HASHED_AT_ONCE = 1 << 22  # numbers: the embedding of a large vocabulary, in double precision, is not kept whole


class Model:
    """A language model; make one with ``mk.load``.

    Args:
        backend: what runs it.
        tokenizer: the Hub's tokenizer, or None where only token ids are used.
        source: where the weights came from, for provenance.
    """

    def __init__(self, backend: Backend, tokenizer: Any = None, source: Mapping[str, Any] | None = None):
        self.backend, self.tokenizer, self.source = backend, tokenizer, dict(source or {})

    @property
    def info(self) -> ModelInfo:
        """Name and dimensions."""
        return self.backend.info

    @property
    def name(self) -> str:
        """What the model is called in tables and messages."""
        return self.info.name

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.info.n_layers

    @property
    def n_heads(self) -> int:
        """Query heads a layer."""
        return self.info.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads a layer; fewer than ``n_heads`` on a grouped-query model."""
        return self.info.n_kv_heads

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.info.d_model

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.info.d_head

    @property
    def bridge(self) -> Any:
        """The TransformerLens bridge underneath."""
        return self._underneath("bridge")

    @property
    def hf(self) -> Any:
        """The Hub's module underneath, with TransformerLens' hook points in it."""
        return self._underneath("hf")

    @cached_property
    def nnsight(self) -> Any:
        """The same module as an nnsight ``TransformersModel`` (``NNsight`` where there is no tokenizer).

        Of a model that runs elsewhere, what nnsight has of it here, to trace with ``remote=``.
        """
        import nnsight

        if hasattr(self.backend, "line"):
            return self._underneath("line").there
        if self.tokenizer is None:
            return nnsight.NNsight(self.hf)
        return nnsight.TransformersModel(self.hf, tokenizer=self.tokenizer, task="text-generation")

    @cached_property
    def weights_hash(self) -> str:
        """A fingerprint of the weights, for provenance: the same weights give the same 16 hex digits."""
        return _weights_hash(self)

    def heads(self, addresses: SitesLike | None = None) -> HeadSet:
        """Every head, or the named ones, as a set that knows how many heads a layer has.

        Raises:
            SiteError: a head this model does not have.
        """
        if addresses is None:
            every = [Site(layer, head) for layer in range(self.n_layers) for head in range(self.n_heads)]
            return HeadSet(every, self.n_heads)
        return HeadSet([self.info.check(one) for one in sites(addresses)], self.n_heads)

    def graph(self, ungrouped: bool = False) -> Graph:
        """Every part that writes to the stream, every part that reads from it, and the edges between.

        Args:
            ungrouped: count keys and values for each query head, where heads share them.
        """
        info = self.info
        return Graph(info.n_layers, info.n_heads, info.n_kv_heads, self.backend.parallel, ungrouped)

    # -- tokens -----------------------------------------------------------------------------------------------

    @property
    def pad_token(self) -> int:
        """The id that fills rows at the right."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if pad is not None else (getattr(self.tokenizer, "eos_token_id", None) or 0)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, with nothing put before it."""
        return self.need_tokenizer()(text, add_special_tokens=False)["input_ids"]

    def to_text(self, ids: int | Sequence[int] | Tensor) -> str:
        """The text of one id or several."""
        return self.need_tokenizer().decode(ids, clean_up_tokenization_spaces=False)

    def tokens(self, prompts: str | Sequence[str] | Tensor | Task) -> Tensor:
        """Token ids ``[batch, pos]``, padded at the right.

        The tokenizer's beginning-of-sequence token is put first where the tokenizer has one.

        Raises:
            PromptError: an empty prompt, one longer than the model's context, or neither text nor ids.
        """
        return as_batch(self, prompts)[0]

    # -- runs -------------------------------------------------------------------------------------------------

    def run(
        self,
        prompts: str | Sequence[str] | Tensor | Task,
        record: SitesLike = (),
        edits: Sequence[Edit] = (),
    ) -> Run:
        """Run the model once.

        Args:
            prompts: text, texts, ids ``[batch, pos]``, or a task (its clean prompts).
            record: addresses to keep; read them as ``run["9.9.pattern"]``.
            edits: changes to make, in this order.

        Raises:
            PromptError, SiteError, EditError: see each kind.
        """
        tokens, lengths = as_batch(self, prompts)
        task = prompts if isinstance(prompts, Task) else None
        done = _forward(self, tokens, edits, task, sites(record), None, lengths)
        return Run(self, done.logits, tokens, lengths, done.recorded)

    def generate(
        self,
        prompts: str | Sequence[str] | Tensor | Task,
        max_new_tokens: int = 20,
        edits: Sequence[Edit] = (),
        **options: Any,
    ) -> Any:
        """Continue prompts, the likeliest token each time, with edits active at every step.

        Every new token is the one that a run of the whole text so far, with these edits, gives; positions of an edit
        count from the beginning of the text, or from its end so far.

        Args:
            prompts: text, texts, ids ``[batch, pos]`` of one length, or a task (its clean prompts).
            max_new_tokens: how many tokens at most; a text ends early at the model's end-of-text token.
            edits: changes to make, in this order.
            options: of the Hub's ``generate``, such as ``do_sample=True, temperature=0.7``.

        Returns:
            What was given, continued: text for text, a list for a list (or a task), ids
            ``[batch, pos + new]`` for ids, filled with the padding token after a text's end.

        Raises:
            PromptError, SiteError, EditError: see each kind.
            OptionError: fewer than one new token, or an option that the Hub's ``generate`` does not know.
        """
        from .generate import continued

        return continued(self, prompts, max_new_tokens, edits, options)

    def read(self, tokens: Tensor, positions: Tensor, columns: Tensor | None, edits: Sequence[Edit] = ()) -> Tensor:
        """Only the logits at one position a prompt: ``[batch, k]`` for ``columns [batch, k]``, else all."""
        return _forward(self, tokens, edits, None, (), Read(positions, columns)).logits

    def resolved(self, edits: Sequence[Edit], task: Task | None) -> list[Edit]:
        """The same edits, with spans looked up in the task, and means and resampled values in their references.

        Raises:
            EditError: something that is no edit, or a span where there is no task.
        """
        from .resolve import resolved

        return resolved(self, edits, task)

    def __repr__(self) -> str:
        i = self.info
        shared = f" ({i.n_kv_heads} key/value groups)" if i.grouped else ""
        return (
            f'Model("{i.name}", {i.n_layers} layers of {i.n_heads} heads{shared}, d_model {i.d_model}, '
            f"{i.dtype} on {i.device})"
        )

    def need_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            PromptError: the model was loaded without one.
        """
        if self.tokenizer is None:
            raise PromptError(
                f"{self.name} was loaded without a tokenizer",
                fix="Pass token ids, or load it as mk.load((hf_model, tokenizer))",
            )
        return self.tokenizer

    def _underneath(self, what: str) -> Any:
        if not hasattr(self.backend, what):
            raise UnsupportedError(f"{type(self.backend).__name__} has no {what} underneath")
        return getattr(self.backend, what)


@where_the_model_is
def _forward(
    model: Model,
    tokens: Tensor,
    edits: Sequence[Edit],
    task: Task | None,
    record: Sequence[Site],
    read: Read | None = None,
    lengths: Tensor | None = None,
) -> Forward:
    """One run; means and resampled values are taken where it runs."""
    return model.backend.forward(tokens, model.resolved(edits, task), record, read, lengths)


@where_the_model_is
def _weights_hash(model: Model) -> str:
    import hashlib

    if not hasattr(model.backend, "parameters"):
        return f"not seen, {model.source}"  # by code that a service keeps apart from the weights
    digest = hashlib.sha256()
    with torch.inference_mode():
        parameters: dict[str, Tensor] = model._underneath("parameters")
        for name, parameter in sorted(parameters.items()):
            sums = [0.0, 0.0]
            for part in parameter.flatten().split(_HASHED_AT_ONCE):
                exact = part.double()
                sums = [sums[0] + float(exact.sum()), sums[1] + float(exact.square().sum())]
            digest.update(f"{name} {list(parameter.shape)} {sums[0]:.12e} {sums[1]:.12e}".encode())
    return digest.hexdigest()[:16]
