"""What can go wrong between here and there, each by its own error, with what the server said kept in it.

The service and nnsight tell most faults apart by text alone. The texts below are those of NDIF 0.1 and nnsight 0.8; one
that is not among them is a ``ServerError`` that shows what was said.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import (
    ConnectionCutError,
    MechkitError,
    NoSuchModelError,
    ParcelError,
    RefusedError,
    RemoteError,
    ServerError,
    TooLongError,
    UnreachableError,
    VersionError,
    WorkerLostError,
    first_line,
)

AGAIN = (UnreachableError, ConnectionCutError, WorkerLostError)
"""Faults after which the same request may be sent again: it changes nothing where it runs."""

_PUBLIC = "https://login.ndif.us"


@contextmanager
def told(host: str, name: str) -> Iterator[None]:
    """What is raised while a request is under way comes out as an error of mechkit.

    Args:
        host: of the service.
        name: of the model.

    Raises:
        RemoteError: of a kind.
    """
    import httpx
    import websocket
    from nnsight.intervention.backends.remote import RemoteError as ServiceError

    try:
        yield
    except MechkitError:
        raise
    except ServiceError as error:
        raise by_text(str(error), host, name) from None
    except websocket.WebSocketBadStatusException as error:
        raise by_text(f"Failed to send request: HTTP {error.status_code} {error}", host, name) from None
    except (websocket.WebSocketConnectionClosedException, ConnectionResetError, BrokenPipeError) as error:
        raise ConnectionCutError.saying(
            str(error),
            f"The connection to {host} ended while work was under way",
            fix="Send it again; with checkpoint=path it goes on from what was done",
        ) from None
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        kind = "Failed to send request: " if code >= 500 else ""
        raise by_text(f"{kind}HTTP {code} {error.response.reason_phrase}", host, name) from None
    except (ConnectionError, TimeoutError, OSError, httpx.HTTPError, websocket.WebSocketException) as error:
        raise _unreachable(str(error), host) from None
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise ParcelError(
            f"The request could not be made: {first_line(error)}",
            expected="arguments and metrics that cloudpickle can send, without open files or locks",
        ) from error


def by_text(text: str, host: str, name: str) -> RemoteError:
    """The error for what the service said.

    Args:
        text: what it said.
        host: of the service.
        name: of the model.
    """
    low = text.lower()
    if "api key" in low or "http 401" in low or "http 403" in low:
        return RefusedError.saying(
            text,
            f"{host} does not take the key: {_first(text)}",
            expected="a key in NDIF_API_KEY, or in nnsight's configuration",
            fix=f"Get one at {_PUBLIC}" if "ndif.us" in host else "Ask whoever runs it for one",
        )
    if "client nnsight version" in low or "client python version" in low or "malformed" in low:
        return VersionError.saying(text, f"{host} does not take these versions: {_first(text)}")
    if "could not deploy" in low or "error provisioning model" in low or "error starting model" in low:
        return NoSuchModelError.saying(
            text,
            f"{host} cannot bring up {name}: {_first(text)}",
            fix="mk.remote.status() shows which models it has",
        )
    if "architecture on this server" in low or "payload could not be read" in low:
        kind = VersionError if "architecture" in low or "modulenotfound" in low else ParcelError
        return kind.saying(
            text,
            f"{host} cannot read the request: {_first(text)}",
            fix="mk.remote.versions() compares what is installed here and there",
        )
    if "failed to send request" in low or "temporarily unavailable" in low:
        return _unreachable(text, host)
    if "execution timeout" in low or "timed out" in low:
        return TooLongError.saying(
            text,
            f"{host} ended the work on {name}: {_first(text)}",
            fix="Fewer prompts or sites at a time; with checkpoint=path, work is sent in parts of a few seconds",
        )
    if any(one in low for one in ("submitting request to model deployment", "evicted")):
        return WorkerLostError.saying(
            text,
            f"The process that held {name} on {host} ended: {_first(text)}",
            fix="Send it again; with checkpoint=path it goes on from what was done",
        )
    return ServerError.saying(text, f"{host} raised an error on {name}: {_last(text)}\n\n{text.strip()}\n\n")


def fault(what: tuple[str, str, str], host: str, name: str) -> RemoteError:
    """The error for an exception, which was none of mechkit's, in the code that was sent: class, text, traceback."""
    kind, text, trace = what
    fix = ""
    if kind == "ImportError" and "is not installed where" in text:
        fix = "This analysis needs it there; an own NDIF can have it installed"
    return ServerError.saying(trace, f"On {host}, {name}: {kind}: {text}\n\n{trace.strip()}\n\n", fix=fix)


def _unreachable(text: str, host: str) -> RemoteError:
    return UnreachableError.saying(
        text,
        f"{host} does not answer: {_first(text)}",
        expected="a running NDIF",
        fix="Check the address and the network; mk.remote.status() asks it how it is",
    )


def _first(text: str) -> str:
    return (text.strip() or "it said nothing").splitlines()[0]


def _last(text: str) -> str:
    return (text.strip() or "it said nothing").splitlines()[-1].strip()
