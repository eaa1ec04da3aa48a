"""Where the model is: a request is opened, its function called with the model there, and the answer packed.

1. The model as nnsight holds it is one of the Hub; with the names that were sent, the engine runs on it as it is. What
   it was tried out for is remembered as long as the process lives. Where the service keeps code apart from the weights,
   the backend of ``envoys`` takes the engine's place.
2. Attention is computed step by step while a request runs, so that patterns can be seen; afterwards as before.
3. How far the work is, is printed; the service passes printed lines on to the one who waits.
4. Work that keeps what is done is stopped after some seconds; what it kept is sent back, and sent here again.
5. An error of mechkit is sent back as it is; of another, its traceback.
"""

from __future__ import annotations

import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..backends.anatomy import Anatomy
from ..backends.envoys import EnvoyBackend
from ..backends.plain import plain_backend
from ..errors import MechkitError, MechkitWarning, StorageError
from ..library import eager
from ..model import Model
from ..progress import Listener, listened_to
from .parcel import packed, unpacked

PROGRESS = "mechkit:progress"
_BROKEN = ("device-side assert triggered", "an illegal memory access was encountered")  # nothing runs any more
_READ = ("eos_token_id", "repetition_penalty", "logit_scale", "logits_scaling", "final_logit_softcapping")


@dataclass(frozen=True)
class Request:
    """What is to be done.

    Attributes:
        function: its address.
        given: arguments and options, packed.
        name: what the model is called.
        source: where its weights came from, for provenance.
        parts: where its parts are.
        checkpoint: what was kept so far; None: this work keeps nothing.
        seconds: after which to stop, for work that keeps what is done.
        keeps: the one who asks keeps it in a file, and wants it at the end too.
        here: the one who asks is on this machine, and sees the work's own bar.
        errand: is given back with the answer, as it is.
        config: what is read of the Hub's configuration; see ``read_of``.
    """

    function: str
    given: bytes
    name: str
    source: Mapping[str, Any]
    parts: Anatomy
    checkpoint: bytes | None = None
    seconds: float | None = None
    keeps: bool = False
    here: bool = False
    errand: bytes = b""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came of it.

    Attributes:
        result: what the function gave, packed; None where it raised.
        error: mechkit's own.
        fault: class and text of another error, and its traceback.
        checkpoint: what was kept.
        stopped: it was not finished; see ``Request.seconds``.
        warned: mechkit's warnings.
        about: device and dtype of the model there.
        errand: of the request.
    """

    result: bytes | None = None
    error: MechkitError | None = None
    fault: tuple[str, str, str] | None = None
    checkpoint: bytes | None = None
    stopped: bool = False
    warned: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    errand: bytes = b""


def answered(there: Any, body: bytes) -> bytes:
    """Answer a request; see the module."""
    errand = b""
    try:
        request: Request = unpacked(body, None)
        errand = request.errand
        hf: Any = there._module
        # Whether this is not the process that has the weights.
        apart = bool(hf is None or next(hf.parameters()).is_meta)
        # Whatever precision the service lets code compute in, the engine chooses its own.
        device = "cpu" if apart else str(getattr(hf, "device", "cpu")).split(":")[0]
        precise: Any = torch.autocast("cuda" if torch.cuda.is_available() else device, enabled=False)
        stepwise: Any = nullcontext() if apart else eager(hf, _attention(hf))
        with precise, stepwise, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", MechkitWarning)
            model = _apart(there, request) if apart else _model(hf, there, request)
            answer = _done(request, model)
        texts = tuple(str(one.message) for one in warned if issubclass(one.category, MechkitWarning))
        return packed(replace(answer, warned=texts, errand=errand))
    except MechkitError as error:
        return packed(Answer(error=error, errand=errand))
    except Exception as error:
        if any(one in str(error) for one in _BROKEN):
            raise  # the service then starts the process anew
        return packed(Answer(fault=(type(error).__name__, str(error), traceback.format_exc()), errand=errand))


def _attention(hf: Any) -> str:
    """The service's own way of computing attention: a request that was cut off may not have put it back yet."""
    return vars(hf).setdefault("_mechkit_attention", hf.config._attn_implementation)


def _done(request: Request, model: Model) -> Answer:
    args, options = unpacked(request.given, model)
    module, _, name = request.function.partition(":")
    function: Callable[..., Any] = attrgetter(name)(import_module(module))
    about = {"device": model.info.device, "dtype": model.info.dtype}
    listener = Listener(_report)
    folder: Any = nullcontext()
    if request.checkpoint is not None:
        folder = tempfile.TemporaryDirectory(prefix="mechkit-")
        listener.until = None if request.seconds is None else time.monotonic() + request.seconds
    listening: Any = nullcontext() if request.here else listened_to(listener)
    with folder as place, listening:
        kept = None if place is None else Path(place) / "checkpoint.npz"
        if kept is not None:
            if request.checkpoint:
                kept.write_bytes(request.checkpoint)
            options = {**options, "checkpoint": kept}
        try:
            result = function(*args, **options)
        except StorageError as error:
            given = error.given.replace(str(kept), "What was given as checkpoint")
            raise StorageError(given, expected=error.expected, fix=error.fix) from None
        wanted = kept is not None and kept.exists() and (listener.stopped or request.keeps)
        state = kept.read_bytes() if kept is not None and wanted else None
    return Answer(packed(result), checkpoint=state, stopped=listener.stopped, about=about)


def _report(what: str, done: int, total: int) -> None:
    print(f"{PROGRESS} {done} {total} {what}", flush=True)


def _apart(there: Any, request: Request) -> Model:
    backend = EnvoyBackend(there, request.parts, request.name, SimpleNamespace(**request.config))
    return Model(backend, getattr(there, "tokenizer", None), request.source)


def read_of(config: Any, generation: Any = None) -> dict[str, Any]:
    """What is read of the Hub's configurations, of a model and of how it generates: names and numbers alone."""
    found = {name: getattr(config, name, None) for name in _READ}
    for name in ("eos_token_id", "repetition_penalty"):
        if getattr(generation, name, None) is not None:
            found[name] = getattr(generation, name)
    return found | {"architectures": getattr(config, "architectures", None)}


def _model(hf: Any, there: Any, request: Request) -> Model:
    """The model there, made once for as long as its weights stay where they are.

    It is kept on the Hub's module itself, and goes with it.
    """
    places = tuple((str(one.device), one.data_ptr()) for one in hf.parameters())
    key = (request.name, str(request.source), request.parts.points, request.parts.modules, places)
    known = vars(hf).get("_mechkit")
    if known is None or known[0] != key:
        backend = plain_backend(hf, request.parts, request.name)
        known = key, Model(backend, getattr(there, "tokenizer", None), request.source)
        vars(hf)["_mechkit"] = known
    return known[1]
