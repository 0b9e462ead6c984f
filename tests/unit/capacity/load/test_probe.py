"""What is said of a server that cannot be measured, before any load."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from capacity.load import probe as probing
from capacity.load.address import parse_address, resolve
from capacity.load.api import Api
from capacity.load.errors import ServerUnusable
from capacity.load.probe import probe

pytestmark = pytest.mark.anyio
CHAT = Api(endpoint="chat", model="")


@asynccontextmanager
async def a_server_that_says(answer: bytes) -> AsyncGenerator[str]:
    """To every request; nothing at all if ``answer`` is empty."""
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(65_536):  # else somebody only looked whether the port is open
            writer.write(answer)
            await (gone.wait() if not answer else writer.drain())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        gone.set()
        server.close()


async def why_not(url: str, wanted: Api = CHAT) -> str:
    with pytest.raises(ServerUnusable) as refused:
        await probe(resolve(parse_address(url)), wanted, with_nonce=False)
    return str(refused.value)


async def test_a_list_of_models_is_not_waited_for_as_long_as_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probing, "_LIST_WITHIN_S", 0.2)
    async with a_server_that_says(b"") as url:
        assert await why_not(url) == f"{url}: timeout: no complete answer within 0.2 s"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", "wants an API key (http 401)"),
        (b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n", "lists no model (http 404)"),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{"', "lists no model (http 200)"),
        (b"\x15\x03\x01\x00\x02\x02\x46", "is it an https URL"),
    ],
)
async def test_what_is_no_such_server_is_named(answer: bytes, why: str) -> None:
    async with a_server_that_says(answer) as url:
        assert why in await why_not(url)


async def test_a_model_that_is_not_there_is_refused_with_those_that_are() -> None:
    models = b'{"data": [{"id": "a"}, {"id": "b"}]}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(models), models)
    async with a_server_that_says(answer) as url:
        said = await why_not(url, Api(endpoint="chat", model="c"))
    assert said == f"no model 'c' at {url}; it has a, b"


async def test_a_server_that_fails_is_quoted() -> None:
    answer = b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n"
    async with a_server_that_says(answer) as url:
        assert "/v1/chat/completions: http 500" in await why_not(
            url, Api(endpoint="chat", model="c")
        )
