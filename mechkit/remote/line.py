"""One request to a model that runs elsewhere, over nnsight, and the one line that says how far it is.

1. A block of nnsight is sent that runs ``boot`` there; all else is bytes that it is given.
2. mechkit's source goes with the first request; afterwards its digest does, unless the server has forgotten.
3. What the service says of the work becomes one line: queued, deploying, running, how far. It appears when an answer
   takes longer than a moment.
4. A request changes nothing there, so after a cut connection or a lost worker it is sent again, a few times.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import pickle
import time
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import nnsight
from tqdm.auto import tqdm

from ..errors import RemoteError, TooLongError, UnreachableError, WorkerLostError
from . import boot
from .faults import AGAIN, told
from .there import PROGRESS

_WAITS = (1.0, 5.0, 20.0, 60.0)  # seconds before it is sent again
_MOMENT = 1.0  # seconds without a line
_BETWEEN = 0.5  # seconds from one state of the line to the next
_NOT_SENT = ("view", "cli.py", "planted")  # no analysis calls them there


@cache
def source() -> tuple[str, bytes]:
    """mechkit's own source: its digest, and a zip file of it."""
    root = Path(__file__).parents[1]
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(root.rglob("*.py")):
                inside = path.relative_to(root)
                if inside.parts[0] not in _NOT_SENT:
                    # Without the time of writing, the same source is the same bytes.
                    archive.writestr(zipfile.ZipInfo(f"mechkit/{inside.as_posix()}"), path.read_bytes())
        content = out.getvalue()
    return hashlib.sha256(content).hexdigest()[:16], content


class Line:
    """The way to one model.

    Args:
        there: nnsight's model, without weights; with weights, where it stands for the server itself.
        host: of the service; None: run here what would be sent.
        name: of the model.
        key: the service's name of the model.
        patience: seconds without a word from the service after which it is given up.

    Attributes:
        there: as given.
        local: requests are run on this machine.
    """

    def __init__(self, there: Any, host: str | None, name: str, key: str = "", patience: float = 1800.0):
        self.host, self.name, self.key, self.patience = host or "here", name, key, patience
        self.local = host is None
        self.there, self._knows, self._reached = there, False, False

    def ask(self, body: bytes, show: bool = True) -> bytes:
        """Send a request and wait for its answer.

        Args:
            body: as for ``there.answered``.
            show: the line that says how far it is.

        Raises:
            RemoteError: of a kind; see ``faults``.
        """
        times = 0
        while True:
            try:
                return self._asked(body, show)
            except AGAIN as error:
                self._knows = False
                waits = _WAITS
                if isinstance(error, WorkerLostError):
                    waits = _WAITS[-2:]  # it may be this work that ends its worker, which others share
                elif isinstance(error, UnreachableError) and not self._reached:
                    waits = _WAITS[:1]
                if times >= len(waits):
                    raise
                _wait(waits[times], error, show)
                times += 1

    def submit(self, body: bytes) -> str:
        """Send a request without waiting: the id of the job.

        Raises:
            RemoteError: of a kind.
        """
        backend = self._backend(None)
        with told(self.host, self.name):
            backend.blocking = False
            self._run(backend, body, True)
        return str(backend.job_id)

    def poll(self, job: str) -> tuple[str, bytes | None]:
        """How a job is, and its answer once there is one.

        Raises:
            RemoteError: of a kind.
        """
        backend = self._backend(None)
        backend.blocking, backend.job_id = False, job
        with told(self.host, self.name):
            found = backend.poll()
        status = "UNKNOWN" if backend.status is None else backend.status.value
        return status, None if found is None else found["answer"]

    def _asked(self, body: bytes, show: bool) -> bytes:
        with told(self.host, self.name), _Display(self.host, self.name, show, self.patience) as display:
            answer = self._run(self._backend(display), body, not self._knows)
            if not answer:  # the one who knew the source is gone
                answer = self._run(self._backend(display), body, True)
        self._knows = self._reached = True
        return answer

    def _backend(self, display: Any) -> Any:
        if self.local:
            from nnsight.intervention.backends.local import LocalSimulationBackend

            return LocalSimulationBackend(self.there)
        from nnsight.intervention.backends.remote import RemoteBackend

        backend: Any = RemoteBackend(self.key, host=self.host)
        backend.display = display or _Display(self.host, self.name, False, self.patience)
        return backend

    def _run(self, backend: Any, body: bytes, with_source: bool) -> bytes:
        digest, content = source()
        request = pickle.dumps((digest, content if with_source else b"", body))
        there, text, answer = self.there, inspect.getsource(boot), b""
        with there.session(backend=backend):
            scope: dict[str, Any] = {}
            exec(text, scope)
            answer = nnsight.save(scope["answer"](there, request))
        return answer


def _wait(seconds: float, error: RemoteError, show: bool) -> None:
    if show:
        tqdm.write(f"{error.given}. Sent again in {seconds:.0f} s.")
    time.sleep(seconds)


class _Display:
    """What nnsight tells of a job, as one line."""

    def __init__(self, host: str, name: str, show: bool, patience: float):
        self.enabled = True  # nnsight then also says when nothing came
        self._what, self._show, self._patience = f"{name} on {host}", show, patience
        self._called = name.replace("-", "\N{NON-BREAKING HYPHEN}")  # or a notebook breaks the line there
        self._begun = self._heard = time.monotonic()
        self._bar: Any = None
        self._text, self._shown, self._share = "sending", 0.0, (0, 1)

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, response: Any) -> None:
        """A word from the service."""
        self._heard = time.monotonic()
        text = response.description
        if response.status.value != "LOG":
            self._text = f"{response.status.value.lower()}: {text}" if text else response.status.value.lower()
        elif text.startswith(PROGRESS):
            _, done, total, what = text.split(" ", 3)
            self._text, self._share = f"running: {what} {done} of {total}", (int(done), int(total))
        elif text.strip():
            tqdm.write(text)
        self.refresh()

    def refresh(self) -> None:
        """Nothing came for a moment.

        Raises:
            TooLongError: nor for long.
        """
        now = time.monotonic()
        if now - self._heard > self._patience:
            raise TooLongError(
                f"Nothing was heard of {self._what} for {self._patience:.0f} s, last: {self._text}",
                fix="mk.remote.status() asks the service how it is",
            )
        if not self._show or now - self._begun < _MOMENT or now - self._shown < _BETWEEN:
            return
        self._shown = now
        done, total = self._share
        if self._bar is None:
            self._bar = tqdm(total=total, bar_format="{desc} |{bar}|", leave=False)
        if self._bar.total != total:
            self._bar.reset(total)
        self._bar.n = done
        self._bar.set_description_str(f"{self._called}: {self._text} ({now - self._begun:.0f} s)")
