"""The real application over simulated workers, on a real socket and one event loop."""

import socket
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import cache

import anyio
import uvicorn
from prometheus_client import CollectorRegistry

from deploy.demo import demo_weights
from server.app import create_app
from server.exchange import exchange_protocol
from server.metrics import Latencies
from server.openai.sse import StreamTimes
from server.settings import GatewaySettings
from server.step_writer import StepWriter, Written
from server.text.loading import load_model_text
from server.text.model_text import ModelText
from server.text.token_texts import TokenTexts
from tests.support.polling import eventually
from tests.support.system import System

BACKLOG = 100


@cache
def demo_text() -> ModelText:
    return load_model_text(demo_weights())


@cache
def demo_token_texts() -> TokenTexts:
    return TokenTexts(demo_text().tokenizer)


class CountingWriter(StepWriter):
    """Tells how many tokens it has written, and how often a socket did not take them."""

    written = 0
    full = 0

    def leave(self, stream: int) -> Written:
        written = super().leave(stream)
        self.written += len(written.token_ids)
        self.full += bool(written.unsent)
        return written


def a_writer() -> CountingWriter:
    return CountingWriter(demo_token_texts(), Latencies("gaps", "", (0.01, 0.1)))


@asynccontextmanager
async def a_gateway(
    system: System, *, times: StreamTimes | None = None, send_buffer: int | None = None
) -> AsyncGenerator[tuple[int, uvicorn.Server]]:
    """Its port, and its server. ``send_buffer`` is what its connections' sockets take, about."""
    app = create_app(
        system.serving,
        demo_text(),
        GatewaySettings(),
        registry=CollectorRegistry(),
        times=times,
        cluster=system.serving.cluster,
    )
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        config = uvicorn.Config(app, http=exchange_protocol(), lifespan="off", log_config=None)
        server = _Server(config)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.serve, [listener])
            await eventually(lambda: server.started, "the server has started")
            yield listener.getsockname()[1], server
            server.should_exit = True


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield  # signals are the test runner's
