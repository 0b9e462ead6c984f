"""The gateway behind its HTTP surface: scheduler, links to workers, and the flow of each request.

Everything that runs lives in the task group of ``open_serving``; when its block ends, nothing of
it is left: no task, no socket, no request at a worker.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

import anyio
from prometheus_client import CollectorRegistry

from protocol.ids import GatewayId, new_request_id
from protocol.requests import GenerateRequest
from runtime.bus import Listener
from runtime.clock import Clock, MonotonicClock
from runtime.keys import ClusterKey
from server.canary import Canary
from server.cluster import Cluster
from server.cluster_metrics import ClusterMetrics
from server.cluster_watch import ClusterWatch
from server.generation import Deliver, Readiness, ServedModel
from server.request_flow import run_request
from server.scheduler import FAMILY, HEARTBEAT_S, LEASE_S, Scheduler
from server.step_writer import StepWriter

MAX_WAITING_REQUESTS = 512


class Serving:
    """A ``Generator``: what the HTTP layer sees of the cluster."""

    def __init__(self, cluster: Cluster, canary: Canary, *, scheduler_address: str) -> None:
        self.cluster = cluster
        self.scheduler_address = scheduler_address
        self._canary = canary
        self._models: dict[str, ServedModel] = {}

    async def generate(
        self, request: GenerateRequest, deliver: Deliver, *, deadline_s: float
    ) -> None:
        deadline = self.cluster.clock.now() + deadline_s
        with self.cluster.records.request(request):
            await run_request(request, self.cluster, deliver, deadline=deadline)

    def models(self) -> Sequence[ServedModel]:
        """Every model that a worker has announced since the gateway started.

        A model stays when its workers are lost: asking for it is then no mistake of the client.
        """
        for state in self.cluster.members:
            info = state.info
            known = self._models.get(info.model)
            if known is None or info.max_model_len < known.max_model_len:
                created = known.created if known else int(datetime.now(UTC).timestamp())
                self._models[info.model] = ServedModel(
                    id=info.model, max_model_len=info.max_model_len, created=created
                )
        return list(self._models.values())

    def readiness(self) -> Readiness:
        return self._canary.readiness()


@asynccontextmanager
async def open_serving(
    scheduler: str,
    *,
    embed_scheduler: bool = True,
    key: ClusterKey | None = None,
    clock: Clock | None = None,
    max_waiting: int = MAX_WAITING_REQUESTS,
    patience_s: float = 0.0,
    lease_s: float = LEASE_S,
    heartbeat_s: float = HEARTBEAT_S,
    registry: CollectorRegistry | None = None,
    writer: StepWriter | None = None,
) -> AsyncGenerator[Serving]:
    """Serve with the workers that announce themselves at the address ``scheduler``.

    With ``embed_scheduler`` the scheduler runs here and listens at that address; port 0 takes a
    free one, see ``Serving.scheduler_address``. Otherwise it is another process. ``patience_s`` is
    how long an interrupted stream waits for workers that can go on with it. ``registry`` gets what
    the gateway knows of the cluster. ``writer`` writes what it can of streams.

    Raises:
        ConfigError: the scheduler cannot listen there.
    """
    clock = clock or MonotonicClock()
    gateway_id = GatewayId(f"gateway-{new_request_id()[:8]}")
    async with AsyncExitStack() as stack:
        listener = None
        if embed_scheduler:
            listener = await stack.enter_async_context(Listener.bind(scheduler, FAMILY, key=key))
            scheduler = listener.address
        tasks = await stack.enter_async_context(anyio.create_task_group())
        if listener is not None:
            roster = Scheduler(listener.send, clock=clock, lease_s=lease_s, heartbeat_s=heartbeat_s)
            tasks.start_soon(roster.run, listener)
        cluster = Cluster(
            gateway_id=gateway_id,
            tasks=tasks,
            clock=clock,
            max_waiting=max_waiting,
            patience_s=patience_s,
            key=key,
            writer=writer,
        )
        if registry is not None:
            registry.register(ClusterMetrics(cluster))
        watch = ClusterWatch(scheduler, cluster, gateway_id=gateway_id, clock=clock, key=key)
        canary = Canary(cluster)
        tasks.start_soon(watch.run)
        tasks.start_soon(canary.run)
        try:
            yield Serving(cluster, canary, scheduler_address=scheduler)
        finally:
            tasks.cancel_scope.cancel()
