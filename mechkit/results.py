"""Tidy tables of scores, over sites or over edges, with their unit, uncertainty and provenance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd

from .errors import OptionError, RankingError, StorageError
from .sites import HeadSet, Site, site

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from typing_extensions import Self

    from .head_scores.agreement import Agreement
    from .view.scores_view import ScoresView
    from .view.widget import LiveView

_CSV_HEADER = "# mechkit scores: "
_AS_WRITTEN = {**dict.fromkeys(("site", "sender", "receiver", "source", "target", "token"), str), "head": "Int64"}


@dataclass(frozen=True, eq=False)
class Table:
    """A tidy table with its unit and provenance; what every analysis returns is one.

    Attributes:
        frame: a row a thing that was scored; its columns are told by each kind of table.
        unit: of ``score``.
        meta: model, revision, weights hash, task, seed, method, options, versions, seconds.
    """

    frame: pd.DataFrame
    unit: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    _things: ClassVar[str] = "rows"

    def top(self, k: int = 10, by: Literal["size", "positive", "negative"] = "size") -> pd.DataFrame:
        """The k rows with the largest, most positive or most negative scores.

        Raises:
            OptionError: ``by`` is none of the three.
            RankingError: too little was measured to rank anything.
        """
        self._check_ranked()
        keys = {"size": self.frame.score.abs(), "positive": self.frame.score, "negative": -self.frame.score}
        if by not in keys:
            raise OptionError(f"by = {by!r}", expected="one of " + ", ".join(keys))
        order = keys[by].sort_values(ascending=False, kind="stable").index[:k]
        return self.frame.loc[order].reset_index(drop=True)

    def auroc(self, truth: Iterable[Any], by: Literal["size", "signed"] = "size") -> float:
        """How well the scores tell the true nodes, or edges, from all others; see ``circuits.statistics.auroc``."""
        from .circuits.statistics import auroc

        return auroc(self, truth, by)  # type: ignore[arg-type]

    def save(self, path: str | Path) -> Path:
        """Write the table with its provenance, as ``.parquet`` or ``.csv``; whole or not at all.

        Raises:
            OptionError: another suffix.
            StorageError: the place cannot be written.
        """
        path = Path(path)
        extra = {"unit": self.unit, "meta": dict(self.meta)}
        if path.suffix not in (".parquet", ".csv"):
            raise OptionError(f"Suffix {path.suffix!r}", expected=".parquet or .csv")

        def write(target: Path) -> None:
            if path.suffix == ".parquet":
                table = self.frame.copy()
                table.attrs = {"mechkit": json.dumps(extra)}
                table.to_parquet(target, index=False)
            else:
                target.write_text(_CSV_HEADER + json.dumps(extra) + "\n" + self.frame.to_csv(index=False))

        return write_whole(path, write)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            StorageError: no such file, or one that holds no scores.
        """
        path = Path(path)
        try:
            if path.suffix == ".parquet":
                frame = pd.read_parquet(path)
                text = frame.attrs.pop("mechkit")
            else:
                with path.open() as file:
                    text = file.readline().removeprefix(_CSV_HEADER)
                    # Left to itself, pandas reads head "0.10" as the number 0.1.
                    frame = pd.read_csv(file, dtype=_AS_WRITTEN, keep_default_na=False, na_values=[""])
            extra = json.loads(text)
            return cls(frame, extra["unit"], extra["meta"])
        except (OSError, KeyError, ValueError) as error:
            raise StorageError(
                f"{path} could not be read as scores: {error}", expected="a file that Scores.save wrote"
            ) from error

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        head = f"{type(self).__name__} of {len(self)} {self._things}, in {self.unit} ({self.meta.get('method', '')})"
        if why := self.meta.get("unranked"):
            return f"{head}, not ranked: {why}"
        return head + "\n" + self.top(10).to_string(index=False)

    def _repr_html_(self) -> str:
        if why := self.meta.get("unranked"):
            return as_html(self.frame.head(10), f"The first of {len(self)} scores, in {self.unit}, not ranked: {why}")
        return as_html(self.top(10), f"The largest of {len(self)} scores, in {self.unit}")

    def _check_ranked(self) -> None:
        if why := self.meta.get("unranked"):
            raise RankingError(
                f"A ranking of the scores of {self.meta.get('method', 'this table')}: {why}",
                fix="Measure on more prompts, or on ones that the model can do; the numbers are in .frame",
            )


