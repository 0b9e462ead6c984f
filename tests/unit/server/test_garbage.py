"""What a request was is freed when it ends, and not by the collector, which stops every stream."""

import gc
import json
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from tests.support.arithmetic import MODEL
from tests.support.gateway import a_gateway, a_writer
from tests.support.system import a_system
from tests.support.workers import Pace

pytestmark = pytest.mark.anyio
OURS = {"server", "protocol", "uvicorn", "starlette"}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize(
    ("path", "body", "leaves"),
    [
        pytest.param(CHAT, {"messages": MESSAGES, "stream": True}, False, id="stream"),
        pytest.param(CHAT, {"messages": MESSAGES, "stream": True}, True, id="hang-up"),
        pytest.param(CHAT, {"messages": MESSAGES}, False, id="whole"),
        pytest.param(CHAT, {"messages": MESSAGES}, True, id="whole-hang-up"),
        pytest.param(TEXT, {"prompt": "Hi", "n": 2, "stream": True}, False, id="choices"),
        pytest.param(TEXT, {"prompt": "Hi", "logprobs": 1, "stream": True}, False, id="logprobs"),
        pytest.param(TEXT, {"prompt": "Hi", "stop": "a", "stream": True}, False, id="stop"),
        pytest.param(RESPONSES, {"input": "Hi", "stream": True, "store": False}, False, id="resp"),
        pytest.param("/v1/messages", {"messages": MESSAGES, "stream": True}, False, id="messages"),
        pytest.param(CHAT, {"messages": []}, False, id="refused"),
        pytest.param("/v1/none", {}, False, id="unknown"),
    ],
)
async def test_a_request_leaves_nothing_to_the_collector(
    path: str, body: dict[str, Any], leaves: bool
) -> None:
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    request = json.dumps({"model": MODEL, limit: 20} | body).encode()
    pace = Pace(first_token_s=0.002, step_s=0.002)
    async with (
        a_system(pace=pace, writer=a_writer()) as system,
        a_gateway(system) as (port, _),
    ):
        await ask(port, path, request, leaves=leaves)  # what is made once is there now
        await system.idle()
        with garbage() as found:
            for _ in range(5):
                await ask(port, path, request, leaves=leaves)
            await system.idle()
            await anyio.sleep(0.05)  # the loop's own turn at what has ended
        assert found == Counter()


async def ask(port: int, path: str, request: bytes, *, leaves: bool) -> None:
    async with await anyio.connect_tcp("127.0.0.1", port) as client:
        await client.send(
            b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (path.encode(), len(request), request)
        )
        if leaves:
            await anyio.sleep(0.01)
            return
        received = b""
        async for part in client:
            received += part
        assert received.startswith(b"HTTP/1.1 ")


@contextmanager
def garbage() -> Generator[Counter[str]]:
    """By type, what was unreachable and not freed at the end of the block."""
    gc.collect()
    gc.disable()
    found: Counter[str] = Counter()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        for kind in map(type, gc.garbage):
            if kind.__module__.split(".")[0] in OURS:
                found[f"{kind.__module__}.{kind.__qualname__}"] += 1
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
