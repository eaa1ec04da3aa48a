"""What every live view has besides its own state: a picture, a sentence, and a page that needs no kernel.

1. A notebook gets the widget, and beside it ``image/png`` and ``text/plain``, which remain when there is no kernel, or
   when the page is not trusted.
2. ``to_html`` puts the same JavaScript, and the state that it reads, into one file. Bytes are deflated and written in
   base64; nothing is fetched from anywhere.
"""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import jinja2

from ..results import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATIC = Path(__file__).parent / "static"
_IMPORT = re.compile(r"^import \{[^}]*\} from \"\./[\w.]+\";\n", re.MULTILINE)


def script(*names: str) -> str:
    """Modules of ``static/`` as one, in this order: a host loads one text, and a page nothing from beside it."""
    return "\n".join(_IMPORT.sub("", (STATIC / name).read_text(encoding="utf-8")) for name in names)


class LiveView(anywidget.AnyWidget):
    """A widget with a picture, a sentence and a page.

    Subclasses have ``_esm`` and ``_css``, as text, ``_exported``, the names of the traits that a page reads, and what
    is named below.
    """

    _exported: tuple[str, ...] = ()

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

    def _for_page(self, name: str) -> Any:
        """What a page gets of a trait."""
        return getattr(self, name)

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """One page that needs no kernel and no network: all but live edits work in it.

        Args:
            path: a file to write, whole or not at all; left out: the page is given as text.

        Raises:
            StorageError: the place cannot be written.
        """
        traits: dict[str, Any] = {}
        buffers: dict[str, str] = {}
        for name in self._exported:
            value = self._for_page(name)
            if isinstance(value, bytes):
                buffers[name] = base64.b64encode(zlib.compress(value, 9)).decode()
            else:
                traits[name] = value
        state = json.dumps({"traits": traits, "buffers": buffers}).replace("</", "<\\/")
        template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(
            (STATIC / "page.html").read_text(encoding="utf-8")
        )
        page = template.render(
            title=escape(self.title), text=escape(self.sentence()), css=self._css, code=self._esm, state=state
        )
        if path is None:
            return page
        return write_whole(Path(path), lambda target: target.write_text(page, encoding="utf-8"))

    def _repr_mimebundle_(self, **options: Any) -> Any:
        made = super()._repr_mimebundle_(**options)
        if made is None:
            return None
        data, metadata = made if isinstance(made, tuple) else (made, {})
        with io.BytesIO() as buffer:
            self.picture().savefig(buffer, format="png", dpi=100)
            png = base64.b64encode(buffer.getvalue()).decode()
        return {**data, "image/png": png, "text/plain": self.sentence()}, metadata

    def __repr__(self) -> str:
        return self.sentence()
