"""What every live view has besides its own state: a picture, a sentence, a page that needs no kernel, and links.

1. A notebook gets the widget, and beside it ``image/png`` and ``text/plain``, which remain when there is no kernel, or
   when the page is not trusted.
2. ``to_html`` puts the same JavaScript, and the state that it reads, into one file (``page``).
3. Views that are linked (``linked``) share what is chosen, what is in focus and which token is locked, each as far as
   it knows them.
"""

from __future__ import annotations

import base64
import io
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import anywidget
import traitlets

from ..errors import MechkitError, SiteError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATIC = Path(__file__).parent / "static"
_IMPORT = re.compile(r"^import \{[^}]*\} from \"\./[\w.]+\";\n", re.MULTILINE)


def script(*names: str) -> str:
    """Modules of ``static/`` as one, in this order: a host loads one text, and a page nothing from beside it."""
    return "\n".join(_IMPORT.sub("", (STATIC / f"{name}.js").read_text(encoding="utf-8")) for name in names)


def style(*names: str) -> str:
    """Sheets of ``static/`` as one."""
    return "\n".join((STATIC / f"{name}.css").read_text(encoding="utf-8") for name in names)


class Linkable(Protocol):
    """What ``linked`` needs of a view."""

    _shared: ClassVar[dict[str, str]]
    selection: Any

    def _sites(self) -> Sequence[str]: ...

    def observe(self, handler: Any, names: Any = ...) -> None:
        """As of traitlets."""
        ...


class LiveView(anywidget.AnyWidget):
    """A widget with a picture, a sentence and a page.

    Subclasses have ``_esm`` and ``_css``, as text, and what is named below.

    Attributes:
        selection: what is chosen, as text; sites, a text of several, or a ``HeadSet`` can be assigned.
    """

    _exported: ClassVar[tuple[str, ...]] = ()  # the traits that a page reads
    _shared: ClassVar[dict[str, str]] = {"selection": "selection"}  # what linked views share: its name, the trait's

    _n_tokens: int = 0  # of the text, where there is one

    selection = traitlets.Any([]).tag(sync=True)

    if TYPE_CHECKING:  # what a subclass has
        _esm: str
        _css: str

        @property
        def title(self) -> str:
            """What stands above it."""
            ...

        def picture(self) -> Figure:
            """What is seen, as a matplotlib figure."""
            ...

        def sentence(self) -> str:
            """What is seen, in words."""
            ...

    def _sites(self) -> Sequence[str]:
        """What can be chosen, as text."""
        return ()

    def _read_chosen(self, chosen: Any) -> list[str]:
        """What was assigned to ``selection`` as text; here any sites that the view has."""
        return read_chosen(chosen, self._sites())

    @traitlets.validate("selection")
    def _valid_selection(self, proposal: Any) -> list[str]:
        return self._read_chosen(proposal["value"])

    def _for_page(self, name: str) -> Any:
        """What a page gets of a trait."""
        value = getattr(self, name)
        return {**value, "live": False} if name == "about" else value

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """One page that needs no kernel and no network: all but live edits work in it.

        Args:
            path: a file to write, whole or not at all; left out: the page is given as text.

        Raises:
            StorageError: the place cannot be written.
        """
        from .page import page

        return page(self.title, self.sentence(), [self], path)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return with_picture(super()._repr_mimebundle_(**options), self.picture(), self.sentence())

    def __repr__(self) -> str:
        return self.sentence()


def read_chosen(chosen: Any, sites: Sequence[str]) -> list[str]:
    """Sites as text, of a text, a ``HeadSet`` or several.

    Raises:
        SiteError: one that is not among ``sites``.
    """
    words = chosen.replace(",", " ").split() if isinstance(chosen, str) else [str(one) for one in chosen]
    known = {*sites}
    if missing := [one for one in words if one not in known]:
        raise SiteError(f'"{missing[0]}" in the view', expected="one of its sites: " + _some(sites))
    return list(dict.fromkeys(words))


def answer(run: Callable[[], dict[str, Any]], asked: int, kept: Mapping[str, Any]) -> dict[str, Any]:
    """What a run gave, for the page: the number of what was asked, and its seconds; or its error beside what is kept.

    mechkit's own errors say what to do; of others the kind is told too.
    """
    started = time.perf_counter()
    try:
        result = run()
    except Exception as error:  # whatever it is, the page must hear of it, or it would wait
        told = str(error) if isinstance(error, MechkitError) else f"{type(error).__name__}: {error}"
        result = {**kept, "error": told}
    return {**result, "answered": asked, "seconds": round(time.perf_counter() - started, 4)}


def with_picture(made: Any, picture: Figure, sentence: str) -> Any:
    """What a notebook keeps of a widget, with a picture and a sentence beside it."""
    if made is None:
        return None
    data, metadata = made if isinstance(made, tuple) else (made, {})
    with io.BytesIO() as buffer, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of an emoji or a script: a box stands for it
        picture.savefig(buffer, format="png", dpi=100)
        png = base64.b64encode(buffer.getvalue()).decode()
    return {**data, "image/png": png, "text/plain": sentence}, metadata


def linked(*views: LiveView | Linkable) -> None:
    """Let views share what is chosen, in focus and locked.

    Each takes what it knows. What it has chosen beside that, and the view that changed does not know, it keeps.
    """
    passing = False

    def follow(view: Any, shared: str) -> None:
        def pass_on(change: Any) -> None:
            nonlocal passing
            if passing:
                return
            passing = True
            try:
                for other in views:
                    if other is not view and shared in other._shared:
                        _give(other, view, shared, change["new"])
            finally:
                passing = False

        view.observe(pass_on, view._shared[shared])

    for view in views:
        for shared in view._shared:
            follow(view, shared)


def _give(view: Any, sender: Any, shared: str, value: Any) -> None:
    """Let a view take what another one has now."""
    name, known = view._shared[shared], {*view._sites()}
    if shared == "selection":
        theirs, own = {*sender._sites()}, view.selection
        value = [*(one for one in own if one not in theirs), *(one for one in value if one in known)]
        if {*value} == {*own}:
            return
    elif (shared == "focus" and value not in known) or (shared == "token" and value >= view._n_tokens):
        return
    setattr(view, name, value)


def linkable(link: Any) -> list[Any]:
    """What ``link=`` was given: a view, several, or an explorer, whose views they are."""
    return [link] if hasattr(link, "_shared") else list(link)


def _some(sites: Sequence[str], most: int = 8) -> str:
    return ", ".join(sites[:most]) + (" …" if len(sites) > most else "")
