"""A gateway's subscription to the scheduler: membership, prefix hints and reports on experts,
kept across its loss.

While the scheduler is out of reach, the last known membership stands. A scheduler that has just
been found again may be a new one that knows few workers yet, so for ``settle_s`` nobody is
forgotten because of what it does not say.
"""

from typing import NoReturn

import anyio

from protocol.codec import Decoder
from protocol.errors import WorkerLost
from protocol.ids import GatewayId
from protocol.messages import (
    GATEWAY_ALIVE_S,
    ClusterSnapshot,
    ExpertUpdate,
    FromScheduler,
    PrefixUpdate,
    WatchCluster,
)
from runtime.bus import Connection
from runtime.clock import Clock
from runtime.keys import ClusterKey
from runtime.log import get_log
from server.cluster import Cluster
from server.cluster_view import keep_missing

log = get_log(__name__)

FAMILY: Decoder[FromScheduler] = Decoder(FromScheduler)
RETRY_S = 0.5
SETTLE_S = 5.0


class ClusterWatch:
    def __init__(
        self,
        address: str,
        cluster: Cluster,
        *,
        gateway_id: GatewayId,
        clock: Clock,
        key: ClusterKey | None = None,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._address = address
        self._cluster = cluster
        self._watch = WatchCluster(gateway_id=gateway_id)
        self._clock = clock
        self._key = key
        self._settle_s = settle_s
        self._settled_at = 0.0  # while above 0, members that are not mentioned are kept
        self._snapshot = ClusterSnapshot(version=0, workers=())

    async def run(self) -> NoReturn:
        complained = False
        while True:
            try:
                async with Connection.open(self._address, FAMILY, key=self._key) as connection:
                    complained = False
                    if self._cluster.members:
                        self._settled_at = self._clock.now() + self._settle_s
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._renew, connection)
                        await connection.read(self._hear)
                        tasks.cancel_scope.cancel()
            except WorkerLost:
                pass
            if not complained:
                log.warning("scheduler out of reach, going on with known workers")
                self._cluster.records.note("cluster", "error", "the scheduler is out of reach")
                complained = True
            await self._clock.sleep(RETRY_S)

    async def _renew(self, connection: Connection[FromScheduler]) -> NoReturn:
        while True:
            await connection.send(self._watch)
            await self._clock.sleep(GATEWAY_ALIVE_S)
            if 0 < self._settled_at <= self._clock.now():  # forget whom it has not found again
                self._settled_at = 0.0
                self._cluster.set_members(self._snapshot.workers)

    def _hear(self, message: FromScheduler) -> None:
        if isinstance(message, ClusterSnapshot):
            self._snapshot = message
            workers = message.workers
            if self._settled_at > 0:
                workers = keep_missing(self._cluster.members, workers)
            self._cluster.set_members(workers)
        elif isinstance(message, PrefixUpdate):
            self._cluster.update_prefixes(message)
        elif isinstance(message, ExpertUpdate):
            self._cluster.update_experts(message)
