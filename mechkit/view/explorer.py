"""Four views of one behaviour, linked, in one cell: scores of heads, their attention, the circuit, the tokens.

1. Half of the prompts, drawn at random, are for finding: every head is patched, and the largest are the circuit
   (``mk.discover``). Scores or a circuit that are given were found before, on whatever prompts.
2. The other half is for measuring: the circuit view's faithfulness is on prompts that a circuit that is found here was
   not found on.
3. Attention, with its edits, and the scores of tokens are those of one prompt.
4. What is chosen, in focus or locked in one view is so in the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import ipywidgets
import torch
import traitlets

from ..circuits.circuit import Circuit
from ..circuits.discover import discover
from ..decomposition.tokens import token_scores
from ..errors import CapacityError, OptionError, PromptError, UnsupportedError
from ..results import Scores
from .attention_of import attention
from .circuit_of import circuit_view
from .tokens_view import tokens
from .widget import LiveView, linked, read_chosen, with_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..edits import Edit
    from ..model import Model
    from ..tasks.task import Task
    from .attention_view import AttentionView
    from .circuit_view import CircuitView
    from .scores_view import ScoresView
    from .tokens_view import TokensView

_COLUMNS = "repeat(auto-fit, minmax(min(100%, 720px), 1fr))"
_TRIED = (
    UnsupportedError,
    OptionError,
    PromptError,
    CapacityError,
)  # what of a model or a text the scores of tokens cannot do


class Explorer(ipywidgets.GridBox):
    """The views together; make one with ``mk.explore``.

    Attributes:
        scores, attention, circuit, tokens: the views; ``tokens`` is None where the model has no tokenizer, or where
            its tokens cannot be scored (``without`` says why).
        selection: what is chosen, in all of them.
    """

    _shared: ClassVar[dict[str, str]] = {"selection": "selection"}

    selection = traitlets.Any([])

    def __init__(
        self,
        title: str,
        scores: ScoresView,
        attention: AttentionView,
        circuit: CircuitView,
        tokens: TokensView | None,
        without: str = "",
    ):
        self.title, self.without = title, without
        self.scores, self.attention, self.circuit, self.tokens = scores, attention, circuit, tokens
        self.views: list[LiveView] = [scores, attention, circuit, *([tokens] if tokens else [])]
        told = [ipywidgets.Label(without)] if without else []
        super().__init__([*self.views, *told], layout={"grid_template_columns": _COLUMNS, "grid_gap": "24px"})
        linked(self, *self.views)

    @property
    def edits(self) -> list[Edit]:
        """The edits that are active in the attention view."""
        return self.attention.edits

    def picture(self) -> Figure:
        """The pictures of the views, one below the other."""
        from .explorer_figure import stacked

        return stacked([view.picture() for view in self.views])

    def sentence(self) -> str:
        """What is seen, in words."""
        told = [self.without] if self.without else []
        return "\n".join([self.title, *(view.sentence() for view in self.views), *told])

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """All views as one page that needs no kernel and no network; see ``LiveView.to_html``."""
        from .page import page

        return page(self.title, self.sentence(), self.views, path)

    def __iter__(self) -> Iterator[LiveView]:
        """The views, for ``link=``."""
        return iter(self.views)

    def _sites(self) -> list[str]:
        return list(dict.fromkeys(one for view in self.views for one in view._sites()))

    @traitlets.validate("selection")
    def _valid_selection(self, proposal: Any) -> list[str]:
        return read_chosen(proposal["value"], self._sites())

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return with_picture(super()._repr_mimebundle_(**options), self.picture(), self.sentence())

    def __repr__(self) -> str:
        return self.sentence()


def explore(
    model: Model,
    task: Task,
    *,
    scores: Scores | None = None,
    circuit: Circuit | None = None,
    prompt: int = 0,
    size: int = 13,
    progress: bool = True,
) -> Explorer:
    """Explore a behaviour: scores of heads, their attention, the circuit and the tokens, linked, in one cell.

    Args:
        model: any loaded model.
        task: prompts; one half is for finding, the other for measuring, as ``task.split(0.5)`` has them. Below four
            prompts all are for both.
        scores: of heads; left out: those that the circuit was chosen by, or of patching each head.
        circuit: left out: the heads with the largest scores. One that is given, or was chosen by scores that are
            given, is measured on the same half: find it on the other one (``task.split(0.5)[0]``).
        prompt: whose attention and tokens are shown.
        size: of the circuit that is found, at most.
        progress: show bars.

    Returns:
        The widget; ``explorer.selection``, ``explorer.edits``, ``explorer.circuit.circuit`` and the like are what was
        done with it, and ``explorer.to_html("page.html")`` is a page that needs no kernel.

    Raises:
        OptionError: a prompt that the task has not, or scores of another model.
        MetricError, TaskError, UnsupportedError: as of ``mk.discover``.
    """
    if not 0 <= prompt < len(task):
        raise OptionError(f"prompt = {prompt}", expected=f"0 to {len(task) - 1}")
    found, held_out = task.split(0.5) if len(task) >= 4 else (task, task)
    if circuit is None and scores is None:
        circuit = discover(model, found, "patch", size=size, progress=progress)
    elif circuit is None:
        assert scores is not None
        circuit = Circuit(tuple(scores.of_kind().ranked()[:size]), scores, scores.meta)
    table = scores or circuit.node_scores
    one = task[[prompt]]
    shown = table.show()
    first = shown.site if shown.site in {str(head) for head in model.heads()} else None
    seen = attention(model, one, scores=table if "z" in set(table.frame["kind"]) else None, focus=first)
    coloured, without = _tokens(model, one)
    graph = circuit_view(circuit, model, held_out, reference=task)  # means over all prompts: few share a template
    return Explorer(f"{task.name} in {model.name}", shown, seen, graph, coloured, without)


def _tokens(model: Model, one: Task) -> tuple[TokensView | None, str]:
    """The scores of a prompt's tokens, or why there are none."""
    if model.tokenizer is None:
        return None, "Tokens are not scored: the model has no tokenizer."
    ids = one.clean[0, : int(one.lengths[0])]
    text = one.texts[0] if one.texts else model.need_tokenizer().decode(ids, skip_special_tokens=True)
    try:
        if not torch.equal(model.tokens(text)[0], ids):
            return None, "Tokens are not scored: the prompt's text makes other tokens than the prompt has."
        return tokens(token_scores(model, text, answer=int(one.correct[0]), against=int(one.wrong[0]))), ""
    except _TRIED as error:
        return None, f"Tokens are not scored: {error}"
