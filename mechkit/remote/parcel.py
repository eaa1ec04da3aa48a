"""What is sent: a function's name, its arguments, and what comes back, as bytes.

1. A model is not sent. Where it stands among the arguments, the one there takes its place, and the other way round.
2. Functions and classes of mechkit go by name; what the user defined, such as a metric, goes whole (cloudpickle).
3. Tensors come back on the CPU, wherever they were made.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
from torch import Tensor

_MODEL = "mechkit.model"


def packed(thing: Any) -> bytes:
    """A thing as bytes, without the models in it.

    Raises:
        TypeError, pickle.PicklingError, AttributeError: it holds what cannot be sent, such as an open file.
    """
    # nnsight has what is not installed as a package sent whole, and mechkit may be a checkout.
    whole = {name for name in _PICKLE_BY_VALUE_MODULES if name.split(".")[0] == "mechkit"}
    _PICKLE_BY_VALUE_MODULES.difference_update(whole)
    try:
        with io.BytesIO() as out:
            _Packer(out).dump(thing)
            return out.getvalue()
    finally:
        _PICKLE_BY_VALUE_MODULES.update(whole)


def unpacked(content: bytes, model: Any) -> Any:
    """What bytes stand for, with this model in the place of those that were left out."""
    return _Unpacker(io.BytesIO(content), model).load()


class _Packer(cloudpickle.CloudPickler):
    def persistent_id(self, obj: Any) -> str | None:
        from ..model import Model

        return _MODEL if isinstance(obj, Model) else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            # A part of a tensor is sent without the rest of it.
            part = obj.untyped_storage().nbytes() > obj.numel() * obj.element_size()
            if obj.device.type != "cpu" or part:
                return _same, (obj.detach().cpu().clone(),)
        return super().reducer_override(obj)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, model: Any):
        super().__init__(file)
        self._model = model

    def persistent_load(self, pid: Any) -> Any:
        if pid != _MODEL:
            raise pickle.UnpicklingError(f"an unknown thing {pid!r}")
        return self._model


def address(function: Callable[..., Any]) -> str:
    """The name by which a function is found: ``mechkit.patching.sweep:sweep``."""
    return f"{function.__module__}:{function.__qualname__}"
