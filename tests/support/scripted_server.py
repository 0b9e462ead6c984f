"""A server whose every delay is scripted, and that remembers when it sent what.

Raw asyncio, no framework: what a client measures against it is the script and the client. A request
says nothing about its delays; the script does, by the order in which requests come. A stall holds
back everything that the server would send meanwhile, as one long step of an engine does.
"""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import cast

import uvloop

SECOND = 1_000_000_000
_LENGTH = re.compile(rb"content-length: ?(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_(?:output_)?tokens": ?(\d+)')
_SSE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n"
)
START_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """``per_chunk`` tokens travel in one event. ``stalls``: (seconds since the first request,
    seconds). ``fails``: what request n gets instead of an answer: an HTTP status, "event" for an
    error event after the first token, "cut" for a stream that just ends, "reset"."""

    first_token_s: float = 0.05
    token_s: float = 0.01
    per_chunk: int = 1
    stalls: Sequence[tuple[float, float]] = ()
    fails: dict[int, int | str] = field(default_factory=dict)
    usage: bool = True
    exact_length: bool = True  # takes ignore_eos
    server_timing: str = ""
    models: Sequence[str] = ("scripted",)
    spaced_json: bool = False


@dataclass(slots=True)
class Sent:
    """What the server did for one request; times are monotonic nanoseconds."""

    arrived_ns: int
    path: str
    body: dict[str, object]
    chunks_ns: list[int] = field(default_factory=list)
    failed: bool = False


@dataclass(slots=True)
class Reference:
    url: str
    log: list[Sent] = field(default_factory=list)
    metrics: str = ""

    @property
    def generations(self) -> list[Sent]:
        """Without those of the client's probe, which ask for two tokens."""
        return [sent for sent in self.log if _wanted(sent.body) > 2]


class _Connection(asyncio.Protocol):
    def __init__(self, script: Script, reference: Reference, zero: list[int]) -> None:
        self._script = script
        self._reference = reference
        self._zero = zero  # when the first measured request came
        self._buffer = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, blank, body = self._buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not blank or len(body) < (wanted := int(length[1]) if length else 0):
            return
        self._buffer = body[wanted:]
        method, path, _ = head.split(b" ", 2)
        if method != b"POST":
            self._get(path.decode())
        else:
            self._generate(path.decode(), json.loads(body[:wanted]))

    def _get(self, path: str) -> None:
        if path == "/v1/models":
            self._answer(200, {"data": [{"id": name} for name in self._script.models]})
        elif path == "/metrics" and self._reference.metrics:
            text = self._reference.metrics.encode()
            self._write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
        else:
            self._answer(404, {"error": {"message": "no such path"}})

    def _generate(self, path: str, body: dict[str, object]) -> None:
        sent = Sent(arrived_ns=monotonic_ns(), path=path, body=body)
        self._reference.log.append(sent)
        count = _wanted(body)
        if body.get("ignore_eos") and not self._script.exact_length:
            self._answer(400, {"error": {"message": "unknown field ignore_eos"}})
            return
        failure: int | str = 0
        if count > 2:
            self._zero[0] = self._zero[0] or sent.arrived_ns
            failure = self._script.fails.get(len(self._reference.generations) - 1, 0)
        if isinstance(failure, int) and failure:
            sent.failed = True
            self._answer(failure, {"error": {"message": "scripted"}})
            return
        steps = _chat if path.endswith("chat/completions") else _completion
        if path.endswith("responses"):
            steps = _response
        if not body.get("stream"):
            at = sent.arrived_ns + self._ns(self._script.first_token_s)
            at += (count - 1) * self._ns(self._script.token_s)
            whole = steps("x" * count, "", whole=True) | {"usage": self._usage(path, body, count)}
            self._at(at, lambda: self._answer(200, whole))
            return
        _Stream(self, sent, count, str(failure or ""), steps).go()

    def _usage(self, path: str, body: dict[str, object], count: int) -> dict[str, object]:
        text = json.dumps(body.get("messages") or body.get("input") or body.get("prompt"))
        words = len(re.findall(r"[a-z0-9]+", text)) + 7  # a template of seven tokens
        if path.endswith("responses"):
            return {"input_tokens": words, "output_tokens": count}
        return {"prompt_tokens": words, "completion_tokens": count, "total_tokens": words + count}

    def _answer(self, status: int, content: dict[str, object]) -> None:
        text = json.dumps(content).encode()
        head = b"HTTP/1.1 %d Scripted\r\ncontent-type: application/json\r\n" % status
        self._write(head + b"content-length: %d\r\n\r\n%b" % (len(text), text))

    def _write(self, data: bytes) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(data)

    def _ns(self, seconds: float) -> int:
        return round(seconds * SECOND)

    def _at(self, due_ns: int, do: Callable[[], None]) -> None:
        """Do it then, or when the stall in which that lies is over."""
        for begin_s, lasting_s in self._script.stalls:
            begin = self._zero[0] + self._ns(begin_s)
            if self._zero[0] and begin <= due_ns < begin + self._ns(lasting_s):
                due_ns = begin + self._ns(lasting_s)
        loop = asyncio.get_running_loop()
        loop.call_later(max(0, due_ns - monotonic_ns()) / SECOND, do)