@dataclass(frozen=True, eq=False, repr=False)
class Scores(Table):
    """One score a site.

    Attributes:
        frame: a row a site: ``site``, ``layer``, ``head``, ``kind``, ``position`` where there is one, ``score``,
            ``metric`` (mean raw metric under the intervention), ``se`` (standard error of ``score``), ``n``. Of paths
            also ``sender``, which is the site, and ``receiver``.
        unit: of ``score``.
        meta: model, revision, weights hash, task, seed, method, options, versions, seconds.
    """

    _things: ClassVar[str] = "sites"

    def heads(self, k: int = 10) -> HeadSet:
        """The k heads with the largest scores in size, as a set.

        Raises:
            RankingError: the k-th is not larger than the next, or too little was measured to rank anything.
        """
        rows = self.frame[self.frame.kind == "z"]
        size = rows.set_index("site").score.abs().groupby(level=0, sort=False).max()
        size = size.sort_values(ascending=False, kind="stable")
        self._check_ranked()
        if 0 < k < len(size) and not size.iloc[k - 1] > size.iloc[k]:
            last = size.iloc[k - 1]
            alike = int((size == last).sum())
            raise RankingError(
                f"The {k} heads with the largest scores: "
                + (
                    f"{alike} heads have the same score, {last:.4g}, among them the last"
                    if alike
                    else "not so many have"
                ),
                expected=f"at most {int((size > last).sum()) if alike else int(size.notna().sum())} heads",
            )
        return HeadSet(list(size.index[:k]), self.meta.get("n_heads"))

    def ranked(self) -> list[Site]:
        """Every site, the largest score in size first.

        Raises:
            RankingError: too little was measured to rank anything.
        """
        self._check_ranked()
        order = self.frame.score.abs().sort_values(ascending=False, kind="stable").index
        return [site(text) for text in dict.fromkeys(self.frame.loc[order].site)]

    def compare(self, other: Scores, k: int = 10, seed: int = 0) -> Agreement:
        """How far two scores of the same heads agree: rank correlation and how many of the top k they share.

        Ranks are of scores with their signs, the top k of their sizes: where signs matter, they can tell two stories.

        Raises:
            OptionError: fewer than three sites in common, or k outside their number.
            RankingError: one of them ranks nothing.
        """
        from .head_scores.agreement import agreement

        return agreement(self, other, k, seed)

    def grid(self, kind: str | None = None) -> np.ndarray:
        """Scores as an array; what was not scored is NaN.

        Args:
            kind: ``"z"``, ``"pattern"``, ``"resid"`` ...; left out: whole heads, or the only kind there is.

        Returns:
            ``[layers, heads]`` of heads (groups, for shared keys and values), else ``[layers, positions]``, with
            one position where all were patched at once.

        Raises:
            OptionError: no scores of that kind, several kinds to choose from, or several positions a head.
        """
        rows = self.of_kind(kind).frame
        by_head = rows["head"].notna().all()
        placed = "position" in rows and not rows["position"].map(lambda where: isinstance(where, str)).any()
        column = rows["head"] if by_head else rows["position"] if placed else rows["layer"] * 0
        if rows.assign(column=column)[["layer", "column"]].duplicated().any():
            raise OptionError("Scores with several positions a head", fix="Take one position of .frame first")
        down, across = np.asarray(rows["layer"].clip(lower=0), int), np.asarray(column, int)
        whole_heads = by_head and not rows["site"].str.contains("kv").any()
        grid = np.full(
            (
                max(self.meta.get("n_layers", 0), down.max() + 1),
                max(self.meta.get("n_heads", 0) if whole_heads else 0, across.max() + 1),
            ),
            np.nan,
        )
        grid[down, across] = rows["score"]
        return grid

    def of_kind(self, kind: str | None = None) -> Scores:
        """The scores of one kind of site; left out: of whole heads, or of the only kind there is.

        Raises:
            OptionError: no scores of that kind, or several kinds to choose from.
        """
        kinds = list(dict.fromkeys(self.frame["kind"]))
        chosen = kind or ("z" if "z" in kinds else kinds[0] if len(kinds) == 1 else None)
        if chosen not in kinds:
            raise OptionError(f"kind = {kind!r}", expected="one of " + ", ".join(kinds))
        return replace(self, frame=self.frame[self.frame["kind"] == chosen].reset_index(drop=True))

    def plot(self, kind: str | None = None) -> Figure:
        """A map of the scores as a matplotlib figure: layers and heads, or layers and positions; see ``grid``."""
        from .view.figures import site_map

        return site_map(self.of_kind(kind))

    def show(self, kind: str | None = None, link: LiveView | Sequence[LiveView] = ()) -> ScoresView:
        """A live map of the scores: layers across, heads or positions down.

        Args:
            kind: of site, as in ``grid``.
            link: views that share what is chosen and in focus, such as ``mk.view.attention(...)``.

        Raises:
            OptionError: as of ``grid``; or no finite score.
        """
        from .view.scores_view import scores_view

        return scores_view(self, kind, link)


def as_html(table: pd.DataFrame, caption: str, precision: int = 3) -> str:
    """A table for notebooks, with numbers rounded for reading."""
    styled: Any = table.style.set_caption(caption)  # the Styler's stubs lose its type half-way
    return styled.hide(axis="index").format(precision=precision, na_rep="").to_html()


def write_whole(path: Path, write: Any) -> Path:
    """Call ``write(temporary_path)`` and put the result in place: whole or not at all.

    Raises:
        StorageError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}",
            fix="Choose another place, or make room there",
        ) from error
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None
    return path


def model_provenance(model: Any) -> dict[str, Any]:
    """What of a model a result must carry to be made again."""
    return {
        "model": model.name,
        "source": model.source,
        "weights": model.weights_hash,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "d_model": model.d_model,
        "versions": versions(),
        "device": model.info.device,
        "dtype": model.info.dtype,
    }


def versions() -> dict[str, str]:
    """Of mechkit, and of what it stands on."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "transformer-lens", "nnsight")
    return {"mechkit": version("mechkit-interp"), **{name: version(name) for name in packages}}


def provenance(model: Any, task: Any, method: str, seconds: float, **options: Any) -> dict[str, Any]:
    """What a result must carry to be made again."""
    return {
        **model_provenance(model),
        "task": {"name": task.name, "n": len(task), "metric": task.metric.name, "made": dict(task.meta)},
        "method": method,
        "options": options,
        "seconds": round(seconds, 2),
    }
