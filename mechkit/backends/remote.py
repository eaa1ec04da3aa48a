"""The backend of a model that runs elsewhere: on NDIF, or on this machine as if it were there.

1. Nothing of the model is here but its configuration: dimensions, and the names of its parts.
2. ``call`` sends a measuring function to where the model is, and brings back what it measured. One request a call;
   where the function keeps what is done, a request ends after some seconds and the next one goes on from what was kept.
3. ``forward`` and ``generate`` are calls like any other.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import MechkitWarning, StorageError, UnsupportedError
from .anatomy import Anatomy
from .elsewhere import where_the_model_is
from .protocol import Forward, Read

if TYPE_CHECKING:
    from torch import Tensor

    from ..edits import Edit
    from ..model import Model
    from ..remote.line import Line
    from ..remote.there import Answer
    from ..sites import Site

_SECONDS = {True: 10.0, False: 120.0}  # of a request of work that keeps what is done: in a file of the user's, or not


class RemoteBackend:
    """Runs a model that is elsewhere.

    Args:
        line: the way to it.
        parts: where its parts are.
        family: class of the Hub's module.
        source: where its weights come from, for provenance.
        config: what is read of the Hub's configuration; see ``remote.there``.
    """

    def __init__(self, line: Line, parts: Anatomy, family: str, source: Mapping[str, Any], config: Mapping[str, Any]):
        self.line, self.parts, self._source, self._config = line, parts, source, config
        self.model: Model | None = None  # the one that has this backend
        self.info = parts.info(line.name, family, line.host)

    # -- calls ------------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
        """What a measuring function gives where the model is.

        Args:
            function: of mechkit, found by its name.
            args, options: what it is called with. A ``checkpoint`` among the options stays here.

        Raises:
            RemoteError: of a kind.
            MechkitError: what the function raised.
        """
        from ..remote.faults import told
        from ..remote.parcel import address, sendable, unpacked

        signature = inspect.signature(function)
        known, bound = signature.parameters, signature.bind(*args, **options)
        keeps = "checkpoint" in known and not self.line.local  # here, it is this machine's file as it is
        place = bound.arguments.pop("checkpoint", None) if keeps else None
        show = bool(bound.arguments.get("progress", known["progress"].default if "progress" in known else True))
        with told(self.line.host, self.line.name):
            given = sendable((bound.args, bound.kwargs))
        state = _begun(place) if keeps else None
        part: Answer | None = None
        try:
            while True:
                part = self._answered(address(function), given, state, place is not None, show)
                state = part.checkpoint or state
                if place is not None and state:
                    _keep(Path(place), state)
                if not part.stopped:
                    break
        except KeyboardInterrupt:
            if part is None:  # nothing came back yet
                raise
        assert part is not None
        assert part.result is not None
        return unpacked(part.result, self.model)

    def _answered(self, function: str, given: bytes, state: bytes | None, keeps: bool, show: bool) -> Answer:
        from ..remote.there import Request

        taking = errand.get()
        limit = None if taking is not None else _SECONDS[keeps]
        request = Request(
            function=function,
            given=given,
            name=self.info.name,
            source=self._source,
            parts=self.parts,
            checkpoint=state,
            seconds=limit,
            keeps=keeps,
            here=self.line.local,
            config=self._config,
        )
        answer = self._read(self.sent(request, show) if taking is None else taking.sent(self, request))
        for text in answer.warned:
            warnings.warn(text, MechkitWarning, stacklevel=6)
        if answer.error is not None:
            raise answer.error
        return answer

    def sent(self, request: Any, show: bool) -> bytes:
        """The answer to a request, packed."""
        from ..remote.parcel import packed

        return self.line.ask(packed(request), show)

    def _read(self, content: bytes) -> Answer:
        from ..remote.faults import fault
        from ..remote.parcel import unpacked

        answer = unpacked(content, self.model)
        if answer.fault is not None:
            raise fault(answer.fault, self.line.host, self.line.name) from None
        return answer

    # -- the contract -----------------------------------------------------------------------------------------

    @property
    def parallel(self) -> bool:
        """See ``Backend.parallel``."""
        return bool(self.parts.cfg["parallel_attn_mlp"])

    def forward(
        self,
        tokens: Tensor,
        edits: Sequence[Edit] = (),
        record: Sequence[Site] = (),
        read: Read | None = None,
        lengths: Tensor | None = None,
    ) -> Forward:
        """One run; see ``Backend.forward``."""
        return _forward(self.model, tokens, edits, record, read, lengths)

    def generate(self, tokens: Tensor, edits: Sequence[Edit], options: Mapping[str, Any]) -> Tensor:
        """Prompts continued; see ``Backend.generate``."""
        return _generate(self.model, tokens, edits, options)

    def start(self, *_: Any, **__: Any) -> NoReturn:
        """Base runs are kept where the model is: what begins from one is sent there, and is not asked for from here."""
        raise self._there()

    def base_tokens(self) -> NoReturn:
        """As ``start``."""
        raise self._there()

    def keep_only(self, *_: Any, **__: Any) -> NoReturn:
        """As ``start``."""
        raise self._there()

    def keep_edges(self, *_: Any, **__: Any) -> NoReturn:
        """As ``start``."""
        raise self._there()

    def _there(self) -> UnsupportedError:
        return UnsupportedError(
            f"A base run of {self.info.name}, which runs elsewhere, cannot be kept here",
            fix="Measure with mk.patch, mk.path_patch, mk.edges and their like, which are sent there whole",
        )


errand: ContextVar[Any] = ContextVar("mechkit_errand", default=None)
"""What takes requests in place of the line: see ``mechkit.remote.jobs``."""


@where_the_model_is
def _forward(
    model: Any,
    tokens: Tensor,
    edits: Sequence[Edit],
    record: Sequence[Site],
    read: Read | None,
    lengths: Tensor | None,
) -> Forward:
    return model.backend.forward(tokens, edits, record, read, lengths)


@where_the_model_is
def _generate(model: Any, tokens: Tensor, edits: Sequence[Edit], options: Mapping[str, Any]) -> Tensor:
    return model.backend.generate(tokens, edits, options)


def _begun(place: Any) -> bytes:
    """What a checkpoint holds so far."""
    path = None if place is None else Path(place).expanduser()
    if path is None or not path.exists():
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"{path} could not be read as a checkpoint: {error.strerror or error}", fix="Give another path"
        ) from error


def _keep(path: Path, state: bytes) -> None:
    from ..results import write_whole

    write_whole(path.expanduser(), lambda target: target.write_bytes(state))
