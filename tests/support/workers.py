"""Workers without a model: they speak the real bus protocol, and their tokens are arithmetic.

KV does not exist; that it has arrived is said through a ``Fabric``, which the workers of one
process share. Time comes from a clock, so they can be as slow as a test or benchmark wants.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskStatus

from protocol.codec import Decoder
from protocol.errors import Overloaded, ServingError
from protocol.ids import (
    AttemptRef,
    BlockId,
    Generation,
    WorkerRef,
)
from protocol.kv import Grant, KVEndpoint
from protocol.messages import (
    Cancel,
    GatewayAlive,
    Granted,
    Prefill,
    PrefillDone,
    PrefillTimes,
    Rejected,
    RequestFailed,
    Reserve,
    StepTokens,
    ToDecode,
    TokenDelta,
    ToPrefill,
)
from protocol.plain_tokens import pack_token
from protocol.reports import report_of
from protocol.requests import GenerateRequest
from protocol.workers import PrefixEvents, WorkerInfo, WorkerLoad
from runtime.bus import Listener
from runtime.clock import Clock, MonotonicClock
from runtime.registration import Registration
from tests.support.arithmetic import (
    LAYOUT,
    MODEL,
    a_worker_info,
    finish_of,
    next_token,
    token_after,
)


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow the workers are. At 0 they answer as fast as they can."""

    first_token_s: float = 0.0
    step_s: float = 0.0


@dataclass(slots=True)
class Fabric:
    """Stands for the KV transfer: prefill commits a grant at the decode rank that gave it."""

    ranks: dict[WorkerRef, "SimulatedDecode"] = field(default_factory=dict)

    def commit(self, grant: Grant, token: int) -> None:
        rank = self.ranks.get(grant.decode)
        if rank is not None:
            rank.committed(grant.ref, token)


