"""How a service is, before work is sent: which models it has up, and whether its versions fit those here."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pandas as pd

from ..errors import MechkitError, UnreachableError
from .faults import told

_STATES = {"RUNNING": "running", "DEPLOYING": "deploying", "NOT_STARTED": "deploying", "UNHEALTHY": "failing"}
_ORDER = ["running", "deploying", "cold", "failing", "unknown"]  # the best of several replicas counts
_MATTERS = {
    "nnsight": "requests are nnsight's; another minor version may not be read",
    "transformers": "the names of a model's modules, and how it computes, are its; numbers may differ",
    "torch": "small differences in numbers are to be expected from another version, no others",
    "python": "source is sent, not compiled code; it matters only where the server has less than 3.10",
}


def status(where: bool | str | Any = True, model: str | None = None) -> pd.DataFrame:
    """Which models a service has, and how they are.

    Args:
        where: True: NDIF as nnsight is configured for it; an address; or a model that was loaded with ``remote=``.
        model: only this one; a row is given of it even where the service does not know it.

    Returns:
        A row a model: ``model``, ``state`` (``running``; ``deploying``; ``cold``: known, and brought up by the first
        request; ``failing``; ``unknown``: a request may bring it up), ``replicas``, ``revision``, ``dtype``.

    Raises:
        UnreachableError: it does not answer.
    """
    host = _host(where)
    found: dict[str, dict[str, Any]] = {}
    for name, one in _get(host, "/status").get("deployments", {}).items():
        known = str(one.get("repo_id") or name)
        state = _STATES.get(str(one.get("application_state")), "cold")
        if one.get("deployment_level") not in ("HOT", "WARM", None):
            state = "cold"
        hot = one.get("deployment_level") == "HOT"
        row = found.setdefault(known, {"model": known, "state": state, "replicas": 0})
        row["state"] = min(row["state"], state, key=_ORDER.index)
        row["replicas"] += int(hot)
        row |= {"revision": one.get("revision") or "main", "dtype": one.get("dtype")}
    if model is not None:
        rows = [row for known, row in found.items() if known == model or known.rstrip("/").endswith("/" + model)]
        found = {row["model"]: row for row in rows} or {model: {"model": model, "state": "unknown", "replicas": 0}}
    columns = ["model", "state", "replicas", "revision", "dtype"]
    return pd.DataFrame(list(found.values()), columns=columns).sort_values("model", ignore_index=True)


def versions(where: bool | str | Any = True) -> pd.DataFrame:
    """What is installed here and where a model runs, and whether a difference matters.

    Args:
        where: as of ``status``.

    Returns:
        A row a package: ``package``, ``here``, ``there``, ``same``, ``matters``, a sentence where they differ.

    Raises:
        UnreachableError: it does not answer.
    """
    there = _get(_host(where), "/env")
    packages = {str(name).lower(): str(value) for name, value in (there.get("packages") or {}).items()}
    packages["python"] = str(there.get("python_version") or "unknown")
    rows = []
    for name, why in _MATTERS.items():
        here, other = _here(name), packages.get(name, "unknown").split()[0].split("+")[0]
        same = here == other
        rows.append({"package": name, "here": here, "there": other, "same": same, "matters": "" if same else why})
    return pd.DataFrame(rows)


def _here(name: str) -> str:
    if name == "python":
        return ".".join(map(str, sys.version_info[:3]))
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return "none"


def _host(where: Any) -> str:
    from .load import host_of

    if hasattr(where, "backend"):
        where = getattr(getattr(where.backend, "line", None), "host", "local")
    found = None if where == "here" else host_of(where)
    if found is None:
        raise UnreachableError("This machine is no service", expected="True, or an address")
    return found


def _get(host: str, path: str) -> dict[str, Any]:
    import httpx
    from nnsight import CONFIG

    headers = {"ndif-api-key": CONFIG.API.APIKEY} if CONFIG.API.APIKEY else None
    try:
        with told(host, "a model"):
            reply = httpx.get(host + path, headers=headers, timeout=httpx.Timeout(10.0, read=60.0))
            reply.raise_for_status()
            found = reply.json()
    except ValueError as error:
        if isinstance(error, MechkitError):
            raise
        raise UnreachableError(f"{host}{path} gives no status", expected="an NDIF") from error
    if not isinstance(found, dict):
        raise UnreachableError(f"{host}{path} gives no status", expected="an NDIF")
    return found
