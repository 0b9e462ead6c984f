"""The page's own files, and the headers that keep a browser from using any others.

They hold nothing of the cluster, so they are open to everyone: the page has to be there before it
can ask for a key. Invariant: what is served is one of the files listed here, as it was at start.
"""

from dataclasses import dataclass
from importlib.resources import files

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "main.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "tables.js": "text/javascript; charset=utf-8",
    "lines.js": "text/javascript; charset=utf-8",
    "experts.js": "text/javascript; charset=utf-8",
    "requests.js": "text/javascript; charset=utf-8",
}
PAGE = "/"
PAGE_PATHS = frozenset(PAGE if name == "index.html" else f"/page/{name}" for name in _TYPES)

# No inline script or style, nothing from or to another host, and no page may frame this one.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    content: bytes
    content_type: str


def page_files() -> dict[str, PageFile]:
    """By path."""
    folder = files("server.page") / "static"
    return {
        PAGE if name == "index.html" else f"/page/{name}": PageFile(
            (folder / name).read_bytes(), content_type
        )
        for name, content_type in _TYPES.items()
    }
