"""The scheduler: who is a member, until when, and who is told."""

import msgspec
import pytest

from protocol.ids import GatewayId, WorkerId
from protocol.messages import (
    GATEWAY_SILENT_S,
    Announce,
    AskDrain,
    ClusterSnapshot,
    Drain,
    Draining,
    Heartbeat,
    Message,
    PrefixUpdate,
    Refused,
    UnknownWorker,
    WatchCluster,
    Welcome,
    Withdraw,
)
from protocol.workers import PrefixEvents, WorkerInfo, WorkerLoad
from server.scheduler import Scheduler
from tests.support.arithmetic import FINGERPRINT, LAYOUT, a_worker_info

pytestmark = pytest.mark.anyio
WORKER, OTHER, GATEWAY = b"worker", b"other", b"gateway"
LOAD = WorkerLoad()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class ManualClock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("the test turns the clock")


class Room:
    """A scheduler whose peers are lists of what they were told."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.told: dict[bytes, list[Message]] = {}
        self.scheduler = Scheduler(self.send, clock=self.clock, lease_s=10.0, heartbeat_s=1.0)

    async def send(self, peer: bytes, message: Message) -> None:
        self.told.setdefault(peer, []).append(message)

    def take(self, peer: bytes) -> list[Message]:
        return self.told.pop(peer, [])

    async def announce(self, info: WorkerInfo, peer: bytes = WORKER) -> list[Message]:
        await self.scheduler.hear(peer, Announce(info=info, load=LOAD))
        return self.take(peer)

    async def beat(
        self, info: WorkerInfo, *, load: WorkerLoad = LOAD, prefix: PrefixEvents | None = None
    ) -> list[Message]:
        await self.scheduler.hear(WORKER, Heartbeat(worker=info.ref, load=load, prefix=prefix))
        return self.take(WORKER)

    async def watch(self) -> list[Message]:
        await self.scheduler.hear(GATEWAY, WatchCluster(gateway_id=GatewayId("g")))
        return self.take(GATEWAY)

    async def members(self) -> list[WorkerInfo]:
        """As a gateway that has just come sees them."""
        newcomer = f"newcomer {len(self.told)}".encode()
        await self.scheduler.hear(newcomer, WatchCluster(gateway_id=GatewayId("newcomer")))
        snapshot = self.take(newcomer)[0]
        assert isinstance(snapshot, ClusterSnapshot)
        return [state.info for state in snapshot.workers]


async def test_a_worker_is_welcomed_and_every_gateway_is_told() -> None:
    room = Room()
    await room.watch()
    info = a_worker_info("prefill-0", "prefill")
    assert await room.announce(info) == [Welcome(lease_s=10.0, heartbeat_s=1.0)]
    (snapshot,) = room.take(GATEWAY)
    assert isinstance(snapshot, ClusterSnapshot)
    assert [state.info for state in snapshot.workers] == [info]


async def test_a_worker_that_falls_silent_is_a_member_until_its_lease_ends() -> None:
    room = Room()
    await room.announce(a_worker_info("prefill-0", "prefill"))
    await room.watch()
    room.clock.time = 9.9
    await room.watch()
    await room.scheduler.tick()
    assert room.take(GATEWAY) == []
    room.clock.time = 10.0
    await room.scheduler.tick()
    assert room.take(GATEWAY) == [ClusterSnapshot(version=2, workers=())]


async def test_a_heartbeat_renews_the_lease_and_carries_the_load_to_gateways() -> None:
    room = Room()
    info = a_worker_info("prefill-0", "prefill")
    await room.announce(info)
    room.clock.time = 9.0
    await room.watch()
    assert await room.beat(info, load=WorkerLoad(queued_tokens=7)) == []
    await room.scheduler.tick()
    (snapshot,) = room.take(GATEWAY)
    assert isinstance(snapshot, ClusterSnapshot)
    assert snapshot.workers[0].load.queued_tokens == 7
    room.clock.time = 18.0
    await room.watch()
    await room.scheduler.tick()
    assert room.take(GATEWAY) == []


async def test_an_unknown_worker_is_asked_to_announce_itself() -> None:
    room = Room()
    assert await room.beat(a_worker_info("prefill-0", "prefill")) == [UnknownWorker()]


async def test_a_new_life_of_a_worker_replaces_the_old_at_once_and_for_good() -> None:
    room = Room()
    old, new = a_worker_info("decode-0/0", "decode"), a_worker_info("decode-0/0", "decode")
    await room.announce(old)
    await room.announce(new, OTHER)
    assert await room.beat(old) == []
    await room.scheduler.hear(WORKER, Withdraw(worker=old.ref, reason="late"))
    assert room.scheduler.stale_messages == 2
    assert await room.members() == [new]


async def test_a_withdrawn_worker_is_gone_at_once() -> None:
    room = Room()
    info = a_worker_info("decode-0/0", "decode")
    await room.announce(info)
    await room.scheduler.hear(WORKER, Withdraw(worker=info.ref, reason="leaving"))
    assert await room.members() == []


@pytest.mark.parametrize(
    ("change", "part", "yours", "ours"),
    [
        ({"fingerprint": {**FINGERPRINT, "weights": "b"}}, "weights", "b", "arithmetic"),
        ({"fingerprint": {"protocol": "1"}}, "weights", "absent", "arithmetic"),
        (
            {"layout": msgspec.structs.replace(LAYOUT, block_tokens=32)},
            "layout.block_tokens",
            "32",
            "16",
        ),
    ],
    ids=["other weights", "part absent", "other block size"],
)
async def test_a_worker_that_differs_is_refused_and_told_in_which_part(
    change: dict[str, object], part: str, yours: str, ours: str
) -> None:
    room = Room()
    first = a_worker_info("prefill-0", "prefill")
    await room.announce(first)
    second = msgspec.structs.replace(a_worker_info("decode-0/0", "decode"), **change)
    (refused,) = await room.announce(second, OTHER)
    assert isinstance(refused, Refused)
    (difference,) = refused.differences
    assert (difference.part, difference.yours, difference.ours) == (part, yours, ours)
    assert difference.ours_from == WorkerId("prefill-0")
    assert await room.members() == [first]


async def test_a_worker_may_come_back_with_another_fingerprint_when_it_is_alone() -> None:
    room = Room()
    await room.announce(a_worker_info("prefill-0", "prefill"))
    changed = a_worker_info("prefill-0", "prefill", fingerprint={"protocol": "2"})
    await room.announce(changed)
    assert await room.members() == [changed]


async def test_models_do_not_constrain_one_another() -> None:
    room = Room()
    first = a_worker_info("prefill-0", "prefill")
    second = a_worker_info("prefill-1", "prefill", model="another", fingerprint={})
    await room.announce(first)
    await room.announce(second, OTHER)
    assert await room.members() == [first, second]


async def test_a_gateway_that_comes_late_gets_the_prefixes_from_the_start() -> None:
    room = Room()
    info = a_worker_info("prefill-0", "prefill")
    await room.announce(info)
    await room.beat(info, prefix=PrefixEvents(sequence=1, stored=(b"a", b"b"), snapshot=True))
    await room.beat(info, prefix=PrefixEvents(sequence=2, removed=(b"a",)))
    _, update = await room.watch()
    assert update == PrefixUpdate(
        worker=info.ref, events=PrefixEvents(sequence=2, stored=(b"b",), snapshot=True)
    )
    events = PrefixEvents(sequence=3, stored=(b"c",))
    await room.beat(info, prefix=events)
    assert room.take(GATEWAY) == [PrefixUpdate(worker=info.ref, events=events)]


async def test_a_worker_whose_prefix_report_was_lost_is_asked_for_all_of_them() -> None:
    room = Room()
    info = a_worker_info("prefill-0", "prefill")
    await room.announce(info)
    await room.beat(info, prefix=PrefixEvents(sequence=1, snapshot=True))
    gap = PrefixEvents(sequence=3, stored=(b"c",))
    assert await room.beat(info, prefix=gap) == [UnknownWorker()]


async def test_a_silent_gateway_is_no_longer_told() -> None:
    room = Room()
    await room.watch()
    room.clock.time = GATEWAY_SILENT_S + 0.1
    await room.scheduler.tick()
    await room.announce(a_worker_info("prefill-0", "prefill"))
    assert room.take(GATEWAY) == []


async def test_who_asks_for_a_drain_is_told_who_drains_and_only_those_are_asked() -> None:
    room = Room()
    ranks = [
        a_worker_info(f"decode-0/{rank}", role="decode", rank=rank, group_id="decode-0")
        for rank in range(2)
    ]
    for number, info in enumerate(ranks):
        await room.announce(info, peer=b"rank %d" % number)
    await room.announce(a_worker_info("prefill-0", role="prefill"))
    for name, drained in (("decode-0/1", ranks[1:]), ("decode-0", ranks), ("nobody", [])):
        await room.scheduler.hear(OTHER, AskDrain(name=name))
        assert room.take(OTHER) == [Draining(workers=tuple(info.ref for info in drained))]
        for number, info in enumerate(ranks):
            expected = [Drain(worker=info.ref)] if info in drained else []
            assert room.take(b"rank %d" % number) == expected
        assert room.take(WORKER) == []
