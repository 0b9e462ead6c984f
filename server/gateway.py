"""The gateway's process: the HTTP API in front, the cluster behind, one event loop for both."""

import resource
import signal
import socket
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import anyio
import uvicorn
from prometheus_client import CollectorRegistry

from protocol.errors import ConfigError
from runtime.collector import spare_the_collector
from runtime.keys import load_key
from runtime.log import get_log
from runtime.reporting import report
from server.app import create_app
from server.exchange import exchange_protocol
from server.metrics import HttpMetrics
from server.metrics_compat import VllmAliases
from server.serving import open_serving
from server.settings import GatewaySettings, SchedulerSettings
from server.spans import SpanExporter
from server.step_writer import StepWriter
from server.structured.compiler import GrammarCompiler
from server.text.loading import load_model_text
from server.text.long_texts import LongTexts
from server.text.model_text import ModelText
from server.text.token_texts import TokenTexts

log = get_log(__name__)

BACKLOG = 2048  # connects of a burst wait here; clients give up after 5 s
KEEP_ALIVE_S = 75
OPEN_FILES = 65_536
# Requests leave no cycles (tests/unit/server/test_garbage.py), and every stream stops while they
# are looked for: 10 ms at a time, for as many objects as 100 streams that begin at once.
GC_THRESHOLDS = (20_000, 50, 10)


def run(settings: GatewaySettings, scheduler: SchedulerSettings) -> int:
    """Serve until SIGTERM or SIGINT, then let open requests finish; 0 is the exit code.

    Raises:
        ConfigError: a file, an address or a setting is wrong; nothing has been served.
    """
    allow_open_files()
    text = load_model_text(Path(settings.model.path))
    anyio.run(_serve, settings, scheduler, text, backend_options={"use_uvloop": True})
    return 0


async def _serve(settings: GatewaySettings, scheduler: SchedulerSettings, text: ModelText) -> None:
    registry = CollectorRegistry()
    metrics = HttpMetrics(registry)
    with (
        bound(settings) as listeners,
        GrammarCompiler(text.tokenizer.vocabulary()) as grammars,
        LongTexts(Path(settings.model.path)) as long_texts,
    ):
        async with (
            open_serving(
                settings.bus.scheduler,
                embed_scheduler=settings.embed_scheduler,
                key=load_key(settings.bus.cluster_key_file),
                max_waiting=settings.max_waiting_requests,
                patience_s=settings.migration_patience_s,
                lease_s=scheduler.lease_s,
                heartbeat_s=scheduler.heartbeat_s,
                registry=registry,
                writer=StepWriter(TokenTexts(text.tokenizer), metrics.token_gap),
            ) as serving,
            anyio.create_task_group() as background,
        ):
            spans = None
            if settings.otlp_endpoint is not None:
                spans = SpanExporter(settings.otlp_endpoint)
                background.start_soon(spans.run)
            if settings.metrics_compat == "vllm":
                registry.register(VllmAliases(serving.cluster))
            server = _Server(
                uvicorn.Config(
                    create_app(
                        serving,
                        text,
                        settings,
                        registry=registry,
                        metrics=metrics,
                        grammars=grammars,
                        long_texts=long_texts,
                        tasks=background,
                        spans=spans,
                        cluster=serving.cluster,
                    ),
                    http=exchange_protocol(),
                    ws="none",
                    loop="none",  # this one
                    lifespan="off",
                    access_log=False,
                    proxy_headers=False,
                    log_config=None,
                    log_level="error",  # whoever sends what is no HTTP must not fill the log
                    server_header=False,
                    backlog=BACKLOG,
                    timeout_keep_alive=KEEP_ALIVE_S,
                    timeout_graceful_shutdown=max(1, round(settings.process.drain_s)),
                )
            )
            spare_the_collector(*GC_THRESHOLDS)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_stop_on_signal, server)
                for listener in listeners:
                    host, port = listener.getsockname()[:2]
                    report("listening", address=f"http://{host}:{port}")
                    log.info("listening", host=host, port=port)
                await server.serve(sockets=listeners)
                tasks.cancel_scope.cancel()
            background.cancel_scope.cancel()


def allow_open_files() -> None:
    """As many as we may have, up to ``OPEN_FILES``: shells and supervisors often allow 1024 first,
    and a stream has two, its connection and what is lent of it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Server(uvicorn.Server):
    """Without uvicorn's own signal handling, which raises the signal again after the drain."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


async def _stop_on_signal(server: uvicorn.Server) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            server.force_exit = server.should_exit  # the second one does not wait
            server.should_exit = True


@contextmanager
def bound(settings: GatewaySettings) -> Generator[list[socket.socket]]:
    """The sockets that the gateway is to listen on: the API's, and the one of this process alone.

    Raises:
        ConfigError: a port is taken, or the host is not an address of this machine.
    """
    shared = settings.processes > 1
    with ExitStack() as sockets:
        listeners = [sockets.enter_context(_socket(settings.host, settings.port, shared=shared))]
        if settings.process_port:
            own = _socket(settings.host, settings.process_port, shared=False)
            listeners.append(sockets.enter_context(own))
        yield listeners


@contextmanager
def _socket(host: str, port: int, *, shared: bool) -> Generator[socket.socket]:
    """``shared``: the kernel gives each new connection to one of the processes that bind it so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        yield listener
