"""The door to all scores of heads: ``mk.score(model, data, how="induction")``.

Each score is a function of its own, ``(model, data, *, options)``; this finds it by its name. Those that only look at
patterns are measured together when several are asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, overload

from ..errors import OptionError
from ..results import Table
from .attention import IN_ONE_PASS, NAMES, attention_scores

if TYPE_CHECKING:
    from ..model import Model

# Name: module and function of this package.
OTHERS = {
    "waad": "token_curves.waad",
    "fai": "token_curves.fai",
    "leave_one_out": "causal.leave_one_out",
    "ships": "causal.ships",
    "sahara": "greedy_group.sahara",
    "attention_influence": "influence.attention_influence",
    "token_loss": "influence.token_loss",
    "gate_gradient": "gradient.gate_gradient",
    "fisher": "gradient.fisher",
    "direct": "direct.direct",
    "sinks": "sinks.sinks",
    "massive_dims": "massive.massive_dims",
    "retrieval": "retrieval.retrieval",
    "divergence": "divergence.divergence",
    "token_divergence": "divergence.token_divergence",
    "semantic_distance": "semantic.semantic_distance",
    "probe": "probe.probe",
    "copying": "copying.copying",
    "atlas": "atlas.atlas",
    "redundancy": "redundancy.redundancy",
    "merged": "redundancy.merged",
    "similarity": "similarity.similarity",
}
HOWS = (*NAMES, *OTHERS)


@overload
def score(model: Model, data: Any = None, how: str = "induction", **options: Any) -> Any: ...
@overload
def score(model: Model, data: Any, how: Sequence[str], **options: Any) -> dict[str, Any]: ...
def score(model: Model, data: Any = None, how: str | Sequence[str] = "induction", **options: Any) -> Any:
    """Score heads.

    Args:
        model: whose heads.
        data: prompts, ids or a task, as the score needs; None where it needs none, and of the scores of patterns for
            random tokens that are repeated.
        how: the score's name (of ``mechkit.head_scores.score.HOWS``); several, to be measured together as far as can
            be; or ``"attention"``, all that one pass over the patterns gives.
        options: of that score; ``help(mechkit.head_scores.score.function("induction"))`` tells them.

    Returns:
        One table; of several names a dictionary of them by name.

    Raises:
        OptionError: an unknown score, or an option that it does not have.
        MechkitError: as of each score.
    """
    if isinstance(how, str) and how != "attention":
        name = named(how)
        if name in NAMES:
            return _called(attention_scores, name, model, data, [name], **options)[name]
        return _called(function(name), name, model, data, **options)
    if how != "attention" and not isinstance(how, Sequence):
        raise OptionError(f"how = {how!r}", expected="a score's name, or several", fix=_known())
    names = list(IN_ONE_PASS) if how == "attention" else list(dict.fromkeys(named(one) for one in how))
    if not names:
        raise OptionError("No score", expected="names of scores", fix=_known())
    patterns = [name for name in names if name in NAMES]
    calls = {name: function(name) for name in names if name not in NAMES}
    taken = {option for call in calls.values() for option in _options(call)}
    if patterns:
        taken |= _options(attention_scores)
    if odd := set(options) - taken:
        raise OptionError(f"The option {sorted(odd)[0]!r} of {', '.join(names)}", expected=", ".join(sorted(taken)))
    found: dict[str, Table] = {}
    if patterns:
        own = {key: value for key, value in options.items() if key in _options(attention_scores)}
        found |= attention_scores(model, data, patterns, **own)
    for name, call in calls.items():
        own = {key: value for key, value in options.items() if key in _options(call)}
        found[name] = _called(call, name, model, data, **own)
    return {name: found[name] for name in names}


def named(how: Any) -> str:
    """The name of a score as it is written here: ``"leave-one-out"`` is ``"leave_one_out"``.

    Raises:
        OptionError: there is none of that name.
    """
    name = how.strip().lower().replace("-", "_").replace(" ", "_") if isinstance(how, str) else how
    if name not in HOWS:
        near = get_close_matches(str(name), HOWS, n=1)
        raise OptionError(
            f"The score {how!r}", expected="one of " + ", ".join(HOWS), fix=f"Did you mean {near[0]!r}?" if near else ""
        )
    return name


def function(how: str) -> Callable[..., Any]:
    """The function behind a score.

    Raises:
        OptionError: there is none of that name.
    """
    name = named(how)
    if name in NAMES:
        return attention_scores
    module, attribute = OTHERS[name].split(".")
    return getattr(import_module(f".{module}", __package__), attribute)


def _options(call: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(call).parameters.values()
    return {one.name for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


def _called(call: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
    if odd := set(options) - _options(call):
        raise OptionError(
            f"The option {sorted(odd)[0]!r} of {name}", expected=", ".join(sorted(_options(call))) or "no options"
        )
    parameters = inspect.signature(call).parameters.values()
    needed = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    if missing := [one for one in needed if one not in options]:
        raise OptionError(f"{name} without {missing[0]}", expected=", ".join(f"{one}=" for one in needed))
    return call(*args, **options)


def _known() -> str:
    return "Known: " + ", ".join(HOWS)
