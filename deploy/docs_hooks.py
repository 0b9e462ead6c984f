"""What mkdocs is told of this repository: pages from its root, and links to files of code.

A link that leaves docs/ becomes the file's path, since the site has pages only. One to a file that
does not exist fails the build.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie at the root of the repository."""
    for name, page in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links as the site has them."""
    source = page.file.src_uri
    name = {page: name for name, page in FROM_ROOT.items()}.get(source, f"docs/{source}")

    def on_site(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        if not (ROOT / target).exists():
            raise PluginError(f"{name}: no file {target}")
        if target in FROM_ROOT:
            uri = FROM_ROOT[target]
        elif target == "docs/decisions":
            uri = "decisions/README.md"
        elif target.startswith("docs/"):
            uri = target.removeprefix("docs/")
        else:
            return f"{text} (`{target}`)" if text != target else f"`{target}`"
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(source) or '.')}{anchor})"

    return _LINK.sub(on_site, markdown)
