"""``headrace top``: the status page in a terminal, from the same data.

On a terminal it redraws one screen until Ctrl-C; elsewhere it prints a line of figures at each
look, for logs. A gateway that stops answering is asked again.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
from rich.console import Console
from rich.live import Live

from deploy.exits import DONE, FAILED
from deploy.top_screen import figures_line, heading_line, printable, screen
from protocol.errors import ConfigError
from server.page.data import FORMAT, Status

LEAST_INTERVAL_S = 0.2
LINES_PER_HEADING = 20


def top(chosen: argparse.Namespace) -> int:
    """Run until Ctrl-C, or print once with ``--json``; failed when the first look finds no gateway.

    Raises:
        ConfigError: an option cannot be used.
    """
    if not chosen.interval >= LEAST_INTERVAL_S:
        raise ConfigError(f"--interval must be at least {LEAST_INTERVAL_S} seconds")
    if not chosen.timeout > 0:
        raise ConfigError("--timeout must be positive")
    url = chosen.url.rstrip("/")
    headers = key_headers(chosen.api_key_file)
    with httpx.Client(timeout=chosen.timeout, trust_env=False, headers=headers) as client:
        try:
            first = fetch(client, url)
            if chosen.json:
                print(first.decode())
                return DONE
            status = read(first)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            print(f"headrace: no status from {url}: {error}", file=sys.stderr)
            return FAILED
        looks = look(client, url, status, interval_s=chosen.interval)
        try:
            if sys.stdout.isatty():
                _redraw(url, looks)
            else:
                _print_lines(looks)
        except KeyboardInterrupt:
            pass
    return DONE


def key_headers(file: Path | None) -> dict[str, str]:
    """
    Raises:
        ConfigError: there is no key in the file.
    """
    if file is None:
        return {}
    try:
        return {"authorization": f"Bearer {file.read_text(encoding='utf-8').split()[0]}"}
    except (OSError, UnicodeDecodeError, IndexError):
        raise ConfigError(f"--api-key-file: no API key in {file}") from None


def fetch(client: httpx.Client, url: str) -> bytes:
    """
    Raises:
        HTTPError: nobody answers, or not in time.
        ValueError: the answer is a refusal.
    """
    answer = client.get(f"{url}/status")
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise ValueError("it asks for an API key: give --api-key-file")
    if not answer.is_success:
        raise ValueError(f"it answers {answer.status_code}")
    return answer.content


def read(content: bytes) -> Status:
    """
    Raises:
        ValueError: this is not the status of a gateway, or one of another version.
    """
    try:
        status = msgspec.json.decode(content, type=Status)
    except msgspec.MsgspecError as error:
        raise ValueError(f"this is not the status of a gateway of headrace: {error}") from error
    if status.format != FORMAT:
        raise ValueError(f"its status has format {status.format}, this command reads {FORMAT}")
    return status


def look(
    client: httpx.Client, url: str, first: Status, *, interval_s: float
) -> Iterator[tuple[Status, str]]:
    """The status again and again, and why there is none newer where there is not."""
    status, trouble = first, ""
    while True:
        yield status, trouble
        time.sleep(interval_s)
        try:
            status, trouble = read(fetch(client, url)), ""
        except (httpx.HTTPError, ValueError) as error:
            trouble = f"no answer: {error}"


def _redraw(url: str, looks: Iterator[tuple[Status, str]]) -> None:
    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for status, trouble in looks:
            live.update(screen(status, url=url, trouble=trouble, rows=console.height), refresh=True)


def _print_lines(looks: Iterator[tuple[Status, str]]) -> None:
    for number, (status, trouble) in enumerate(looks):
        if number % LINES_PER_HEADING == 0:
            print(heading_line())
        print(printable(trouble) if trouble else figures_line(status), flush=True)
