"""What is run first where the model is: it makes mechkit importable there, and hands over.

This file is sent as text and executed there, so it stands by itself.

1. mechkit's source was sent as a zip file. It is imported from its files, unless the same was imported before.
2. Of the packages that mechkit uses for tables and figures, a server may have none. They are stood in for while mechkit
   is imported: they may be named, not used.
3. Nothing of this is left in the way of others: the path and the stand-ins are taken away again.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import pickle
import sys
import tempfile
import zipfile
from types import ModuleType
from typing import Any

_NAMED = "pandas scipy matplotlib pyarrow rich jinja2 platformdirs filelock psutil transformer_lens anywidget".split()


class _Absent(ModuleType):
    """A package that is not installed here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ImportError(f"{self.__name__} is not installed where the model runs")


class _Finder:
    """Gives stand-ins for what is not installed."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> Any:
        if name.split(".")[0] not in _NAMED:
            return None
        return importlib.util.spec_from_loader(name, _Finder, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: Any) -> ModuleType:
        return _Absent(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        module.__path__ = []


def answer(there: Any, request: bytes) -> bytes:
    """Answer a request.

    Args:
        there: the model, as nnsight hands it out.
        request: the digest of mechkit's source, the source, and what ``mechkit.remote.there`` is given; pickled. The
            source is empty where it was sent before.

    Returns:
        The answer; of a source that is not known here, nothing, and it is asked for by that.
    """
    digest, source, body = pickle.loads(request)
    known = sys.modules.get("mechkit")
    if known is not None and not hasattr(known, "_sent"):  # the one who sends and the one who answers are one
        return importlib.import_module("mechkit.remote.there").answered(there, body)
    if getattr(known, "_sent", None) != digest:
        if not source:
            return b""
        for name in [name for name in sys.modules if name.split(".")[0] == "mechkit"]:
            del sys.modules[name]
        path = tempfile.mkdtemp(prefix="mechkit-")
        with zipfile.ZipFile(io.BytesIO(source)) as archive:
            archive.extractall(path)  # as files: nnsight reads the source of what it runs
    else:
        path = known._path  # type: ignore[union-attr]
    before = set(sys.modules)
    sys.path.insert(0, path)
    sys.meta_path.append(_Finder)  # type: ignore[arg-type]
    try:
        package: Any = importlib.import_module("mechkit")
        package._sent, package._path = digest, path
        return importlib.import_module("mechkit.remote.there").answered(there, body)
    finally:
        sys.path.remove(path)
        sys.meta_path.remove(_Finder)  # type: ignore[arg-type]
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _Absent):
                del sys.modules[name]
