"""Views as one page that needs no kernel and no network.

1. The page has each view's JavaScript and the state that it reads; bytes are deflated and written in base64.
2. In place of the notebook's model object there is a stand-in that keeps the state in the page.
3. Views that stand together share what is chosen, in focus and locked, as ``widget.linked`` has it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from ..results import write_whole
from .widget import STATIC

if TYPE_CHECKING:
    from .widget import LiveView


def page(title: str, text: str, views: Sequence[LiveView], path: str | Path | None = None) -> str | Path:
    """The page, or the path that it was written to.

    Args:
        title: of the page.
        text: what a reader without JavaScript gets.
        views: from top to bottom.
        path: a file to write, whole or not at all.

    Raises:
        StorageError: the place cannot be written.
    """
    codes = list(dict.fromkeys(view._esm for view in views))
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(
        (STATIC / "page.html").read_text(encoding="utf-8")
    )
    made = template.render(
        title=escape(title),
        text=escape(text),
        css="\n".join(dict.fromkeys(view._css for view in views)),
        codes=[code.replace("</script", "<\\/script") for code in codes],
        # No "<" at all: a token may be "</script>", or "<!--", after which the page would not end where it should.
        state=json.dumps([_state(view, codes.index(view._esm)) for view in views]).replace("<", "\\u003c"),
    )
    if path is None:
        return made
    return write_whole(Path(path), lambda target: target.write_text(made, encoding="utf-8"))


def _state(view: LiveView, code: int) -> dict[str, Any]:
    traits: dict[str, Any] = {}
    buffers: dict[str, str] = {}
    for name in view._exported:
        value = view._for_page(name)
        if isinstance(value, bytes):
            buffers[name] = base64.b64encode(zlib.compress(value, 9)).decode()
        else:
            traits[name] = value
    known = {"shared": view._shared, "sites": list(view._sites()), "tokens": view._n_tokens}
    return {"code": code, "traits": traits, "buffers": buffers, **known}