class _Stream:
    """One streamed answer. The clock is read directly before each write."""

    def __init__(
        self,
        connection: _Connection,
        sent: Sent,
        count: int,
        failure: str,
        steps: Callable[..., dict[str, object]],
    ) -> None:
        self._connection = connection
        self._script = connection._script
        self._sent = sent
        self._count = count
        self._failure = failure
        self._steps = steps
        self._made = 0

    def go(self) -> None:
        due = self._sent.arrived_ns + self._connection._ns(self._script.first_token_s)
        self._connection._at(due, self._step)

    def _step(self) -> None:
        connection, script = self._connection, self._script
        head = b""
        if not self._made:
            timing = script.server_timing.encode()
            head = _SSE + (b"server-timing: " + timing + b"\r\n" if timing else b"") + b"\r\n"
            if self._sent.path.endswith("chat/completions"):
                head += self._event(_chat("", "assistant"))  # a role is no content
        step = min(script.per_chunk, self._count - self._made)
        self._made += step
        content = self._event(self._steps("x" * step, ""))
        self._sent.chunks_ns.append(monotonic_ns())
        connection._write(head + content)
        if self._failure:
            self._fail()
        elif self._made < self._count:
            # From the schedule, not from now: a late step does not shift all that follow.
            gap = script.first_token_s + script.token_s * (self._made + script.per_chunk - 1)
            connection._at(self._sent.arrived_ns + connection._ns(gap), self._step)
        else:
            self._end()

    def _fail(self) -> None:
        self._sent.failed = True
        connection = self._connection
        assert connection._transport is not None
        if self._failure == "event":
            connection._write(self._event({"error": {"message": "scripted"}}))
            connection._transport.close()
        elif self._failure == "cut":
            connection._write(b"0\r\n\r\n")
        else:
            connection._transport.abort()

    def _end(self) -> None:
        sent, connection = self._sent, self._connection
        usage = connection._usage(sent.path, sent.body, self._count)
        if sent.path.endswith("responses"):
            done: dict[str, object] = {
                "type": "response.completed",
                "response": {"status": "completed"},
            }
            if self._script.usage:
                done["response"] = {"status": "completed", "usage": usage}
            connection._write(self._event(done) + b"0\r\n\r\n")
            return
        end = self._event(self._steps("", "length"))
        if self._script.usage:
            end += self._event({"choices": [], "usage": usage})
        connection._write(end + self._raw(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def _event(self, content: dict[str, object]) -> bytes:
        separators = None if self._script.spaced_json else (",", ":")
        return self._raw(b"data: %b\n\n" % json.dumps(content, separators=separators).encode())

    @staticmethod
    def _raw(event: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(event), event)


def _chat(text: str, finish: str, *, whole: bool = False) -> dict[str, object]:
    delta = {"role": "assistant", "content": text} if finish == "assistant" else {"content": text}
    reason = finish if finish not in ("", "assistant") else None
    part = {"message": delta} if whole else {"delta": delta if reason is None else {}}
    kind = "chat.completion" if whole else "chat.completion.chunk"
    choice = {"index": 0, **part, "finish_reason": reason}
    return {"id": "x", "object": kind, "created": 1, "model": "scripted", "choices": [choice]}


def _completion(text: str, finish: str, *, whole: bool = False) -> dict[str, object]:
    del whole
    return {"id": "x", "choices": [{"index": 0, "text": text, "finish_reason": finish or None}]}


def _response(text: str, finish: str, *, whole: bool = False) -> dict[str, object]:
    del finish
    if whole:
        content = [{"type": "output_text", "text": text}]
        return {"status": "completed", "output": [{"type": "message", "content": content}]}
    return {"type": "response.output_text.delta", "delta": text}


def _wanted(body: dict[str, object]) -> int:
    limits = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    return next((int(str(body[name])) for name in limits if body.get(name)), 1)


@contextmanager
def scripted_server(script: Script) -> Generator[Reference]:
    """The server in a thread of its own while the block runs."""
    started = threading.Event()
    reference = Reference(url="")
    ending: list[Callable[[], object]] = []

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        zero = [0]
        server = await loop.create_server(
            lambda: _Connection(script, reference, zero), "127.0.0.1", 0, backlog=1024
        )
        reference.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ending.append(lambda: loop.call_soon_threadsafe(stop.set))
        started.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: uvloop.run(serve()), daemon=True)
    thread.start()
    assert started.wait(START_S)
    try:
        yield reference
    finally:
        ending[0]()
        thread.join(START_S)
