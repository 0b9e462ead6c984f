"""Gateways and the scheduler: what is known survives its loss, and is put right when it is back."""

import anyio
import pytest
from anyio.abc import TaskStatus

from protocol.ids import GatewayId
from protocol.messages import ClusterSnapshot, ToScheduler
from protocol.workers import WorkerInfo, WorkerLoad, WorkerState
from runtime.bus import Listener
from runtime.clock import MonotonicClock
from server.cluster import Cluster
from server.cluster_watch import ClusterWatch
from server.scheduler import FAMILY, Scheduler
from server.serving import open_serving
from tests.support.arithmetic import a_request, a_worker_info, expected_tokens
from tests.support.polling import eventually, port_free
from tests.support.system import Stream, tokens_of
from tests.support.workers import Fabric, SimulatedDecode, SimulatedPrefill, serve_workers

pytestmark = pytest.mark.anyio
ANYWHERE = "tcp://127.0.0.1:0"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class StoppableScheduler:
    """One scheduler, in a task that can be stopped while others go on."""

    def __init__(self) -> None:
        self.address = ""
        self.scheduler: Scheduler | None = None
        self._scope = anyio.CancelScope()

    async def run(
        self, address: str, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        with self._scope:
            async with Listener.bind(address, FAMILY) as listener:
                self.address = listener.address
                task_status.started()
                self.scheduler = Scheduler(listener.send, clock=MonotonicClock(), heartbeat_s=0.05)
                await self.scheduler.run(listener)

    def knows_two(self) -> bool:
        return self.scheduler is not None and len(self.scheduler.members) == 2

    def stop(self) -> None:
        self._scope.cancel()


async def test_streams_and_new_requests_go_on_without_the_scheduler_and_after_its_restart() -> None:
    fabric = Fabric()
    prefill, decode = SimulatedPrefill(fabric=fabric), SimulatedDecode(fabric=fabric)
    first, second = StoppableScheduler(), StoppableScheduler()
    async with anyio.create_task_group() as tasks:
        await tasks.start(first.run, ANYWHERE)
        async with (
            open_serving(first.address, embed_scheduler=False) as serving,
            serve_workers(first.address, [prefill, decode]),
        ):
            await eventually(lambda: serving.readiness().ready, "ready")
            decode.paused = True
            stream = Stream(serving, a_request(max_tokens=5))
            tasks.start_soon(stream.run)
            await stream.has(1)
            first.stop()
            await port_free(first.address)
            decode.resume()
            await stream.end()
            assert stream.tokens == expected_tokens((5, 6, 7), 5)
            another = await tokens_of(serving, a_request(max_tokens=5))
            assert another == expected_tokens((5, 6, 7), 5)
            await tasks.start(second.run, first.address)
            await eventually(second.knows_two, "both workers have announced themselves again")
            third = await tokens_of(serving, a_request(max_tokens=5))
            assert third == expected_tokens((5, 6, 7), 5)
            assert serving.readiness().ready
        second.stop()


class Told:
    """A scheduler that says what the test wants it to say."""

    def __init__(self, listener: Listener[ToScheduler]) -> None:
        self._listener = listener

    async def say(self, *workers: WorkerInfo) -> None:
        peer, _ = await anext(self._listener)
        states = tuple(WorkerState(info=info, load=WorkerLoad()) for info in workers)
        await self._listener.send(peer, ClusterSnapshot(version=1, workers=states))


async def test_a_worker_is_forgotten_only_when_the_new_scheduler_has_had_time_to_find_it() -> None:
    known, lost = a_worker_info("prefill-0", "prefill"), a_worker_info("prefill-1", "prefill")
    gateway_id = GatewayId("g")
    async with anyio.create_task_group() as tasks:
        clock = MonotonicClock()
        cluster = Cluster(gateway_id=gateway_id, tasks=tasks, clock=clock, max_waiting=1)

        def members() -> list[str]:
            return [state.info.ref.worker_id for state in cluster.members]

        async with Listener.bind(ANYWHERE, FAMILY) as listener:
            address = listener.address
            watch = ClusterWatch(address, cluster, gateway_id=gateway_id, clock=clock, settle_s=1.0)
            tasks.start_soon(watch.run)
            await Told(listener).say(known, lost)
            await eventually(lambda: members() == ["prefill-0", "prefill-1"], "both")
        await port_free(address)
        async with Listener.bind(address, FAMILY) as listener:
            renewed = a_worker_info("prefill-0", "prefill")
            await Told(listener).say(renewed)
            await eventually(
                lambda: renewed in [state.info for state in cluster.members], "the new life"
            )
            assert members() == ["prefill-0", "prefill-1"]
            await eventually(lambda: members() == ["prefill-0"], "only one")
        tasks.cancel_scope.cancel()
