"""What is sent: a function's name, its arguments, and what comes back, as bytes.

1. A model is not sent. Where it stands among the arguments, the one there takes its place, and the other way round.
2. Functions and classes of mechkit go by name. What the user defined, such as a metric, goes as its source, since
   compiled code is read by one version of Python alone; nnsight does that.
3. Tensors come back on the CPU, wherever they were made.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
from nnsight.intervention.serialization import CustomCloudPickler, CustomCloudUnpickler
from torch import Tensor

_MODEL = "mechkit.model"


def sendable(thing: Any) -> bytes:
    """As ``packed``, with what is only on this machine, such as modules that are not installed, sent whole.

    Raises:
        TypeError, pickle.PicklingError, AttributeError: as of ``packed``.
    """
    from nnsight.ndif import pull_env

    pull_env()
    return packed(thing)


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
    return CustomCloudUnpickler(io.BytesIO(content), {_MODEL: model}).load()


class _Packer(CustomCloudPickler):
    def persistent_id(self, obj: Any) -> Any:
        from ..model import Model

        return _MODEL if isinstance(obj, Model) else super().persistent_id(obj)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            # A part of a tensor is sent without the rest of it.
            part = obj.untyped_storage().nbytes() > obj.numel() * obj.element_size()
            if obj.device.type != "cpu" or part:
                return _same, (obj.detach().cpu().clone(),)
        return super().reducer_override(obj)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def address(function: Callable[..., Any]) -> str:
    """The name by which a function is found: ``mechkit.patching.sweep:sweep``."""
    return f"{function.__module__}:{function.__qualname__}"
