"""What /metrics shows after requests of every outcome."""

import re
from contextlib import suppress
from typing import Any

import httpx
import pytest

from protocol.errors import NoWorkerAvailable, ServingError
from server import metrics
from server.app import create_app
from server.settings import GatewaySettings
from tests.support.generator import ScriptedGenerator
from tests.support.http_server import eventually, serve
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def shown(generator: ScriptedGenerator, *, body: dict[str, Any] = BODY) -> dict[str, float]:
    """Every sample on /metrics after one chat request, by name and labels."""
    app = create_app(generator, TEXT, GatewaySettings())
    with serve(app) as url, httpx.Client(base_url=url, timeout=0.5) as client:
        with suppress(httpx.ReadTimeout, httpx.RemoteProtocolError):
            client.post(CHAT, json=body)
        assert eventually(lambda: generator.opened == generator.closed)
        text = client.get("/metrics").text
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


@pytest.mark.parametrize(
    ("outcome", "generator", "fields"),
    [
        ("ok", ScriptedGenerator(text=TEXT), {}),
        ("client_error", ScriptedGenerator(text=TEXT), {"n": 0}),
        (
            "overloaded",
            ScriptedGenerator(text=TEXT, fail_at=0, error=NoWorkerAvailable("none")),
            {},
        ),
        ("server_error", ScriptedGenerator(text=TEXT, fail_at=0, error=ServingError("x")), {}),
        ("server_error", ScriptedGenerator(text=TEXT, fail_at=3), {"stream": True}),
        ("disconnected", ScriptedGenerator(text=TEXT, block_at=0), {"stream": True}),
    ],
    ids=["ok", "client error", "overloaded", "server error", "broken stream", "disconnected"],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_every_request_is_counted_by_its_outcome(
    outcome: str, generator: ScriptedGenerator, fields: dict[str, Any]
) -> None:
    generator.opened = generator.closed = 0
    samples = shown(generator, body=BODY | fields)
    name = f'headrace_http_requests_total{{endpoint="chat",outcome="{outcome}"}}'
    assert samples[name] == 1
    assert samples['headrace_http_requests_in_flight{endpoint="chat"}'] == 0


def test_tokens_and_latencies_are_counted_once() -> None:
    samples = shown(ScriptedGenerator(text=TEXT, cached_tokens=16))
    tokens = len("Hello, wörld 🙂!".encode()) + 1
    assert samples["headrace_completion_tokens_total"] == tokens
    assert samples["headrace_cached_prompt_tokens_total"] == 16
    assert samples["headrace_time_to_first_token_seconds_count"] == 1
    assert samples["headrace_inter_token_latency_seconds_count"] == tokens - 1


def test_the_table_of_names_is_complete() -> None:
    samples = shown(ScriptedGenerator(text=TEXT))
    suffixes = r"(_bucket|_count|_sum|_created)?(\{.*)?\Z"
    names = {re.sub(suffixes, "", name) for name in samples}
    names = {re.sub(r"_total\Z", "", name) for name in names}
    listed = set(
        re.findall(r"^    (headrace_\w+?)(?:_total)?(?:\{|\s)", metrics.__doc__ or "", re.M)
    )
    assert names == listed
