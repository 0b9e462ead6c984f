"""The plainest gateway in Python that does the work: what another machine's milliseconds are here.

A bare ASGI app in uvicorn that takes one ZeroMQ frame for each engine step of a rank, tokenises the
prompt, and detokenises each stream with the library's ``DecodeStream``. It checks nothing, counts
nothing and survives nothing. The bar of 12 ms comes from a machine on which such an app took
``ELSEWHERE_MS`` of CPU per 1000 tokens, in this pace and at these concurrencies; system calls cost
several times as much on others.

A second process stands for the workers; its CPU does not count.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, MutableMapping
from contextlib import contextmanager
from typing import Any

import msgspec
import orjson
import psutil
import uvicorn
import uvloop
import zmq
import zmq.asyncio
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from benchmarks.child import child, wait_for_port
from benchmarks.local_system import free_port
from deploy.demo import demo_weights
from runtime.collector import spare_the_collector
from server.text.loading import gguf_tokenizer

ELSEWHERE_MS = {64: 13.8, 256: 15.4}  # by concurrency
TOKEN_ID = 300  # the last of a stream; all that come before are text as well

Message = MutableMapping[str, Any]


class Prompt(msgspec.Struct, array_like=True):
    stream: int
    token_ids: list[int]
    max_tokens: int


class Token(msgspec.Struct, array_like=True):
    stream: int
    token_id: int
    last: bool


@contextmanager
def plain_process(
    port: int, *, first_token_s: float, step_s: float, ranks: int
) -> Generator[psutil.Process]:
    """The process whose CPU counts, listening at ``port``, with its workers."""
    bus = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    with (
        child(_serve, port, *bus) as process,
        child(_keep_pace, *bus, first_token_s, step_s, ranks),
    ):
        wait_for_port(port)
        yield process


def _serve(port: int, prompts: str, frames: str) -> None:
    spare_the_collector()
    uvloop.run(_serve_chats(port, prompts, frames))


async def _serve_chats(port: int, prompts: str, frames: str) -> None:
    app = PlainGateway(gguf_tokenizer(demo_weights()), prompts, frames)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=port, http="httptools", lifespan="off", log_level="warning"
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(app.read_frames())
        await uvicorn.Server(config).serve()


class PlainGateway:
    """Streams chat completions."""

    def __init__(self, tokenizer: Tokenizer, prompts: str, frames: str) -> None:
        self._tokenizer = tokenizer
        self._bus = zmq.asyncio.Context()
        self._prompts = self._bus.socket(zmq.PUSH)
        self._prompts.bind(prompts)
        self._frames = self._bus.socket(zmq.PULL)
        self._frames.bind(frames)
        self._streams: dict[int, asyncio.Queue[Token]] = {}
        self._asked = 0

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._events(orjson.loads(body)):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _events(self, chat: dict[str, Any]) -> AsyncGenerator[bytes]:
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat["messages"]]
        prompt = self._tokenizer.encode("".join(turns) + "<|im_start|>assistant\n")
        self._asked += 1
        stream = self._asked
        tokens = self._streams[stream] = asyncio.Queue()
        asked = Prompt(stream, prompt.ids, chat["max_tokens"])
        await self._prompts.send(msgspec.msgpack.encode(asked))
        start = (
            b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":1700000000,'
            b'"model":%b,"choices":[{"index":0,"delta":{"content":'
        ) % (uuid.uuid4().hex.encode(), orjson.dumps(chat["model"]))
        detokenizer = DecodeStream(skip_special_tokens=True)
        token = None
        while token is None or not token.last:
            token = await tokens.get()
            text = detokenizer.step(self._tokenizer, token.token_id) or ""
            finish = b'"length"' if token.last else b"null"
            yield b'%b%b},"finish_reason":%b}]}\n\n' % (start, orjson.dumps(text), finish)
        del self._streams[stream]
        usage = {"prompt_tokens": len(prompt.ids), "completion_tokens": chat["max_tokens"]}
        yield b"data: %b\n\n" % orjson.dumps({"choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    async def read_frames(self) -> None:
        frames = msgspec.msgpack.Decoder(list[Token])
        while True:
            for token in frames.decode(await self._frames.recv()):
                self._streams[token.stream].put_nowait(token)


def _keep_pace(prompts: str, frames: str, first_token_s: float, step_s: float, ranks: int) -> None:
    spare_the_collector()
    uvloop.run(_serve_prompts(prompts, frames, first_token_s, step_s, ranks))


async def _serve_prompts(
    prompts: str, frames: str, first_token_s: float, step_s: float, ranks: int
) -> None:
    """A stream's first token comes by itself ``first_token_s`` after it was asked for, the others
    in the steps of one of the ranks.
    """
    loop = asyncio.get_running_loop()
    bus = zmq.asyncio.Context()
    asked, made = bus.socket(zmq.PULL), bus.socket(zmq.PUSH)
    asked.connect(prompts)
    made.connect(frames)
    running: list[dict[int, int]] = [{} for _ in range(ranks)]  # tokens left, by stream

    def prefilled(prompt: Prompt) -> None:
        last = prompt.max_tokens == 1
        made.send(msgspec.msgpack.encode([Token(prompt.stream, TOKEN_ID, last)]))
        if not last:
            running[prompt.stream % ranks][prompt.stream] = prompt.max_tokens - 1

    async def decode(left: dict[int, int]) -> None:
        while True:
            due = loop.time() + step_s
            frame = [Token(stream, TOKEN_ID + count, count == 1) for stream, count in left.items()]
            for token in frame:
                left[token.stream] -= 1
                if token.last:
                    del left[token.stream]
            if frame:
                await made.send(msgspec.msgpack.encode(frame))
            await asyncio.sleep(due - loop.time())

    async with asyncio.TaskGroup() as tasks:
        for left in running:
            tasks.create_task(decode(left))
        received = msgspec.msgpack.Decoder(Prompt)
        while True:
            loop.call_later(first_token_s, prefilled, received.decode(await asked.recv()))
