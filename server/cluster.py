"""One gateway's idea of the cluster, and its way to the workers: what a request flow works with.

Everything known here is a hint, save what a worker has answered to this gateway. A worker counts
as present only while the scheduler lists it and a link to it stands.
"""

from collections.abc import AsyncGenerator, Collection, Iterable
from contextlib import asynccontextmanager

import anyio
from anyio.abc import TaskGroup

from protocol.errors import NoWorkerAvailable, ServingError, WorkerLost
from protocol.ids import GatewayId, WorkerId, WorkerRef
from protocol.messages import Cancel, ExpertUpdate, Prefill, PrefixUpdate, Reserve
from protocol.prefix import HINT_BYTES, block_hashes, fingerprint_digest
from protocol.requests import GenerateRequest
from protocol.workers import ExpertReport, WorkerState
from runtime.clock import Clock
from runtime.keys import ClusterKey
from runtime.log import get_log
from server import policies
from server.attempts import Attempt, Attempts
from server.cluster_view import ClusterView, Pair, view_of
from server.page.membership import Seen, changes, seen
from server.page.records import Records
from server.policies import Demand, Work
from server.prefix_directory import PrefixDirectory
from server.step_writer import StepWriter
from server.unreported import UnreportedWork
from server.waiting_line import WaitingLine
from server.worker_links import WorkerLinks

log = get_log(__name__)

CANCEL_GRACE_S = 2.0
RETRY_AFTER_S = 2.0
RESERVE_ANSWER_S = 10.0  # a worker that has not answered a reservation by then is taken for lost


