"""The scheduler: keeps the membership, and tells every gateway about it.

It is not on any request's path. Workers and gateways that lose it go on with what they know, and
find it or its successor again; so it keeps nothing that they would not tell it anew.
"""

from collections.abc import AsyncIterable, Awaitable, Callable
from typing import NoReturn

import anyio

from protocol.codec import Decoder
from protocol.ids import WorkerRef
from protocol.messages import (
    GATEWAY_SILENT_S,
    Announce,
    AskDrain,
    ClusterSnapshot,
    Drain,
    Draining,
    ExpertUpdate,
    Heartbeat,
    Message,
    PrefixUpdate,
    Refused,
    ToScheduler,
    UnknownWorker,
    WatchCluster,
    Welcome,
    Withdraw,
)
from protocol.workers import ExpertReport, WorkerState
from runtime.bus import Listener
from runtime.clock import Clock
from runtime.keys import ClusterKey
from runtime.log import get_log
from server.membership import Beat, Membership
from server.prefix_directory import PrefixDirectory

log = get_log(__name__)

FAMILY: Decoder[ToScheduler] = Decoder(ToScheduler)
LEASE_S = 10.0
HEARTBEAT_S = 1.0


class Scheduler:
    def __init__(
        self,
        send: Callable[[bytes, Message], Awaitable[None]],
        *,
        clock: Clock,
        lease_s: float = LEASE_S,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        """``send`` gives a message to a peer, a worker or a gateway; it may get lost."""
        self._send = send
        self._clock = clock
        self._welcome = Welcome(lease_s=lease_s, heartbeat_s=heartbeat_s)
        self._membership = Membership(lease_s=lease_s)
        self._prefixes = PrefixDirectory()
        self._experts: dict[WorkerRef, ExpertReport] = {}
        self._peers: dict[WorkerRef, bytes] = {}  # whence each member has announced itself
        self._watchers: dict[bytes, float] = {}  # gateway's peer -> when it was last heard
        self._version = 0
        self._loads_changed = False
        self.stale_messages = 0

    @property
    def members(self) -> tuple[WorkerState, ...]:
        return self._membership.states()

    async def run(self, incoming: AsyncIterable[tuple[bytes, ToScheduler]]) -> None:
        """Serve what comes from peers, until it ends or the caller cancels."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tick_forever)
            async for peer, message in incoming:
                await self.hear(peer, message)
            tasks.cancel_scope.cancel()

    async def hear(self, peer: bytes, message: ToScheduler) -> None:
        match message:
            case Announce():
                await self._announce(peer, message)
            case Heartbeat():
                await self._heartbeat(peer, message)
            case Withdraw(worker=worker, reason=reason):
                if self._membership.withdraw(worker):
                    log.info("worker withdrew", worker=worker.worker_id, reason=reason)
                    await self._membership_changed([worker])
                else:
                    self.stale_messages += 1
            case WatchCluster():
                await self._watch(peer)
            case AskDrain(name=name):
                await self._drain(peer, name)

    async def tick(self) -> None:
        """Once a heartbeat: end leases, forget silent gateways, pass on fresh loads."""
        now = self._clock.now()
        silent = [p for p, heard in self._watchers.items() if now - heard > GATEWAY_SILENT_S]
        for peer in silent:
            del self._watchers[peer]
        gone = self._membership.expire(now)
        for worker in gone:
            log.warning("worker lost its lease", worker=worker.worker_id)
        if gone:
            await self._membership_changed(gone)
        elif self._loads_changed:
            await self._broadcast_snapshot()

    async def _tick_forever(self) -> NoReturn:
        while True:
            await self._clock.sleep(self._welcome.heartbeat_s)
            await self.tick()

    async def _announce(self, peer: bytes, message: Announce) -> None:
        info = message.info
        replaced = [
            state.info.ref
            for state in self._membership.states()
            if state.info.ref.worker_id == info.ref.worker_id and state.info.ref != info.ref
        ]
        differences = self._membership.announce(info, message.load, self._clock.now())
        if differences:
            reason = f"it does not serve the same {info.model} as {differences[0].ours_from}"
            parts = [difference.part for difference in differences]
            log.warning("worker refused", worker=info.ref.worker_id, differences=parts)
            await self._send(peer, Refused(reason=reason, differences=differences))
            return
        self._peers[info.ref] = peer
        log.info("worker joined", worker=info.ref.worker_id, role=info.role, epoch=info.epoch)
        left_behind = self._membership.leave_behind(info)
        for worker in left_behind:
            log.warning("its group goes on without a rank", worker=worker.worker_id)
        await self._send(peer, self._welcome)
        await self._membership_changed([*replaced, *left_behind])

    async def _heartbeat(self, peer: bytes, message: Heartbeat) -> None:
        beat = self._membership.heartbeat(message.worker, message.load, self._clock.now())
        if beat is Beat.STALE:
            self.stale_messages += 1
        elif beat is Beat.UNKNOWN:
            await self._send(peer, UnknownWorker())
        else:
            self._loads_changed = True
            if message.experts is not None:
                self._experts[message.worker] = message.experts
                await self._broadcast(ExpertUpdate(worker=message.worker, report=message.experts))
            if message.prefix is not None:
                if self._prefixes.apply(message.worker, message.prefix):
                    await self._broadcast(
                        PrefixUpdate(worker=message.worker, events=message.prefix)
                    )
                else:  # a report was lost: an announcement comes with a whole one
                    await self._send(peer, UnknownWorker())

    async def _drain(self, asker: bytes, name: str) -> None:
        infos = [state.info for state in self._membership.states()]
        meant = [i.ref for i in infos if name in (i.ref.worker_id, i.group_id)]
        for worker in meant:
            log.info("worker is told to drain", worker=worker.worker_id)
            await self._send(self._peers[worker], Drain(worker=worker))
        await self._send(asker, Draining(workers=tuple(meant)))

    async def _watch(self, peer: bytes) -> None:
        newcomer = peer not in self._watchers
        self._watchers[peer] = self._clock.now()
        if newcomer:
            await self._send(peer, self._snapshot())
            for worker in self._prefixes.workers():
                events = self._prefixes.snapshot(worker)
                if events is not None:
                    await self._send(peer, PrefixUpdate(worker=worker, events=events))
            for worker, report in self._experts.items():
                await self._send(peer, ExpertUpdate(worker=worker, report=report))

    async def _membership_changed(self, gone: list[WorkerRef]) -> None:
        for worker in gone:
            self._prefixes.forget(worker)
            self._experts.pop(worker, None)
            self._peers.pop(worker, None)
        self._version += 1
        await self._broadcast_snapshot()

    async def _broadcast_snapshot(self) -> None:
        self._loads_changed = False
        await self._broadcast(self._snapshot())

    async def _broadcast(self, message: Message) -> None:
        for peer in list(self._watchers):
            await self._send(peer, message)

    def _snapshot(self) -> ClusterSnapshot:
        return ClusterSnapshot(version=self._version, workers=self._membership.states())


async def run_scheduler(
    address: str,
    *,
    clock: Clock,
    key: ClusterKey | None = None,
    lease_s: float = LEASE_S,
    heartbeat_s: float = HEARTBEAT_S,
) -> None:
    """Be the scheduler at ``address`` until cancelled.

    Raises:
        ConfigError: the port is taken, or the host is not loopback and there is no key.
    """
    async with Listener.bind(address, FAMILY, key=key) as listener:
        log.info("scheduler listening", address=listener.address)
        scheduler = Scheduler(listener.send, clock=clock, lease_s=lease_s, heartbeat_s=heartbeat_s)
        await scheduler.run(listener)
