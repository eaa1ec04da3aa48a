"""Work that is sent without waiting, and picked up later, by another process if need be.

1. ``submit`` calls an analysis until it sends its first request. That is sent without waiting for its answer, and the
   analysis is left there.
2. With the request goes what is needed to take the analysis up again: its name and its arguments. The service gives it
   back with the answer, so that a job's id is enough, on any machine that has mechkit.
3. ``result`` calls the analysis again. Its first request has its answer now; what else it asks is asked as usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..backends.elsewhere import elsewhere
from ..backends.remote import RemoteBackend, errand
from ..errors import NoSuchJobError, OptionError, TooLongError
from .faults import fault, told
from .parcel import packed, sendable, unpacked

if TYPE_CHECKING:
    from ..model import Model

_POLLS = 1.0  # seconds from one question to the next
_BOOKED = 10.0  # seconds after which a service knows what was sent to it


class _SentError(BaseException):
    """Leaves an analysis whose request was sent."""


@dataclass
class _Sending:
    """Takes the first request of an analysis, and sends it with what takes it up again."""

    errand: bytes
    job: str = ""

    def sent(self, backend: RemoteBackend, request: Any) -> bytes:
        errand = packed((self.errand, request.function))
        self.job = backend.line.submit(packed(replace(request, errand=errand)))
        raise _SentError


@dataclass
class _Answered:
    """Gives the answer to the one request of an analysis that was sent; others are asked as usual."""

    answer: bytes | None
    function: str

    def sent(self, backend: RemoteBackend, request: Any) -> bytes:
        if self.answer is None or request.function != self.function:
            return backend.sent(request, False)
        answer, self.answer = self.answer, None
        return answer


class Job:
    """Work that was sent; made by ``mk.remote.submit``, or by ``mk.remote.job`` of an id.

    Attributes:
        id: by which any process can pick it up.
    """

    def __init__(self, id: str, model: Model):
        self.id, self._model = id, model
        self._answer: bytes | None = None
        self._heard = time.monotonic()

    @property
    def state(self) -> str:
        """``queued``, ``deploying``, ``running``, ``completed`` ..., as the service says.

        Raises:
            NoSuchJobError: the service does not know it.
            RemoteError: of a kind; what went wrong with the job, if something did.
        """
        return "completed" if self._answer is not None else self._poll().lower()

    def result(self, timeout: float | None = None) -> Any:
        """What the analysis gives; waits for it.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.

        Raises:
            TooLongError: it is not done by then; the job goes on.
            RemoteError, MechkitError: what went wrong with it.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self._answer is None:
            state = self._poll()
            if self._answer is None:
                if end is not None and time.monotonic() > end:
                    raise TooLongError(
                        f"Job {self.id} is {state.lower()} after {timeout:g} s",
                        fix="It goes on; ask for its result again, in any process: mk.remote.job(id, model).result()",
                    )
                time.sleep(_POLLS)
        line = _line(self._model)
        answer = unpacked(self._answer, self._model)
        if answer.fault is not None:
            raise fault(answer.fault, line.host, line.name)
        if not answer.errand:
            if answer.error is not None:
                raise answer.error
            raise NoSuchJobError(f"Job {self.id} was not sent by mk.remote.submit", expected="one that was")
        what, asked = unpacked(answer.errand, self._model)
        function, args, options = unpacked(what, self._model)
        token = errand.set(_Answered(self._answer, asked))
        try:
            return function(*args, **options)
        finally:
            errand.reset(token)

    def _poll(self) -> str:
        state, self._answer = _line(self._model).poll(self.id)
        if state == "UNKNOWN":
            # A job that was sent just now is not in the service's books yet.
            if time.monotonic() - self._heard < _BOOKED:
                return "QUEUED"
            raise NoSuchJobError(
                f"{_line(self._model).host} knows no job {self.id!r}",
                expected="the id of a job that was sent there, not long ago",
            )
        return state

    def __repr__(self) -> str:
        return f'Job("{self.id}", {self._model.name} on {_line(self._model).host})'


def submit(function: Callable[..., Any], model: Model, *args: Any, **options: Any) -> Job:
    """Send an analysis without waiting for it: ``mk.remote.submit(mk.patch, model, task, "heads")``.

    Args:
        function: an analysis, such as ``mk.patch``, ``mk.path_patch``, ``mk.edges`` or ``mk.decompose``.
        model: loaded with ``remote=``.
        args, options: of the analysis, without a checkpoint: the service keeps what it is doing.

    Raises:
        OptionError: a model that is not remote, or a checkpoint.
        MechkitError: what the analysis raises before it sends anything.
        RemoteError: of a kind.
    """
    line = _line(model)
    if options.get("checkpoint") is not None:
        raise OptionError("A checkpoint for work that nobody waits for", expected="none", fix="Call it without submit")
    with told(line.host, line.name):
        sending = _Sending(sendable((function, (model, *args), options)))
    token = errand.set(sending)
    try:
        function(model, *args, **options)
    except _SentError:
        return Job(sending.job, model)
    finally:
        errand.reset(token)
    raise OptionError(
        f"{getattr(function, '__name__', function)} asked nothing of {model.name}", expected="an analysis"
    )


def job(id: str, model: Model) -> Job:
    """A job that was sent before, by this process or another.

    Args:
        id: of the job.
        model: the same, loaded with the same ``remote=``.

    Raises:
        OptionError: a model that is not remote.
    """
    _line(model)
    return Job(id, model)


def _line(model: Model) -> Any:
    backend = elsewhere(model)
    if not isinstance(backend, RemoteBackend) or backend.line.local:
        raise OptionError(
            f"{getattr(model, 'name', model)} runs here", expected="a model loaded with remote=True or an address"
        )
    return backend.line
