from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import msgspec
import pytest

from protocol.codec import Decoder
from protocol.errors import ConfigError
from protocol.ids import Incarnation, WorkerId, WorkerRef
from protocol.kv import KVLayout
from protocol.messages import (
    Announce,
    Heartbeat,
    Refused,
    ToScheduler,
    UnknownWorker,
    Welcome,
    Withdraw,
)
from protocol.workers import ExpertReport, FingerprintDifference, WorkerInfo, WorkerLoad
from runtime.bus import Listener
from runtime.registration import Registration

pytestmark = pytest.mark.anyio
FAMILY: Decoder[ToScheduler] = Decoder(ToScheduler)
LAYOUT = KVLayout(
    kind="gqa",
    dtype="float32",
    num_layers=1,
    block_tokens=16,
    kv_heads=1,
    key_width=4,
    value_width=4,
)
INFO = WorkerInfo(
    ref=WorkerRef(WorkerId("prefill-0"), Incarnation(7)),
    role="prefill",
    group_id="prefill-0",
    rank=0,
    world_size=1,
    epoch=0,
    address="tcp://127.0.0.1:1",
    model="m",
    max_model_len=64,
    layout=LAYOUT,
    num_blocks=4,
    fingerprint={"weights": "a"},
    pid=1,
    host="here",
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Worker:
    info: WorkerInfo | None = INFO
    registration: Registration | None = None
    report: ExpertReport | None = None
    beats: list[ToScheduler] = field(default_factory=list)


@asynccontextmanager
async def registered(
    listener: Listener[ToScheduler], worker: Worker
) -> AsyncGenerator[Registration]:
    registration = Registration(
        listener.address,
        info=lambda: worker.info,
        load=lambda: WorkerLoad(free_blocks=3),
        experts=lambda: worker.report,
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(registration.run)
        yield registration
        tasks.cancel_scope.cancel()


async def next_of(listener: Listener[ToScheduler], kind: type[msgspec.Struct]) -> bytes:
    async for peer, message in listener:
        if isinstance(message, kind):
            return peer
    raise AssertionError("the listener ended")


@asynccontextmanager
async def rebound(address: str) -> AsyncGenerator[Listener[ToScheduler]]:
    """A listener at an address that is still being closed: the port is free in a moment."""
    while True:
        try:
            async with Listener.bind(address, FAMILY) as listener:
                yield listener
                return
        except ConfigError:
            await anyio.sleep(0.01)


async def test_a_worker_announces_beats_and_withdraws_when_it_leaves() -> None:
    with anyio.fail_after(10):
        async with Listener.bind("tcp://127.0.0.1:0", FAMILY) as listener:
            async with registered(listener, Worker()) as registration:
                peer, message = await anext(listener)
                assert message == Announce(info=INFO, load=WorkerLoad(free_blocks=3))
                await listener.send(peer, Welcome(lease_s=1.0, heartbeat_s=0.01))
                await registration.accepted.wait()
                for _ in range(3):
                    await next_of(listener, Heartbeat)
            await next_of(listener, Withdraw)


async def test_a_report_on_experts_goes_with_one_beat_and_with_every_announcement() -> None:
    report = ExpertReport(
        layers=(),
        tokens=(),
        window_tokens=(),
        held=(),
        shares=(),
        placement_epoch=1,
        migrations=0,
    )
    with anyio.fail_after(10):
        async with (
            Listener.bind("tcp://127.0.0.1:0", FAMILY) as listener,
            registered(listener, Worker(report=report)),
        ):
            peer = await next_of(listener, Announce)
            await listener.send(peer, Welcome(lease_s=1.0, heartbeat_s=0.01))
            reports = [await next_report(listener) for _ in range(3)]
            assert reports == [report, None, None]
            await listener.send(peer, UnknownWorker())
            await next_of(listener, Announce)
            assert await next_report(listener) == report


async def next_report(listener: Listener[ToScheduler]) -> ExpertReport | None:
    async for _, message in listener:
        if isinstance(message, Heartbeat):
            return message.experts
    raise AssertionError("the listener ended")


async def test_a_scheduler_that_forgot_the_worker_hears_the_announcement_again() -> None:
    with anyio.fail_after(10):
        async with (
            Listener.bind("tcp://127.0.0.1:0", FAMILY) as listener,
            registered(listener, Worker()),
        ):
            peer = await next_of(listener, Announce)
            await listener.send(peer, UnknownWorker())
            await next_of(listener, Announce)


async def test_a_worker_that_cannot_serve_is_withdrawn_and_comes_back_changed() -> None:
    with anyio.fail_after(10):
        worker = Worker()
        async with (
            Listener.bind("tcp://127.0.0.1:0", FAMILY) as listener,
            registered(listener, worker) as registration,
        ):
            await next_of(listener, Announce)
            worker.info = None
            registration.changed()
            await next_of(listener, Withdraw)
            worker.info = msgspec.structs.replace(INFO, epoch=5)
            registration.changed()
            await next_of(listener, Announce)


async def test_a_restarted_scheduler_is_announced_to_without_being_asked() -> None:
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            async with Listener.bind("tcp://127.0.0.1:0", FAMILY) as first:
                address = first.address
                registration = Registration(address, info=lambda: INFO, load=WorkerLoad)
                tasks.start_soon(registration.run)
                await next_of(first, Announce)
            async with rebound(address) as second:
                await next_of(second, Announce)
                tasks.cancel_scope.cancel()


async def test_a_refusal_ends_the_registration_with_the_differences() -> None:
    difference = FingerprintDifference("weights", "a", "b", WorkerId("decode-0"))
    with anyio.fail_after(10):
        async with Listener.bind("tcp://127.0.0.1:0", FAMILY) as listener:
            registration = Registration(listener.address, info=lambda: INFO, load=WorkerLoad)

            async def refuse() -> None:
                peer = await next_of(listener, Announce)
                await listener.send(
                    peer, Refused(reason="another model", differences=(difference,))
                )

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(refuse)
                with pytest.raises(ConfigError, match="weights: ours 'a', decode-0 has 'b'"):
                    await registration.run()