class _Worker:
    """What the two simulated roles share: a bus listener and a registration."""

    family: Decoder[Any]

    def __init__(self, info: WorkerInfo, fabric: Fabric, pace: Pace, clock: Clock) -> None:
        self.info = info
        self.ref = info.ref
        self.fabric = fabric
        self.pace = pace
        self.clock = clock
        self.draining = False
        self._serving = anyio.CancelScope()
        self._registered = anyio.CancelScope()
        self.gateways: set[bytes] = set()
        self._listener: Listener[Any]

    def load(self) -> WorkerLoad:
        raise NotImplementedError

    def prefix(self, _snapshot: bool) -> PrefixEvents | None:
        return None

    def crash(self) -> None:
        """Stop answering at once, as a killed process does; the scheduler is not told."""
        self._serving.cancel()

    async def serve(
        self, scheduler: str, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        async with anyio.create_task_group() as tasks:
            with self._serving:
                async with Listener.bind("tcp://127.0.0.1:0", self.family) as listener:
                    self._listener = listener
                    tasks.start_soon(self.register, scheduler, listener.address)
                    task_status.started()
                    await self.work(listener)

    async def work(self, listener: Listener[Any]) -> None:
        raise NotImplementedError

    async def register(self, scheduler: str, address: str) -> None:
        self.info = msgspec.structs.replace(self.info, address=address)
        registration = Registration(
            scheduler, info=lambda: self.info, load=self.load, prefix=self.prefix
        )
        with self._registered:
            await registration.run()


@dataclass(slots=True)
class _Running:
    peer: bytes
    request: GenerateRequest
    last: int
    offset: int
    blocks: int


class SimulatedDecode(_Worker):
    """One decode rank. ``full`` makes it reject and say so beforehand, ``reject_all`` only reject;
    ``paused`` makes it hold its steps.
    """

    family = Decoder[ToDecode](ToDecode)

    def __init__(
        self,
        worker_id: str = "decode-0/0",
        *,
        fabric: Fabric,
        rank: int = 0,
        world_size: int = 1,
        group_id: str = "decode-0",
        epoch: int = 1,
        num_blocks: int = 1000,
        pace: Pace = Pace(),
        clock: Clock | None = None,
        model: str = MODEL,
    ) -> None:
        info = a_worker_info(
            worker_id,
            "decode",
            group_id=group_id,
            rank=rank,
            world_size=world_size,
            epoch=epoch,
            num_blocks=num_blocks,
            model=model,
        )
        super().__init__(info, fabric, pace, clock or MonotonicClock())
        fabric.ranks[self.ref] = self
        self.free_blocks = num_blocks
        self.full = False
        self.reject_all = False
        self.silent = False  # takes reservations and says nothing
        self.paused = False
        self.frame_hook: Callable[[StepTokens], list[StepTokens]] = lambda frame: [frame]
        self.reservations = 0
        self.cancelled: list[AttemptRef] = []
        self._granted: dict[AttemptRef, tuple[bytes, GenerateRequest, Grant]] = {}
        self._running: dict[AttemptRef, _Running] = {}
        self._tombstones: set[AttemptRef] = set()
        self._work = anyio.Event()
        self._steps = 0

    @property
    def busy(self) -> int:
        return len(self._granted) + len(self._running)

    def load(self) -> WorkerLoad:
        return WorkerLoad(
            draining=self.draining,
            queued_requests=len(self._granted),
            running_requests=len(self._running),
            free_blocks=0 if self.full else self.free_blocks,
            total_blocks=self.info.num_blocks,
        )

    async def work(self, listener: Listener[Any]) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._step_forever)
            async for peer, message in listener:
                await self._hear(peer, message)

    async def _hear(self, peer: bytes, message: ToDecode) -> None:
        match message:
            case Reserve():
                answer = self._reserve(peer, message)
                if answer is not None:
                    await self._listener.send(peer, answer)
            case Cancel(ref=ref):
                self.cancelled.append(ref)
                self._release(ref)
            case GatewayAlive():
                self.gateways.add(peer)

    def _reserve(self, peer: bytes, message: Reserve) -> Granted | Rejected | None:
        self.reservations += 1
        request = message.request
        needed = LAYOUT.blocks_for(request.num_context_tokens)
        if request.ref in self._tombstones or self.silent:
            return None
        if self.full or self.reject_all or needed > self.free_blocks:
            error = report_of(Overloaded("no free blocks", stage="reserve"))
            return Rejected(ref=request.ref, worker=self.ref, error=error)
        self.free_blocks -= needed
        grant = Grant(
            ref=request.ref,
            decode=self.ref,
            generation=Generation(self.reservations),
            block_ids=tuple(BlockId(block) for block in range(needed)),
            layout_digest=LAYOUT.digest(),
            endpoint=KVEndpoint(host_id="here", num_blocks=self.info.num_blocks, addresses={}),
            lease_s=30.0,
        )
        self._granted[request.ref] = (peer, request, grant)
        return Granted(grant=grant)

    def committed(self, ref: AttemptRef, token: int) -> None:
        """The KV of ``ref`` has arrived, and ``token`` is its first."""
        granted = self._granted.get(ref)
        if granted is None:
            return
        peer, request, grant = granted
        outputs = len(request.output_token_ids) + 1
        if finish_of(request, token, outputs) is not None:
            self._release(ref)
            return
        del self._granted[ref]
        self._running[ref] = _Running(
            peer=peer,
            request=request,
            last=token,
            offset=outputs,
            blocks=len(grant.block_ids),
        )
        self._work.set()

    async def fail(self, ref: AttemptRef, error: ServingError) -> None:
        """End a request here with ``error``."""
        peer = self._running[ref].peer if ref in self._running else self._granted[ref][0]
        self._release(ref)
        report = report_of(error, stage="decode")
        await self._listener.send(peer, RequestFailed(ref=ref, worker=self.ref, error=report))

    def refs(self) -> list[AttemptRef]:
        return [*self._granted, *self._running]

    def _release(self, ref: AttemptRef) -> None:
        self._tombstones.add(ref)
        if ref in self._granted:
            self.free_blocks += len(self._granted.pop(ref)[2].block_ids)
        elif ref in self._running:
            self.free_blocks += self._running.pop(ref).blocks

    async def _step_forever(self) -> None:
        due = self.clock.now()
        while True:
            while not self._running or self.paused:
                self._work = anyio.Event()
                await self._work.wait()
                due = self.clock.now()
            due += self.pace.step_s
            await self.clock.sleep(max(0.0, due - self.clock.now()))
            for peer, frame in self._step():
                for sent in self.frame_hook(frame):
                    await self._listener.send(peer, sent)

    def resume(self) -> None:
        self.paused = False
        self._work.set()

    def _step(self) -> list[tuple[bytes, StepTokens]]:
        self._steps += 1
        deltas: dict[bytes, list[TokenDelta]] = {}
        plain: dict[bytes, bytearray] = {}
        for ref, running in list(self._running.items()):
            token = next_token(running.last, running.offset)
            finish = finish_of(running.request, token, running.offset + 1)
            stream = running.request.stream
            if stream and finish is None:
                record = pack_token(stream, running.offset, token)
                plain.setdefault(running.peer, bytearray()).extend(record)
            else:
                delta = TokenDelta(ref, running.offset, (token,), None, finish)
                deltas.setdefault(running.peer, []).append(delta)
            running.last, running.offset = token, running.offset + 1
            if finish is not None:
                self._release(ref)
        return [
            (
                peer,
                StepTokens(
                    worker=self.ref,
                    step=self._steps,
                    deltas=tuple(deltas.get(peer, ())),
                    plain=bytes(plain.get(peer, b"")),
                ),
            )
            for peer in {**deltas, **plain}
        ]


