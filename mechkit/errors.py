"""Every error mechkit raises on purpose.

A message has three parts, always in this order: what was given, what was expected, what to do. Each kind
also is the standard library's nearest kind, so that ``except ValueError`` goes on working.
"""

from __future__ import annotations

from typing import Any


class MechkitWarning(UserWarning):
    """Something looks like a slip but may be meant."""


class MechkitError(Exception):
    """Base of every error mechkit raises on purpose.

    Args:
        given: what was given, as a sentence without its full stop.
        expected: what was expected instead.
        fix: what to do about it.
    """

    def __init__(self, given: str, *, expected: str = "", fix: str = ""):
        self.given, self.expected, self.fix = given, expected, fix
        parts = [given, f"Expected {expected}" if expected else "", fix]
        super().__init__(" ".join(part.rstrip(".") + "." for part in parts if part))


class SiteError(MechkitError, ValueError):
    """An address that cannot be read, or that this model does not have."""


class TaskError(MechkitError, ValueError):
    """Prompts or answers that do not make a task."""


class PromptError(MechkitError, ValueError):
    """A prompt that the model cannot run: empty, too long, or not text and not token ids."""


class MetricError(MechkitError, ValueError):
    """A metric that is unknown, or that gave something other than one finite number a prompt."""


class EditError(MechkitError, ValueError):
    """An edit that cannot be made, or that touched nothing."""


class RankingError(MechkitError, ValueError):
    """A ranking that the scores do not give: of ties, or of too few measurements."""


class OptionError(MechkitError, ValueError):
    """An argument outside its range."""


class UnsupportedError(MechkitError, NotImplementedError):
    """Something this model or backend cannot do."""


class CapacityError(MechkitError, MemoryError):
    """Something that does not fit in memory, not even by itself."""


class Interrupted(KeyboardInterrupt):
    """Long work that was stopped; what was done is kept.

    Attributes:
        scores: what was finished, as a ``Scores``; None where nothing was.
    """

    def __init__(self, message: str, scores: Any = None):
        super().__init__(message)
        self.scores = scores


class LoadError(MechkitError, OSError):
    """A model that could not be loaded."""


class DownloadError(LoadError):
    """The default model's wheel could not be fetched."""


class IntegrityError(LoadError):
    """A downloaded file is not the one expected."""


class RemoteError(MechkitError, RuntimeError):
    """Work that was sent elsewhere and did not come back.

    Attributes:
        server: what the server said, as it said it; empty where it said nothing.
    """

    server: str = ""

    @classmethod
    def saying(cls, server: str, given: str, *, expected: str = "", fix: str = "") -> RemoteError:
        """The error, with the server's own text kept in it."""
        error = cls(given, expected=expected, fix=fix)
        error.server = server
        return error


class UnreachableError(RemoteError, ConnectionError):
    """No service answers there, or it is not ready."""


class RefusedError(RemoteError, PermissionError):
    """The service does not take the key, or there is none."""


class NoSuchModelError(RemoteError, LookupError):
    """The service has no such model, or cannot bring it up."""


class VersionError(RemoteError):
    """Client and server do not fit together."""


class ServerError(RemoteError):
    """The code that was sent raised an exception there, which is none of mechkit's."""


class TooLongError(RemoteError, TimeoutError):
    """The service ended the work, or nothing was heard of it, for too long a time."""


class ConnectionCutError(RemoteError, ConnectionError):
    """The connection ended while work was under way."""


class WorkerLostError(RemoteError):
    """The process that held the model ended, or was taken away."""


class ParcelError(RemoteError, TypeError):
    """An argument that cannot be sent, or that the server could not read."""


class NoSuchJobError(RemoteError, LookupError):
    """No job of that id is known."""


class StorageError(MechkitError, OSError):
    """A file or folder that could not be written or read."""


def first_line(error: BaseException) -> str:
    """What another library's error says, without its later lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
