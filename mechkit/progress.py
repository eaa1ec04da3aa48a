"""How far long work has come: a bar where the user sits, a report where the work was sent to.

1. Where work runs, it says how far it is. Locally that is one tqdm bar.
2. Where the work was sent to, nobody sees a bar. The one who sent it listens instead, and may want an answer after some
   seconds: work that keeps what is done then stops there, as if the user had stopped it, and is sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from tqdm.auto import tqdm

_BETWEEN = 0.5  # seconds between two reports


class Bar(Protocol):
    """What work tells of itself."""

    def update(self, n: int = 1) -> Any:
        """So many more things are done."""
        ...


@dataclass
class Listener:
    """One who wants to know how far work is.

    Attributes:
        report: is given what is done, how much of it, and how much there is.
        until: when to stop, by ``time.monotonic``; None: at the end.
        stopped: whether it was stopped for that reason.
    """

    report: Callable[[str, int, int], None]
    until: float | None = None
    stopped: bool = False


_listener: ContextVar[Listener | None] = ContextVar("mechkit_listener", default=None)


@contextmanager
def listened_to(listener: Listener) -> Iterator[None]:
    """While active, work reports to a listener and shows nothing."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def bar(total: int, what: str, unit: str, done: int = 0, show: bool = True) -> Iterator[Bar]:
    """A bar for the length of a ``with``.

    Args:
        total: things to do.
        what: is done, one word.
        unit: one of them.
        done: how many are done already.
        show: whether a user sees it.
    """
    listener = _listener.get()
    if listener is not None:
        yield _Report(listener, what, total, done)
        return
    with tqdm(total=total, initial=done, desc=what, unit=unit, disable=not show) as shown:
        yield shown


class _Report:
    def __init__(self, listener: Listener, what: str, total: int, done: int):
        self._listener, self._what, self._total, self._done = listener, what, total, done
        self._last = 0.0
        self.update(0)

    def update(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._last > _BETWEEN:
            self._last = time.monotonic()
            self._listener.report(self._what, self._done, self._total)


def stop_if_time_is_up() -> None:
    """For work that has just kept what is done.

    Raises:
        KeyboardInterrupt: the listener wants an answer now.
    """
    listener = _listener.get()
    if listener is not None and listener.until is not None and time.monotonic() > listener.until:
        listener.stopped = True
        raise KeyboardInterrupt