class SimulatedPrefill(_Worker):
    """A prefill worker with one queue. ``errors`` are given to the next requests instead."""

    family = Decoder[ToPrefill](ToPrefill)

    def __init__(
        self,
        worker_id: str = "prefill-0",
        *,
        fabric: Fabric,
        pace: Pace = Pace(),
        clock: Clock | None = None,
        model: str = MODEL,
    ) -> None:
        info = a_worker_info(worker_id, "prefill", model=model)
        super().__init__(info, fabric, pace, clock or MonotonicClock())
        self.errors: list[ServingError] = []
        self.silent = False  # takes prompts and says nothing
        self.prompts = 0
        self.cancelled: list[AttemptRef] = []
        self.prefix_events: list[PrefixEvents] = []
        self._jobs: dict[AttemptRef, anyio.CancelScope] = {}

    @property
    def busy(self) -> int:
        return len(self._jobs)

    def load(self) -> WorkerLoad:
        return WorkerLoad(draining=self.draining, running_requests=len(self._jobs))

    def prefix(self, _snapshot: bool) -> PrefixEvents | None:
        return self.prefix_events.pop(0) if self.prefix_events else None

    async def work(self, listener: Listener[Any]) -> None:
        async with anyio.create_task_group() as jobs:
            async for peer, message in listener:
                match message:
                    case Prefill():
                        jobs.start_soon(self._prefill, peer, message)
                    case Cancel(ref=ref):
                        self.cancelled.append(ref)
                        if ref in self._jobs:
                            self._jobs[ref].cancel()
                    case GatewayAlive():
                        self.gateways.add(peer)

    async def _prefill(self, peer: bytes, job: Prefill) -> None:
        self.prompts += 1
        ref = job.request.ref
        with anyio.CancelScope() as scope:
            self._jobs[ref] = scope
            try:
                if self.silent:
                    await anyio.sleep_forever()
                await self.clock.sleep(self.pace.first_token_s)
                answer = self._answer(job)
                await self._listener.send(peer, answer)
                if isinstance(answer, PrefillDone):
                    self.fabric.commit(job.grant, answer.token_id)
            finally:
                del self._jobs[ref]

    def _answer(self, job: Prefill) -> PrefillDone | RequestFailed:
        ref = job.request.ref
        if self.errors:
            report = report_of(self.errors.pop(0), stage="prefill")
            return RequestFailed(ref=ref, worker=self.ref, error=report)
        token = token_after(job.request)
        return PrefillDone(
            ref=ref,
            worker=self.ref,
            token_id=token,
            logprobs=None,
            finish_reason=finish_of(job.request, token, len(job.request.output_token_ids) + 1),
            cached_tokens=0,
            times=PrefillTimes(0.0, self.pace.first_token_s),
        )


@asynccontextmanager
async def serve_workers(
    scheduler: str, workers: Sequence[SimulatedPrefill | SimulatedDecode]
) -> "AsyncGenerator[Callable[[SimulatedPrefill | SimulatedDecode], Awaitable[None]]]":
    """Run the workers for the duration of the block; call what it yields to add one more."""
    async with anyio.create_task_group() as tasks:

        async def add(worker: SimulatedPrefill | SimulatedDecode) -> None:
            await tasks.start(worker.serve, scheduler)

        for worker in workers:
            await add(worker)
        yield add
        tasks.cancel_scope.cancel()
