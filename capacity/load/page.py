"""One HTML file that needs nothing else: styles, script and data are inside, and its policy forbids
loading anything.

Data comes from servers and files, so it is embedded as JSON with ``<`` escaped and only ever shown
as text.
"""

import html
import re
from importlib.resources import files
from typing import Any

import orjson

_FOLDER = files("capacity.load").joinpath("page")
_PLACE = re.compile(r"\{(title|subtitle|css|script|data)\}")


def render(*, title: str, subtitle: str, script: str, data: dict[str, Any]) -> str:
    """The page whose charts ``script``, a file of the folder ``page``, draws from ``data``."""
    encoded = orjson.dumps(data).decode().replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "css": _read("page.css"),
        "script": _read("charts.js") + _read(script),
        "data": encoded,
    }
    return _PLACE.sub(lambda place: parts[place[1]], _read("page.html"))


def _read(name: str) -> str:
    return _FOLDER.joinpath(name).read_text(encoding="utf-8")
