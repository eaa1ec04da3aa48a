"""Docstrings: which argument is described next?

    def port(self, load, size, files, last):
        \"\"\"oil column piece

        :param load: crime population
        :param size: unit dark
        :param

is followed by " files". Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only
transformer" (the form of the example is theirs).

1. Draw the names, all different and single tokens: the function, the arguments A, B, C and D, and what describes them.
   The docstring describes A and B, so that C is the answer; D, which comes after it, is the wrong one.
2. The corrupt twin has the same number of tokens.
   ``corrupt="random_random"``, the paper's: other names for A, B and C in the definition, and yet others for A and B
   in the docstring. Nothing in the twin tells what comes next, and C is nowhere in it; D stays.
   ``corrupt="swap"``: C and D change places in the definition, so that D is the answer. The twins have the same
   tokens, and only their order differs.

The paper takes the largest logit of all other arguments for the wrong answer; here it is D's, so that two logits are
enough. ``before=2`` puts two arguments that the docstring leaves out before A, as in the benchmark of Conmy et al.
2023 (arXiv 2304.14997); small models find that harder.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

from ..errors import OptionError
from .twins import Twins, check_options, distinct, made, usable, written

if TYPE_CHECKING:
    from ..metrics import Metric, MetricFunction
    from ..model import Model
    from .task import Task

WORDING = '''
def {{name}}(self, {before}{{A_def}}, {{B_def}}, {{C_def}}, {{D_def}}):
    """{about}

    :param {{A_doc}}: {about_a}
    :param {{B_doc}}: {about_b}
    :param'''
NAMES = (
    "buffer cache client code color config count data date depth event file files first frame group height host image "
    "index input item key label last level line list load mode model name node order output page path port price query "
    "rate result root score server shape size source state step table target text time title token type user value "
    "width"
).split()
WORDS = (
    "bridge church column crime dark engine field game history house kitchen letter machine market music office oil "
    "paper party piece population river school street summer unit water winter"
).split()


def docstring(
    model: Model,
    n: int = 64,
    seed: int = 0,
    corrupt: Literal["random_random", "swap"] = "random_random",
    before: int = 0,
    metric: str | Metric | MetricFunction = "logit_diff",
    check: bool = True,
) -> Task:
    """The next argument of a docstring, for this model's tokenizer; see the module for the prompts.

    Spans: ``A_def``, ``B_def``, ``C_def``, ``D_def`` (arguments in the definition), ``A_doc``, ``B_doc`` (in the
    docstring), ``END``.

    Args:
        model: its tokenizer decides which names and words can be used.
        n: number of prompts, all different.
        seed: same seed, same prompts.
        corrupt: ``"random_random"``: other names; ``"swap"``: C and D change places.
        before: how many arguments stand before A, 0 to 4.
        metric: a name, a Metric or a function ``(logits [n, vocab], task) -> [n]``.
        check: measure the accuracy, and warn when it is not clearly above chance.

    Raises:
        OptionError: ``n`` is below 1, ``before`` is not 0 to 4, or ``corrupt`` is unknown.
        TaskError: this tokenizer has too few single-token names or words.
    """
    check_options(n, corrupt=(corrupt, ("random_random", "swap")))
    if before not in range(5):
        raise OptionError(f"before = {before!r} arguments", expected="0 to 4")
    defined = usable(NAMES, "def f(self,", model, "argument names", 10 + before)
    described = usable(defined, "    :param", model, "argument names", 10 + before)
    names = sorted(usable(described, "\ndef", model, "argument names", 10 + before))
    words = sorted(usable(WORDS, "oil", model, "words", 7))
    first = sorted(usable(words, '    """', model, "words that begin a docstring", 1, space=""))
    draw = random.Random(seed)

    def twins(_: int) -> Twins:
        name, a, b, c, d, *others = draw.sample(names, 10 + before)
        begin = draw.choice(first)
        about = [begin, *draw.sample([word for word in words if word != begin], 6)]
        wording = WORDING.format(
            before="".join(f"{argument}, " for argument in others[5:]),
            about=" ".join(about[:3]),
            about_a=" ".join(about[3:5]),
            about_b=" ".join(about[5:]),
        )
        shown: dict[str, str] = {"A_def": a, "B_def": b, "C_def": c, "D_def": d, "A_doc": a, "B_doc": b}
        other: dict[str, str] = {"C_def": d, "D_def": c}
        if corrupt == "random_random":
            other = dict(zip(("A_def", "B_def", "C_def", "A_doc", "B_doc"), others[:5], strict=True))
        clean, fields = written(wording, name=name, **shown)
        twin = written(wording, name=name, **{**shown, **other})[0]
        return Twins(clean, twin, described[c], described[d], fields, {span: span for span in shown})

    return made(
        model,
        distinct(n, twins),
        metric=metric,
        check=check,
        name="docstring",
        about="the next argument of a docstring",
        seed=seed,
        corrupt=corrupt,
        before=before,
    )
