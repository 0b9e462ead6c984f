"""The gateway's connections to workers: one a worker, read by one task, shared by all requests.

A link stands for one life of one worker. When it breaks, everything that was expected of the
worker has failed, and the worker counts as absent until a new link stands. Frames are handed to
the attempts they are about; what is stale or about nobody is dropped and counted here.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import anyio
from anyio.abc import TaskGroup

from protocol.codec import Decoder
from protocol.errors import WorkerLost
from protocol.ids import GatewayId, RequestId, WorkerRef
from protocol.messages import (
    GATEWAY_ALIVE_S,
    FromWorker,
    GatewayAlive,
    Granted,
    Message,
    StepTokens,
    TokenDelta,
)
from protocol.plain_tokens import RECORD_BYTES, PlainToken, plain_token
from protocol.workers import WorkerInfo
from runtime.bus import Connection
from runtime.clock import Clock
from runtime.keys import ClusterKey
from runtime.log import get_log
from server.attempts import Attempt, Attempts

log = get_log(__name__)

FAMILY: Decoder[FromWorker] = Decoder(FromWorker)
RECONNECT_S = 0.5


class WorkerLinks:
    """Links live in ``tasks``; cancelling it closes them all."""

    def __init__(
        self,
        *,
        gateway_id: GatewayId,
        attempts: Attempts,
        tasks: TaskGroup,
        clock: Clock,
        key: ClusterKey | None = None,
        on_change: Callable[[], None],
    ) -> None:
        """``on_change`` is called after a link has come up or gone down."""
        self._gateway_id = gateway_id
        self._attempts = attempts
        self._tasks = tasks
        self._clock = clock
        self._key = key
        self._on_change = on_change
        self._scopes: dict[WorkerRef, anyio.CancelScope] = {}
        self._up: dict[WorkerRef, Connection[FromWorker]] = {}
        self._plain: list[tuple[WorkerRef, bytes]] = []  # in this turn of the event loop
        self.stale_frames = 0

    def follow(self, workers: Iterable[WorkerInfo]) -> None:
        """Keep links to exactly these workers; those that are missing are lost at once."""
        wanted = {info.ref: info for info in workers}
        for ref in self._scopes.keys() - wanted.keys():
            self._scopes.pop(ref).cancel()
            self._down(ref)
        for ref in wanted.keys() - self._scopes.keys():
            scope = self._scopes[ref] = anyio.CancelScope()
            self._tasks.start_soon(self._keep, wanted[ref], scope)

    def is_up(self, worker: WorkerRef) -> bool:
        return worker in self._up

    async def send(self, worker: WorkerRef, message: Message) -> None:
        """Queue ``message`` for the worker.

        Raises:
            WorkerLost: there is no link to it now.
        """
        connection = self._up.get(worker)
        if connection is None:
            raise WorkerLost(f"{worker.worker_id} was lost")
        await connection.send(message)

    async def say_alive_forever(self) -> None:
        while True:
            await self._clock.sleep(GATEWAY_ALIVE_S)
            for worker in list(self._up):
                if self.is_up(worker):
                    await self.send(worker, GatewayAlive(gateway_id=self._gateway_id))

    async def _keep(self, info: WorkerInfo, scope: anyio.CancelScope) -> None:
        with scope:
            while True:
                try:
                    async with Connection.open(info.address, FAMILY, key=self._key) as connection:
                        await connection.send(GatewayAlive(gateway_id=self._gateway_id))
                        await self._read(info.ref, connection)
                except WorkerLost as error:
                    log.debug("worker out of reach", worker=info.ref.worker_id, error=str(error))
                await self._clock.sleep(RECONNECT_S)

    async def _read(self, worker: WorkerRef, connection: Connection[FromWorker]) -> None:
        self._up[worker] = connection
        self._on_change()
        try:
            await connection.read(partial(self._hear, worker))
        finally:
            if self._up.get(worker) is connection:
                self._down(worker)

    def _down(self, worker: WorkerRef) -> None:
        self._write_plain()
        if self._up.pop(worker, None) is not None:
            log.info("worker link down", worker=worker.worker_id)
            self._attempts.worker_lost(worker)
            self._on_change()

    def _step(self, worker: WorkerRef, frame: StepTokens) -> None:
        """The hot path: every token of every stream passes here. Plain ones wait for the end of
        the turn, because a gateway that has fallen behind finds several steps in one.
        """
        if frame.worker != worker or len(frame.plain) % RECORD_BYTES:
            self.stale_frames += len(frame.deltas) + len(frame.plain) // RECORD_BYTES
            return
        if frame.plain:
            if not self._plain:
                asyncio.get_running_loop().call_soon(self._write_plain)
            self._plain.append((worker, frame.plain))
        if frame.deltas:
            self._write_plain()
            for delta in frame.deltas:
                self._take(delta, worker)

    def _take(self, delta: TokenDelta, worker: WorkerRef) -> None:
        attempt = self._attempts.by_request.get(delta.ref.request_id)
        if attempt is None or not attempt.take(delta, worker):
            self.stale_frames += 1

    def _write_plain(self) -> None:
        if not self._plain:
            return
        frames, self._plain = self._plain, []
        records = bytearray().join(frame for _, frame in frames)
        left = self._unwritten(records)
        if not left:
            return
        workers = [w for w, frame in frames for _ in range(len(frame) // RECORD_BYTES)]
        entered = bytearray()  # what is to be written after all
        streams: set[int] = set()
        by_stream, writer = self._attempts.by_stream, self._attempts.writer
        for place in left:
            token = plain_token(records, place)
            attempt = by_stream.get(token.stream)
            if attempt is None:
                self.stale_frames += 1
            elif token.stream in streams or (
                writer is not None and attempt.enter_writer(writer, token, workers[place])
            ):
                streams.add(token.stream)
                entered += records[place * RECORD_BYTES : (place + 1) * RECORD_BYTES]
            else:
                self._take_plain(attempt, token, workers[place])
        for place in self._unwritten(entered):
            token = plain_token(entered, place)
            attempt = by_stream[token.stream]
            assert attempt.decode is not None
            self._take_plain(attempt, token, attempt.decode)

    def _unwritten(self, records: bytearray) -> Sequence[int]:
        """The records that the step writer has left, in order; by place."""
        writer = self._attempts.writer
        if writer is None:
            return range(len(records) // RECORD_BYTES)
        left, behind = writer.write(records) if records else ((), ())
        for stream in behind:
            self._attempts.by_stream[stream].leave_writer()
        return left

    def _take_plain(self, attempt: Attempt, token: PlainToken, worker: WorkerRef) -> None:
        delta = TokenDelta(attempt.ref, token.offset, (token.token_id,), None, None)
        if not attempt.take(delta, worker):
            self.stale_frames += 1

    def _hear(self, worker: WorkerRef, message: FromWorker) -> None:
        if isinstance(message, StepTokens):
            self._step(worker, message)
            return
        self._write_plain()
        attempt = self._attempts.by_request.get(_request_of(message))
        if attempt is None or not attempt.hear(message):
            self.stale_frames += 1


def _request_of(message: FromWorker) -> RequestId:
    assert not isinstance(message, StepTokens)
    return message.grant.ref.request_id if isinstance(message, Granted) else message.ref.request_id
