"""Laundry list: what is left to buy?

"Today, Mike has to buy the milk, the lamp, and the rope. First, he got the milk and the rope. Then he went to get
the" is followed by " lamp". Merullo et al. 2024, arXiv 2406.09519, "Talking Heads" (lists of 3 to 10 objects are
theirs).

1. Draw the objects, all different and single tokens. What Mike got are all of them but one, in the order of the list;
   the one that is missing is the answer. It may stand at any index of the list, each as often as any other.
   "the" stands before every object, as it stands before the answer: were it before the first alone, that one could be
   told from the others by what is before it.
2. In the corrupt twin another object of the same list is missing, which is the wrong answer.
   ``corrupt="neighbor"``: one that stands next to it in the list. The twins then differ in one token, the place of
   the neighbor among what he got, and both keep the order of the list.
   ``corrupt="any"``: any other. So that the order is kept, all that stands between the two in the list moves by one
   place: as many tokens differ as there are steps from the one to the other.
3. All lists of one length share a template, whichever object is missing: its means hold nothing of the index.
   ``by_index`` tells the accuracy at each length and index, which is what the paper plots.

Long lists are hard, and their second halves harder than their first. SmolLM2-135M prefers the missing object
to its neighbor as often as this, the mean over indices and the least and the most at one index (seed 0, 40 prompts an
index):

    objects    3     4     5     6     7     8     9     10
    mean       0.95  0.95  0.83  0.82  0.77  0.76  0.66  0.69
    least      0.93  0.93  0.65  0.73  0.62  0.68  0.52  0.52
    most       1.00  0.98  0.93  0.93  0.93  0.88  0.73  0.77

This is why a list has 3 objects unless told otherwise. It is the accuracy for a pair, whose chance is 0.5; the missing
object comes before all others of its list less often.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from ..errors import OptionError, TaskError
from ..metrics import METRICS
from .twins import Twins, check_options, distinct, made, usable, written

if TYPE_CHECKING:
    import pandas as pd

    from ..metrics import Metric, MetricFunction
    from ..model import Model
    from .task import Task

OBJECTS = (
    "apple bag ball basket battery bike blanket book bottle bowl box bread brush bucket butter cake camera candle card "
    "carpet chair cheese chicken clock coat coffee cookie corn cup curtain desk doll drum fan fish flag flower fork "
    "glass glove guitar hammer hat honey jacket jar juice kettle key knife ladder lamp lemon lock magazine map meat "
    "milk mirror nail needle newspaper notebook oil onion paint pan paper pen pencil phone piano pillow pizza plate "
    "potato radio rice ring rope ruler salt sauce shirt shoe soap soup spoon stamp sugar table tea tent ticket tomato "
    "towel toy tray umbrella vase wallet watch wire"
).split()
LENGTHS = range(3, 11)


def laundry_list(
    model: Model,
    n: int = 64,
    seed: int = 0,
    objects: int | Iterable[int] = 3,
    index: int | None = None,
    corrupt: Literal["neighbor", "any"] = "neighbor",
    metric: str | Metric | MetricFunction = "logit_diff",
    check: bool = True,
) -> Task:
    """The object of a list that is still missing, for this model's tokenizer; see the module for the prompts.

    Spans: ``list`` (from the first object to the last), ``missing`` and ``wrong`` (the answers, in the list), ``got``
    (what he got, from the first object to the last), ``wrong_got`` (the wrong answer there), ``END``.

    The paper's lists, and the accuracy by their length and the index of what is missing::

        from mechkit.tasks.laundry_list import by_index

        by_index(model, mk.tasks.laundry_list(model, n=520, objects=range(3, 11)))

    Args:
        model: its tokenizer decides which objects can be used.
        n: number of prompts, all different.
        seed: same seed, same prompts.
        objects: how many there are in a list, 3 to 10; or several such numbers, each as often as there are indices.
        index: where in the list the missing one stands, from 0, or from -1 for the last; left out: everywhere.
        corrupt: ``"neighbor"``: one next to it is missing in the twin; ``"any"``: any other of the list.
        metric: a name, a Metric or a function ``(logits [n, vocab], task) -> [n]``.
        check: measure the accuracy, and warn when it is not clearly above chance.

    Raises:
        OptionError: ``n`` is below 1 or more than there are prompts, ``objects`` are not 3 to 10, ``index`` is outside
            a list, or ``corrupt`` is unknown.
        TaskError: this tokenizer has too few single-token objects.
    """
    check_options(n, corrupt=(corrupt, ("neighbor", "any")))
    lengths = _lengths(objects)
    cells = [(length, at) for length in lengths for at in _indices(length, index)]
    ids = usable(OBJECTS, "the", model, "objects", lengths[-1])
    things = sorted(ids)
    draw, turns = random.Random(seed), itertools.cycle(cells)

    def twins(_: int) -> Twins:
        length, missing = next(turns)
        step = 1 if corrupt == "neighbor" else length
        wrong = draw.choice([at for at in range(length) if 0 < abs(at - missing) <= step])
        listed = draw.sample(things, length)
        clean, fields = _filled(listed, missing)
        spans = {
            "list": ("object0", f"object{length - 1}"),
            "missing": f"object{missing}",
            "wrong": f"object{wrong}",
            "got": ("got0", f"got{length - 2}"),
            "wrong_got": f"got{wrong - (wrong > missing)}",
        }
        return Twins(clean, _filled(listed, wrong)[0], ids[listed[missing]], ids[listed[wrong]], fields, spans)

    return made(
        model,
        distinct(n, twins),
        metric=metric,
        check=check,
        name="laundry_list",
        about="the missing object of a list",
        seed=seed,
        objects=lengths,
        index=index,
        corrupt=corrupt,
    )


def by_index(model: Model, task: Task) -> pd.DataFrame:
    """How often the model prefers the missing object to the wrong one, by where in the list it stands.

    Args:
        model: reads two logits a prompt.
        task: prompts of ``laundry_list``, of any lengths; a split or a join of them will do.

    Returns:
        Accuracy: a row for each number of objects, a column for each index from 0, NaN where there is no prompt.

    Raises:
        TaskError: prompts that are no such lists.
    """
    import pandas as pd

    rows: dict[tuple[int, int], list[int]] = {}
    for row, text in enumerate(task.texts):
        listed, got = (re.findall(r"\bthe (\w+)", part) for part in text.partition(". First,")[::2])
        missing = [at for at, thing in enumerate(listed) if thing not in got]
        if len(listed) not in LENGTHS or len(missing) != 1:
            raise TaskError(f"Prompt {row}, {text!r}, is no laundry list", expected="prompts of mk.tasks.laundry_list")
        rows.setdefault((len(listed), missing[0]), []).append(row)
    if not rows:
        raise TaskError(f'Task "{task.name}" was not made from text', expected="prompts of mk.tasks.laundry_list")
    accuracy = {}
    for cell in sorted(rows):  # one at a time: short lists carry no padding, and the batches stay small
        part = task[rows[cell]]
        answers = model.read(part.clean, part.answer_positions, part.answers)
        accuracy[cell] = float((METRICS["logit_diff"](answers, part) > 0).float().mean())
    return pd.Series(accuracy).rename_axis(["objects", "index"]).unstack()


def _filled(listed: list[str], missing: int) -> tuple[str, dict[str, int]]:
    """The prompt in which one of the listed objects is missing, and where its fields begin."""
    got = [thing for at, thing in enumerate(listed) if at != missing]
    words = {f"object{i}": thing for i, thing in enumerate(listed)} | {f"got{i}": thing for i, thing in enumerate(got)}
    of_list, of_got = (_enumerated([name for name in words if name.startswith(kind)]) for kind in ("object", "got"))
    return written(f"Today, Mike has to buy {of_list}. First, he got {of_got}. Then he went to get the", **words)


def _enumerated(names: list[str]) -> str:
    *first, last = [f"the {{{name}}}" for name in names]
    return ", ".join(first) + (", and " if len(first) > 1 else " and ") + last


def _lengths(objects: int | Iterable[int]) -> list[int]:
    """The lengths of the lists, in order.

    Raises:
        OptionError: none, or one that is no whole number from 3 to 10.
    """
    several = list(objects) if isinstance(objects, Iterable) else [objects]
    if not several or not all(isinstance(length, int) and length in LENGTHS for length in several):
        raise OptionError(f"objects = {objects!r}", expected="a whole number from 3 to 10, or several")
    return sorted(set(several))


def _indices(length: int, index: int | None) -> list[int]:
    """Where in a list of this length the missing object may stand.

    Raises:
        OptionError: outside the list.
    """
    if index is None:
        return list(range(length))
    if not isinstance(index, int) or isinstance(index, bool) or not -length <= index < length:
        raise OptionError(
            f"index = {index!r}", expected=f"from {-length} to {length - 1} in a list of {length} objects"
        )
    return [index % length]
