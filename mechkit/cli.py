"""The command ``mechkit``. Nothing heavy is imported before a command needs it, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ._version import __version__
from .errors import MechkitError, OptionError, StorageError, TaskError

if TYPE_CHECKING:
    from .circuits.circuit import Circuit
    from .circuits.evaluate import Evaluation
    from .model import Model
    from .tasks.task import Task
    from .view.report import Behaviour, Example

# Written out, since the modules that have them are heavy.
TASKS = tuple(
    "capitals_conflict colored_objects docstring gendered_pronoun greater_than induction ioi laundry_list".split()
)
METHODS = tuple("patch path eap eap-ig eap-ig-activations exact acdc cd-t".split())
_PATTERNS_SHOWN = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 2 where mechkit says what was wrong."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except MechkitError as error:
        print(f"mechkit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mechkit: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what cannot be read as everything else that is wrong is said."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message, fix=f"See {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mechkit", description="Find, test and show circuits in transformer language models.")
    parser.add_argument("--version", action="version", version=f"mechkit {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)

    discover = commands.add_parser(
        "discover",
        help="find the circuit of a behaviour, test it on held-out prompts, write a report",
        description="Find the attention heads that carry out a behaviour, on one half of the prompts, and test them "
        "on the other. Writes circuit.json, scores.parquet and report.html.",
    )
    discover.add_argument(
        "task", choices=TASKS, metavar="task", help="the behaviour, one of the ready-made tasks: " + ", ".join(TASKS)
    )
    discover.add_argument(
        "--method",
        choices=METHODS,
        default="patch",
        metavar="METHOD",
        help=f"what to score heads by: {', '.join(METHODS)} (default: %(default)s)",
    )
    discover.add_argument(
        "--model", default="smollm2-135m", help="packaged name, Hub id, folder or .gguf file (default: %(default)s)"
    )
    discover.add_argument("--n", type=int, default=64, help="number of prompts, halved (default: %(default)s)")
    discover.add_argument("--size", type=int, help="largest number of heads (default: 13; acdc has none)")
    discover.add_argument("--controls", type=int, default=20, help="random sets to compare (default: %(default)s)")
    discover.add_argument("--seed", type=int, default=0, help="of prompts, halves and controls (default: %(default)s)")
    discover.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: runs/TASK)")
    discover.set_defaults(run=_discover)

    models = commands.add_parser("models", help="the models that need no model hub, and where they are kept")
    models.set_defaults(run=_models)
    return parser


def _discover(options: argparse.Namespace) -> int:
    if options.n < 2:
        raise OptionError(f"--n {options.n}", expected="at least 2 prompts, so that both halves have one")
    folder = options.out or Path("runs") / options.task
    _require_writable(folder)
    print(f"mechkit {__version__}: {options.task} in {options.model}, {options.n} prompts", file=sys.stderr)
    from . import tasks
    from .circuits.discover import discover
    from .sources import load

    model = load(options.model)
    task = getattr(tasks, options.task)(model, n=options.n, seed=options.seed)
    found_on, held_out = task.split(0.5, seed=options.seed)
    behaviour = _behaviour(model, task)
    circuit = discover(model, found_on, options.method, size=options.size)
    if not len(circuit):
        raise TaskError(f'{options.method} finds no head that "{task.name}" needs', fix="Take another method")
    evaluation = circuit.evaluate(model, held_out, controls=options.controls, seed=options.seed)
    example = _example(model, held_out, circuit)
    _print_table(circuit, evaluation, behaviour)
    _write(folder, circuit, evaluation, behaviour, example)
    return 0


def _require_writable(folder: Path) -> None:
    """Fail before the work, not after it."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(
            f"--out {folder} cannot be written: {error.strerror or error}", fix="Choose a folder that you may write to"
        ) from error


def _behaviour(model: Model, task: Task) -> Behaviour:
    from .patching.sweep import metric_of
    from .view.report import Behaviour

    return Behaviour(task.metric.name, task.metric.unit, metric_of(model, task, task.clean).numpy())


def _example(model: Model, task: Task, circuit: Circuit) -> Example:
    from .view.report import Example

    one = task[0]
    shown = list(circuit.heads)[:_PATTERNS_SHOWN]
    run = model.run(one, record=[f"{head}.pattern" for head in shown])
    return Example(
        tokens=[model.to_text(i) for i in one.clean[0].tolist()],
        patterns={str(head): run[f"{head}.pattern"][0].float().cpu().numpy() for head in shown},
        next_tokens=list(run.next_tokens(5)[["token", "prob"]].itertuples(index=False, name=None)),
    )


def _print_table(circuit: Circuit, evaluation: Evaluation, behaviour: Behaviour) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{circuit.meta['task']['name']} in {circuit.meta['model']}", title_justify="left")
    for column in ("head", "effect", "± se", "faithfulness so far"):
        table.add_column(column, justify="left" if column == "head" else "right")
    nodes = circuit.frame.reindex(columns=["site", "score", "se"]).itertuples(index=False, name=None)
    for (node, score, se), share in zip(nodes, evaluation.curve.faithfulness, strict=True):
        table.add_row(node, f"{score:+.3f}", "" if math.isnan(se) else f"{se:.3f}", f"{share:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"whole model: mean {behaviour.name} {behaviour.values.mean():+.2f}, above zero on "
        f"{100 * behaviour.positive:.0f}% of {len(behaviour.values)} prompts"
    )
    console.print(f"held-out prompts: {evaluation}", highlight=False, soft_wrap=True)


def _write(folder: Path, circuit: Circuit, evaluation: Evaluation, behaviour: Behaviour, example: Example) -> None:
    from .view.report import write_report

    written = [
        circuit.to_json(folder / "circuit.json"),
        circuit.scores.save(folder / "scores.parquet"),
        write_report(folder / "report.html", circuit, evaluation, behaviour, example),
    ]
    print("wrote " + ", ".join(map(str, written)))


def _models(options: argparse.Namespace) -> int:
    del options
    from .packaged import PACKAGED, cache_dir, is_cached

    for packaged in PACKAGED.values():
        state = "in the cache" if is_cached(packaged) else f"not fetched yet ({packaged.wheel_bytes / 1e6:.0f} MB)"
        print(f"{packaged.name}: {packaged.about}; {state}")
    print(f"cache: {cache_dir()} (set MECHKIT_CACHE to move it)")
    print("Any decoder that TransformerLens serves loads by its Hub id, from a folder, or from a .gguf file.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
