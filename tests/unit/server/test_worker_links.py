"""Links to workers: what is lost with one, and when it stands again."""

from contextlib import AsyncExitStack

import anyio
import pytest

from protocol.codec import Decoder
from protocol.errors import WorkerLost
from protocol.ids import GatewayId
from protocol.messages import Cancel, GatewayAlive, ToDecode
from runtime.bus import Listener
from runtime.clock import MonotonicClock
from server.attempts import Attempt, Attempts
from server.worker_links import WorkerLinks
from tests.support.arithmetic import a_request, a_worker_info
from tests.support.polling import eventually, port_free

pytestmark = pytest.mark.anyio
FAMILY: Decoder[ToDecode] = Decoder(ToDecode)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def some_links(tasks: anyio.abc.TaskGroup, attempts: Attempts, changes: list[int]) -> WorkerLinks:
    return WorkerLinks(
        gateway_id=GatewayId("g"),
        attempts=attempts,
        tasks=tasks,
        clock=MonotonicClock(),
        on_change=lambda: changes.append(1),
    )


async def test_a_worker_hears_first_that_the_gateway_lives() -> None:
    async with (
        Listener.bind("tcp://127.0.0.1:0", FAMILY) as listener,
        anyio.create_task_group() as tasks,
    ):
        changes: list[int] = []
        links = some_links(tasks, Attempts(MonotonicClock()), changes)
        info = a_worker_info("decode-0/0", "decode", address=listener.address)
        links.follow([info])
        with anyio.fail_after(5):
            _, message = await anext(listener)
        assert message == GatewayAlive(gateway_id=GatewayId("g"))
        await eventually(lambda: links.is_up(info.ref), "the link")
        await links.send(info.ref, Cancel(ref=a_request().ref))
        with anyio.fail_after(5):
            _, message = await anext(listener)
        assert isinstance(message, Cancel)
        assert changes == [1]
        tasks.cancel_scope.cancel()


async def test_a_broken_link_fails_what_was_expected_of_the_worker_and_nothing_else() -> None:
    attempts = Attempts(MonotonicClock())
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        links = some_links(tasks, attempts, [])
        server = await stack.enter_async_context(AsyncExitStack())
        listener = await server.enter_async_context(Listener.bind("tcp://127.0.0.1:0", FAMILY))
        info = a_worker_info("decode-0/0", "decode", address=listener.address)
        elsewhere = a_worker_info("decode-1/0", "decode")
        links.follow([info])
        await eventually(lambda: links.is_up(info.ref), "the link")
        here, there = (attempts.open(Attempt(a_request(), deadline=1e9)) for _ in range(2))
        here.asks_decode(info.ref, answer_by=1e9)
        there.asks_decode(elsewhere.ref, answer_by=1e9)
        await server.aclose()
        await eventually(lambda: not links.is_up(info.ref), "the loss")
        with pytest.raises(WorkerLost, match="decode-0/0"):
            await here.reservation()
        assert there.failure is None
        with pytest.raises(WorkerLost):
            await links.send(info.ref, Cancel(ref=here.ref))
        await port_free(listener.address)
        again = await stack.enter_async_context(Listener.bind(listener.address, FAMILY))
        assert again.address == listener.address
        await eventually(lambda: links.is_up(info.ref), "the link again")
        tasks.cancel_scope.cancel()


async def test_a_worker_that_is_no_member_any_more_is_lost_at_once() -> None:
    attempts = Attempts(MonotonicClock())
    async with (
        Listener.bind("tcp://127.0.0.1:0", FAMILY) as listener,
        anyio.create_task_group() as tasks,
    ):
        links = some_links(tasks, attempts, [])
        info = a_worker_info("decode-0/0", "decode", address=listener.address)
        links.follow([info])
        await eventually(lambda: links.is_up(info.ref), "the link")
        attempt = attempts.open(Attempt(a_request(), deadline=1e9))
        attempt.asks_decode(info.ref, answer_by=1e9)
        links.follow([])
        assert isinstance(attempt.failure, WorkerLost)
        assert not links.is_up(info.ref)
        tasks.cancel_scope.cancel()
