"""A file from which an interrupted sweep goes on.

1. It says which sweep it belongs to: model, prompts, metric, cells. A file of another sweep is an error, never mixed
   in and never overwritten.
2. It is written anew beside the old one and put in its place, so that a kill at any moment leaves a whole file.
3. It keeps how prompts were grouped and how many variants of each group ran at once: going on in the same way gives
   the same numbers to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._version import __version__
from ..errors import StorageError
from ..progress import stop_if_time_is_up
from ..results import write_whole

if TYPE_CHECKING:
    from ..backends.protocol import Paths
    from ..metrics import Metric
    from ..model import Model
    from ..tasks.task import Task
    from .cells import Cell

_SECONDS = 2.0  # between two writes


def fingerprint(
    model: Model,
    task: Task,
    cells: Sequence[Cell],
    base: Tensor,
    source: Tensor,
    metric: Metric,
    paths: Paths | None = None,
) -> dict[str, str]:
    """What makes one sweep differ from another."""
    spans = [text for name in sorted(task.spans) for text in (name, task.spans[name].tolist())]
    prompts = [base.tolist(), source.tolist(), task.answers.tolist(), task.lengths.tolist(), spans]
    identity = {
        "mechkit": __version__,
        "model": f"{model.name} {model.weights_hash} {model.info.dtype}",
        "prompts": digest(prompts),
        "metric": metric.name,
        "sites and positions": digest([f"{cell.site} {cell.positions}" for cell in cells]),
    }
    if paths is not None:
        identity["receivers"] = f"{list(map(str, paths.receivers))} {paths.through_mlps} {paths.each}"
    return identity


def digest(what: Any) -> str:
    """A fingerprint of what JSON can write."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


class Checkpoint:
    """Values of a sweep as far as it has come.

    Args:
        path: the file; None: nothing is kept.
        identity: as from ``fingerprint``.
        tensors: what is kept, by name; filled in from the file.
        base_tokens: of one base run, by which prompts are grouped.

    Attributes:
        base_tokens: as given, or as it was when the file was begun.
        rows: how many variants run at once, by the number of their group.

    Raises:
        StorageError: the file is another sweep's, or no checkpoint at all, or cannot be written.
    """

    def __init__(
        self, path: str | Path | None, identity: Mapping[str, str], tensors: Mapping[str, Tensor], base_tokens: int
    ):
        self._path = None if path is None else Path(path).expanduser()
        self._identity, self._tensors = dict(identity), dict(tensors)
        self.base_tokens = base_tokens
        self.rows: dict[int, int] = {}
        self._written = 0.0
        if self._path is not None:
            if self._path.exists():
                self._read(self._path)
            self.save()  # a place that cannot be written is found out before the work

    def save_now_and_then(self) -> None:
        """Write, unless that was just done; and stop, if one who listens wants what there is."""
        if self._path is not None and time.monotonic() - self._written > _SECONDS:
            self.save()
        stop_if_time_is_up()

    def save(self) -> None:
        """Write."""
        if self._path is None:
            return

        def write(target: Path) -> None:
            with target.open("wb") as file:
                tensors: dict[str, Any] = {name: tensor.numpy() for name, tensor in self._tensors.items()}
                np.savez(
                    file,
                    identity=np.array(json.dumps(self._identity)),
                    **tensors,
                    base_tokens=np.array(self.base_tokens),
                    rows=np.array(list(self.rows.items()), dtype=np.int64).reshape(-1, 2),
                )

        write_whole(self._path, write)
        self._written = time.monotonic()

    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                identity = json.loads(str(file["identity"]))
                tensors = {name: torch.from_numpy(file[name]) for name in self._tensors}
                rows, base_tokens = dict(file["rows"].tolist()), int(file["base_tokens"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StorageError(
                f"{path} could not be read as a checkpoint: {error}", fix="Give another path, or remove the file"
            ) from error
        if other := [key for key, value in self._identity.items() if identity.get(key) != value]:
            raise StorageError(
                f"{path} is the checkpoint of another sweep: its {', '.join(other)} differ",
                fix="Give another path, or remove the file",
            )
        for name, tensor in tensors.items():
            self._tensors[name].copy_(tensor)
        self.rows, self.base_tokens = rows, base_tokens
