"""A model that is not loaded: its configuration and tokenizer here, the way to it, and the names of its parts.

1. ``remote=True`` is NDIF as nnsight is configured for it, an address is an NDIF of one's own. A service knows a model
   by its name on the Hub, or by a folder that it can read under the same path.
2. ``remote="local"`` is this machine: what would be sent is made, read back without what is only here, and run on a
   model that is loaded. It shows before anything is sent whether it can be sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..backends.anatomy import anatomy
from ..backends.remote import RemoteBackend
from ..errors import LoadError, OptionError, first_line
from ..library import quiet_library
from ..model import Model
from ..packaged import PACKAGED, local_folder
from .line import Line
from .there import read_of


def load_remote(source: Any, remote: bool | str, dtype: str, revision: str | None) -> Model:
    """See ``mk.load``.

    Raises:
        OptionError: no such place.
        LoadError: no configuration of the model can be had.
        UnsupportedError: a family that TransformerLens does not know.
    """
    host = host_of(remote)
    if isinstance(source, tuple):
        raise LoadError(
            "An object that was made here, for a model that runs elsewhere",
            expected="a name on the Hub, or a folder that the server can read under the same path",
        )
    text = str(source)
    name = text if text in PACKAGED else Path(text).name if _is_folder(text) else text
    where = str(local_folder(PACKAGED[text])) if text in PACKAGED else text
    where = str(Path(where).expanduser().resolve()) if _is_folder(where) else where
    config, tokenizer = _described(where, revision)
    there, key = _there(where, tokenizer, revision, dtype if host is None else None)
    found = {"kind": "remote", "host": host or "local", "model": text, "revision": revision or "main"}
    family = type(there._module).__name__
    read = read_of(config, _generation(where, revision))
    backend = RemoteBackend(Line(there, host, name, key), anatomy(config, name), family, found, read)
    model = Model(backend, tokenizer, found)
    backend.model = model
    return model


def host_of(remote: bool | str) -> str | None:
    """Address of the service; None: this machine."""
    if remote == "local":
        return None
    if isinstance(remote, str):
        if not remote.startswith(("http://", "https://")):
            raise OptionError(
                f"remote = {remote!r}", expected='True, "local", or an address such as "http://host:5001"'
            )
        return remote.rstrip("/")
    from nnsight import CONFIG

    return CONFIG.API.HOST.rstrip("/")


def _is_folder(text: str) -> bool:
    return Path(text).expanduser().is_dir() or text.startswith((".", "/", "~"))


def _described(where: str, revision: str | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    more = {} if revision is None else {"revision": revision}
    with quiet_library():
        try:
            config = AutoConfig.from_pretrained(where, **more)
        except (OSError, ValueError, KeyError) as error:
            raise LoadError(
                f"No configuration of {where!r} can be had: {first_line(error)}",
                expected="a name on the Hub, or a folder written by save_pretrained",
            ) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **more)
        except (OSError, ValueError, ImportError):
            return config, None  # enough where only token ids are used
    return config, tokenizer if tokenizer.vocab_size else None


def _generation(where: str, revision: str | None) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(where, revision=revision or "main")
    except (OSError, ValueError):
        return None  # it has none of its own


def _there(where: str, tokenizer: Any, revision: str | None, dtype: str | None) -> tuple[Any, str]:
    """nnsight's model and the service's name of it; with weights where a ``dtype`` is given."""
    import nnsight
    import torch
    from nnsight.modeling import huggingface

    with quiet_library():
        options: dict[str, Any] = {"revision": revision} if revision else {}
        if dtype is not None:
            from transformers import AutoModelForCausalLM

            hf = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **options).eval()
            return nnsight.TransformersModel(hf, tokenizer=tokenizer, task="text-generation"), ""
        there = nnsight.TransformersModel(where, tokenizer=tokenizer, task="text-generation", **options)
        if _is_folder(where):  # nnsight would ask the Hub for it
            huggingface._ID_CACHE[where] = where
        return there, there.to_model_key()