class Cluster:
    """Built inside the task group that its links live in."""

    def __init__(
        self,
        *,
        gateway_id: GatewayId,
        tasks: TaskGroup,
        clock: Clock,
        max_waiting: int,
        patience_s: float = 0.0,
        key: ClusterKey | None = None,
        writer: StepWriter | None = None,
    ) -> None:
        """``patience_s``: how long an interrupted stream waits for workers to go on with it, and
        how long after workers were there new requests wait for them to be back.
        """
        self.clock = clock
        self.patience_s = patience_s
        self.view = ClusterView()
        self.records = Records(clock)
        self.retries = 0
        self.migrations = 0
        self.topology_changed = anyio.Event()
        self.attempts = Attempts(clock, writer)
        self.links = WorkerLinks(
            gateway_id=gateway_id,
            attempts=self.attempts,
            tasks=tasks,
            clock=clock,
            key=key,
            on_change=self._look_again,
        )
        self._max_waiting = max_waiting
        self._members: tuple[WorkerState, ...] = ()
        self._served_until: dict[str, float] = {}  # by model that lacks workers, and had them
        self._tasks = tasks
        self._seen = Seen()
        self._prefixes = PrefixDirectory()
        self.expert_reports: dict[WorkerRef, ExpertReport] = {}
        self._unreported = UnreportedWork()
        self._lines: dict[tuple[str, Pair | None], WaitingLine] = {}
        tasks.start_soon(self.attempts.expire_forever)
        tasks.start_soon(self.links.say_alive_forever)

    # -- what the scheduler tells ----------------------------------------------------------------

    @property
    def members(self) -> tuple[WorkerState, ...]:
        return self._members

    def set_members(self, members: Iterable[WorkerState]) -> None:
        before = {state.info.ref: state.load for state in self._members}
        self._members = tuple(members)
        for state in self._members:
            if state.load != before.get(state.info.ref):
                self._unreported.reported(state.info.ref)
        for gone in before.keys() - {state.info.ref for state in self._members}:
            self._unreported.reported(gone)
            self._prefixes.forget(gone)
            self.expert_reports.pop(gone, None)
        self.links.follow(state.info for state in self._members)
        self._look_again()

    def update_prefixes(self, update: PrefixUpdate) -> None:
        self._prefixes.apply(update.worker, update.events)

    def update_experts(self, update: ExpertUpdate) -> None:
        known = self.expert_reports.get(update.worker)
        moved = known is not None and known.placement_epoch != update.report.placement_epoch
        for info in (s.info for s in self._members if moved and s.info.ref == update.worker):
            if info.rank == 0:  # the ranks of a group report the same
                self.records.note("experts", "info", f"experts of {info.group_id} have moved")
        self.expert_reports[update.worker] = update.report

    def _look_again(self) -> None:
        before = self.view
        self.view = view_of(s for s in self._members if self.links.is_up(s.info.ref))
        if self.view.pairs() != before.pairs():
            self.topology_changed.set()
            self.topology_changed = anyio.Event()
            self._note_outages(before)
        self._note_changes()
        self._capacity_changed()

    def _note_outages(self, before: ClusterView) -> None:
        for model in {state.info.model for state in before.decode}:
            if before.lack(model) is None and self.view.lack(model) is not None:
                self._served_until[model] = self.clock.now()
                self._tasks.start_soon(self._give_up_later)

    async def _give_up_later(self) -> None:
        """Let those who wait for workers try once more when there is no hope left."""
        await self.clock.sleep(self.patience_s)
        self._capacity_changed()

    def _may_be_back(self, attempt: Attempt) -> bool:
        """Workers for the request were there not long ago. Canaries ask for workers that are."""
        until = self._served_until.get(attempt.request.model)
        waits = until is not None and self.clock.now() < until + self.patience_s
        return waits and attempt.within is None

    def _note_changes(self) -> None:
        before, self._seen = self._seen, seen(self._members, self.links.is_up)
        for severity, text in changes(before, self._seen):
            self.records.note("worker", severity, text)

    # -- what a request flow does ----------------------------------------------------------------

    @asynccontextmanager
    async def attempt(
        self,
        request: GenerateRequest,
        *,
        deadline: float,
        avoid: Collection[WorkerId] = (),
        within: Pair | None = None,
    ) -> AsyncGenerator[Attempt]:
        """An attempt for the duration of the block; unless it has finished, leaving the block
        cancels it at both workers.
        """
        attempt = self.attempts.open(
            Attempt(request, deadline=deadline, avoid=avoid, within=within)
        )
        try:
            with self.records.attempt(attempt):
                yield attempt
        finally:
            self.attempts.close(attempt)
            for worker in list(attempt.work):
                self.release(attempt, worker)
            self._capacity_changed()
            if not attempt.finished:
                # Shielded: the task is usually already cancelled when it gets here.
                with anyio.move_on_after(CANCEL_GRACE_S, shield=True):
                    await self._cancel(attempt)

    def remaining_s(self, attempt: Attempt) -> float:
        return max(0.0, attempt.deadline - self.clock.now())

    def line(self, attempt: Attempt) -> WaitingLine:
        """Where the request waits its turn. Canaries do not stand in the way of requests."""
        key = (attempt.request.model, attempt.within)
        if key not in self._lines:
            self._lines = {k: line for k, line in self._lines.items() if len(line) or k[1] is None}
            self._lines[key] = WaitingLine(capacity=self._max_waiting, clock=self.clock)
        return self._lines[key]

    @property
    def waiting_requests(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def decode_ranks(self, attempt: Attempt, *, behind: bool) -> list[WorkerState]:
        """Ranks to ask for a reservation, best first; none while all are full, or workers are away
        that may be back. ``behind``: others wait before it, and only callers that hold too much may
        give way for it.

        Raises:
            NoWorkerAvailable: not even later: nobody serves the model.
            ContextLengthExceeded: no rank is large enough.
        """
        lack = self.view.lack(attempt.request.model)
        if lack is not None:
            if self._may_be_back(attempt):
                return []
            raise self._nobody(lack)
        ranks = self.view.decode
        if attempt.within is not None:
            ranks = tuple(s for s in ranks if s.info.ref in attempt.within.decode)
        return policies.decode_order(
            ranks,
            self._demand(attempt),
            unreported=self._unreported.since_report,
            avoid=attempt.avoid,
            behind=behind,
        )

    def prefill_worker(self, attempt: Attempt) -> WorkerState:
        """The worker that should compute the prompt.

        Raises:
            NoWorkerAvailable: there is none, or only such that drain.
        """
        workers = self.view.prefill
        if attempt.within is not None:
            workers = tuple(s for s in workers if s.info.ref == attempt.within.prefill)
        order = policies.prefill_order(
            workers,
            self._demand(attempt),
            unreported=self._unreported.since_report,
            avoid=attempt.avoid,
        )
        if not order:
            raise self._nobody("no prefill worker")
        return order[0]

    async def ask(self, attempt: Attempt, worker: WorkerState, message: Reserve | Prefill) -> None:
        """Give ``worker`` its part; its answer, or its loss, is told to the attempt."""
        ref = worker.info.ref
        demand = self._demand(attempt)
        if isinstance(message, Reserve):
            attempt.asks_decode(ref, answer_by=self.clock.now() + RESERVE_ANSWER_S)
            self.records.asks_decode(attempt)
            work = Work(requests=1, blocks=policies.blocks_needed(worker, demand))
        else:
            attempt.asks_prefill(ref)
            self.records.asks_prefill(attempt)
            work = Work(requests=1, tokens=policies.uncached_tokens(ref, demand))
        self._unreported.begun(ref, work)
        attempt.work[ref] = work
        try:
            await self.links.send(ref, message)
        except WorkerLost as lost:
            attempt.fail(lost)

    def note_retry(self, attempt: Attempt, error: ServingError) -> None:
        """The attempt has failed, and there will be another."""
        migrates = bool(attempt.written and attempt.workers)
        self.records.retried(attempt, migrates=migrates)
        if not attempt.workers:
            return  # nobody was asked: it waits for workers that can go on
        log.warning(
            "the stream goes on elsewhere" if migrates else "trying elsewhere",
            request=attempt.ref.request_id,
            written=len(attempt.written),
            error=str(error),
        )
        self.retries += 1
        self.migrations += migrates

    def release(self, attempt: Attempt, worker: WorkerRef) -> None:
        """The worker holds nothing of the attempt: it is not counted there any more."""
        work = attempt.work.pop(worker, None)
        if work is not None:
            self._unreported.ended(worker, work)

    def prefilled(self, attempt: Attempt, worker: WorkerState) -> None:
        """Prefill has done its part: others may have what it held for the attempt."""
        blocks = len(attempt.grant.block_ids) if attempt.grant is not None else 0
        self.records.first_token(attempt, kv_bytes=blocks * worker.info.layout.block_bytes)
        self.release(attempt, worker.info.ref)
        self._capacity_changed()

    async def _cancel(self, attempt: Attempt) -> None:
        for worker in attempt.workers:
            if self.links.is_up(worker):
                await self.links.send(worker, Cancel(ref=attempt.ref))

    def _capacity_changed(self) -> None:
        for line in self._lines.values():
            line.changed()

    @staticmethod
    def _nobody(reason: str) -> NoWorkerAvailable:
        return NoWorkerAvailable(reason, stage="queue", retry_after_s=RETRY_AFTER_S)

    def _demand(self, attempt: Attempt) -> Demand:
        if attempt.demand is None:
            attempt.demand = self._appraise(attempt.request)
        return attempt.demand

    def _appraise(self, request: GenerateRequest) -> Demand:
        workers = [s for s in self.view.prefill if s.info.model == request.model]
        hits: dict[WorkerRef, int] = {}
        if len(workers) > 1:  # with one there is nothing to choose, so nothing to hash
            info = workers[0].info
            block_tokens = info.layout.block_tokens
            names = block_hashes(
                request.context_token_ids,
                block_tokens=block_tokens,
                namespace=request.namespace,
                fingerprint=fingerprint_digest(info.fingerprint),
            )
            hints = [name[:HINT_BYTES] for name in names]
            hits = {
                s.info.ref: block_tokens * self._prefixes.hit_blocks(s.info.ref, hints)
                for s in workers
            }
        return Demand(
            request_id=request.request_id,
            model=request.model,
            prompt_tokens=request.num_context_tokens,
            caller=request.caller,
            priority=request.priority,
            hit_tokens=hits,
        )
