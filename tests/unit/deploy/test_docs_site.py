"""The documentation: references are up to date, no link is dead, nothing comes from outside."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from deploy.settings_reference import page
from protocol.errors import BY_CODE

ROOT = Path(__file__).parents[3]
PACKAGES = ("protocol", "runtime", "engine", "kvtransfer", "server", "prefill", "decode", "deploy")
LOADS = {("link", "href"), ("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src")}


class References(HTMLParser):
    """What a page links to, what it loads, and the names of its parts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.names: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.names.add(value)
            elif (tag, name) in LOADS and value:
                self.loads.add(value)
            elif (tag, name) == ("a", "href") and value:
                self.links.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def pages(site: Path) -> dict[Path, References]:
    return {file: References(file.read_text()) for file in site.rglob("*.html")}


def test_every_link_and_anchor_leads_somewhere(site: Path) -> None:
    known = pages(site)
    dead = []
    for file, references in known.items():
        if file.name == "404.html":  # its links are those of the server's root
            continue
        for link in references.links | references.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.is_file():
                dead.append((file.name, link))
            elif target in known and parts.fragment:
                names = known[target].names
                dead += [] if unquote(parts.fragment) in names else [(file.name, link)]
    assert len(known) > 20
    assert dead == []


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    loaded = {
        (file.name, link)
        for file, references in pages(site).items()
        for link in references.loads
        if urlsplit(link).netloc
    }
    styles = {
        (file.name, found)
        for file in site.rglob("*.css")
        for found in re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)", file.read_text())
    }
    assert loaded | styles == set()


def test_the_configuration_reference_is_up_to_date() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == page(), "run make docs"


def logged(text: str) -> Iterator[str]:
    """What a module logs as a warning or an error, in either branch of a choice."""
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in {"warning", "error", "exception"}
            and ast.unparse(node.func.value) in {"log", "_log"}
        ):
            choice = node.args[0]
            for said in (choice.body, choice.orelse) if isinstance(choice, ast.IfExp) else [choice]:
                yield str(ast.literal_eval(said))


def test_the_runbook_has_every_line_that_is_logged_as_a_warning_or_an_error() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    lines = {
        line
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for line in logged(file.read_text())
    }
    assert len(lines) > 15
    assert {line for line in lines if f"`{line}`" not in runbook} == set()


def test_the_runbook_has_every_alert_and_every_code_of_an_error() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert alerts
    assert {name for name in alerts | set(BY_CODE) if f"`{name}`" not in runbook} == set()
