"""The status page in a real browser, over a gateway whose worker has a hostile name."""

import html
import shutil
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
import uvicorn
from anyio import to_thread

from server.app import create_app
from server.exchange import exchange_protocol
from server.settings import GatewaySettings
from tests.support.arithmetic import a_request
from tests.support.model_text import byte_model_text
from tests.support.polling import eventually
from tests.support.system import System, a_system
from tests.support.workers import SimulatedPrefill

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = '<img src=x onerror="document.title=1"></td><script>document.title=2</script>'
LOADING_MS = 8000  # of the page's own clock
BROWSER_S = 100.0

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]


@asynccontextmanager
async def a_gateway(system: System, *, api_keys_file: Path | None = None) -> AsyncGenerator[str]:
    """The URL of an HTTP server before the system, with the status page."""
    async with anyio.create_task_group() as tasks:
        app = create_app(
            system.serving,
            byte_model_text(),
            GatewaySettings(api_keys_file=api_keys_file),
            tasks=tasks,
            cluster=system.serving.cluster,
        )
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_config=None, lifespan="off", http=exchange_protocol())
        )
        tasks.start_soon(server.serve)
        await eventually(lambda: server.started, "the server")
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.should_exit = True
            await eventually(lambda: not server.servers[0].is_serving(), "the server's end")
            tasks.cancel_scope.cancel()


async def page_at(url: str, profile: Path) -> tuple[str, str]:
    """The page's elements after its scripts have run for a while, and the browser's log."""
    assert BROWSER is not None
    command = [
        BROWSER,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={profile}", "--enable-logging=stderr", "--log-level=0"),
        *(f"--virtual-time-budget={LOADING_MS}", "--dump-dom", url),
    ]
    ended = await to_thread.run_sync(
        lambda: subprocess.run(command, capture_output=True, timeout=BROWSER_S, check=True)
    )
    return ended.stdout.decode(), ended.stderr.decode()


async def test_a_browser_shows_names_as_text_and_the_policy_has_nothing_to_refuse(
    tmp_path: Path,
) -> None:
    async with a_system(ranks=2) as system, a_gateway(system) as url:
        await system.add(SimulatedPrefill(HOSTILE, fabric=system.fabric))
        await system.ready(pairs=2)
        request = a_request(max_tokens=6)
        await system.tokens(request)
        elements, log = await page_at(url, tmp_path / "profile")
    assert html.escape(HOSTILE, quote=False) in elements
    assert "<img" not in elements
    assert elements.count("<script") == 1
    assert "<title>headrace</title>" in elements
    assert request.request_id[:8] in elements
    assert "decode-0/1" in elements
    assert "ready" in elements
    for complaint in (
        "Content Security Policy",
        "Content-Security-Policy",
        "Uncaught",
        "TypeError",
    ):
        assert complaint not in log, log


async def test_a_browser_without_the_key_is_asked_for_it_and_shows_nothing(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    async with a_system() as system, a_gateway(system, api_keys_file=file) as url:
        elements, log = await page_at(url, tmp_path / "profile")
    assert '<form id="key-form">' in elements  # no longer hidden
    assert 'id="main" hidden' in elements
    assert "prefill-0" not in elements
    assert "Uncaught" not in log, log
