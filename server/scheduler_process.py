"""The scheduler alone in a process, for several gateways."""

import signal

import anyio

from runtime.clock import MonotonicClock
from runtime.keys import load_key
from runtime.reporting import report
from server.scheduler import run_scheduler
from server.settings import SchedulerSettings


def run(settings: SchedulerSettings) -> int:
    """Serve until SIGTERM or SIGINT; 0 is the exit code.

    Raises:
        ConfigError: the address or the key cannot be used.
    """
    anyio.run(_serve, settings)
    return 0


async def _serve(settings: SchedulerSettings) -> None:
    key = load_key(settings.bus.cluster_key_file)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_stop_on_signal, tasks.cancel_scope)
        report("listening", address=settings.bus.scheduler)
        await run_scheduler(
            settings.bus.scheduler,
            clock=MonotonicClock(),
            key=key,
            lease_s=settings.lease_s,
            heartbeat_s=settings.heartbeat_s,
        )


async def _stop_on_signal(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        await anext(signals)
        scope.cancel()
