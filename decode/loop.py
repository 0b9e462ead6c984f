"""The engine thread of one decode rank: in lock-step with the other ranks of its group.

A turn is: take what was posted, plan this rank's step, exchange rows with the other ranks, and
compute if any of them has work. No turn skips the exchange, and what a rank does after it follows
from the rows alone (``decode.lockstep``).

When a rank is lost, the others meet again and go on where they were: a step that came to nothing
is computed anew, and writes the same KV to the same places. Only where too few are left to hold
every expert do the requests here end with ``WorkerLost``. Everything here belongs to one thread;
other threads only post work to its inbox.
"""

import threading
import time
from collections.abc import Callable, Sequence

import torch

from decode.intake import Arrived, Intake, Lost
from decode.interruption import Interruption
from decode.load import LoadAccount
from decode.lockstep import RankState, StepPlan, StepRow, decide
from decode.outputs import Outputs
from decode.rebalance import ExpertMoves
from decode.scheduler import DecodeScheduler, DecodeStep
from decode.swap import SwapSpace
from decode.two_batches import TwoBatches
from engine.collectives import StepGroup
from engine.experts.meter import ExchangeMeter
from engine.meeting.joining import Meeting
from engine.model_runner import ModelRunner, SequenceStep, batch_from
from engine.sampling.sampler import Sampler
from kvtransfer.interface import SinkEvent
from protocol.errors import Cancelled, DeadlineExceeded, ServingError, WorkerLost
from protocol.ids import AttemptRef, BlockId, WorkerRef
from protocol.messages import (
    GATEWAY_SILENT_S,
    Cancel,
    GatewayAlive,
    Granted,
    RequestFailed,
    Reserve,
    ToDecode,
)
from protocol.reports import report_of
from runtime.clients import Clients
from runtime.log import get_log
from runtime.mailbox import Inbox, Outbox
from runtime.worker_process import Beat, ToPeer

log = get_log(__name__)

IDLE_WAIT_S = 0.5
SWEEP_S = 1.0


class DecodeLoop:
    def __init__(
        self,
        *,
        worker: WorkerRef,
        seat: int,
        scheduler: DecodeScheduler,
        intake: Intake,
        swap: SwapSpace,
        runner: ModelRunner,
        sampler: Sampler,
        experts: ExpertMoves,
        meter: ExchangeMeter,
        two_batches: TwoBatches,
        meeting: Meeting,
        least_ranks: int,
        outbox: Outbox[ToPeer],
        on_membership: Callable[[], object],
        land: Callable[[Sequence[BlockId]], None],
        device: torch.device,
    ) -> None:
        """``least_ranks`` have slots for every expert. ``on_membership`` is called when ``epoch``
        has changed. ``land`` brings arrived blocks from where the transports wrote to where the
        engine reads.
        """
        self._worker = worker
        self._seat = seat
        self._scheduler = scheduler
        self._intake = intake
        self._swap = swap
        self._runner = runner
        self._sampler = sampler
        self._experts = experts
        self._meter = meter
        self._two_batches = two_batches
        self._meeting = meeting
        self._least_ranks = least_ranks
        self._outbox = outbox
        self._on_membership = on_membership
        self._land = land
        self._device = device
        self._inbox: Inbox[Callable[[], None]] = Inbox()
        self._clients = Clients(silent_s=GATEWAY_SILENT_S)
        self._outputs = Outputs(worker, self._clients, outbox)
        self._stopped = threading.Event()
        self._sweep = Beat(SWEEP_S)
        self._interruption = Interruption(meter)
        self.account = LoadAccount(scheduler, intake, meter)
        self.epoch: int | None = None  # of the group; None while this rank cannot serve
        self.members: tuple[int, ...] = ()  # the group's seats that are taken

    # From any thread -----------------------------------------------------------------------------

    def post(self, peer: bytes, message: ToDecode) -> None:
        self._inbox.put(lambda: self._hear(peer, message))

    def post_transfer(self, event: SinkEvent) -> None:
        self._inbox.put(lambda: self._transferred(event))

    def drain(self) -> None:
        def start_draining() -> None:
            self._intake.draining = True

        self._inbox.put(start_draining)

    def stop(self) -> None:
        self._stopped.set()
        self._inbox.put(lambda: None)

    # On the engine thread ------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._serve()
        finally:
            self._meeting.close()
            self._intake.close()

    def _serve(self) -> None:
        """Form groups, one after another, until the ranks leave together or this one is stopped."""
        leaving: tuple[int, ...] = ()
        while not self._stopped.is_set():
            try:
                held = bool(len(self._outputs) + len(self._intake))
                group = self._meeting.form(self._stopped.is_set, leaving, briefly=held)
            except (WorkerLost, DeadlineExceeded, Cancelled) as error:
                log.warning("the group is not complete", reason=str(error))
                self._leave(error)
                continue
            try:
                self._experts.enter_group(group.members)
                self._runner.connect()
                self._enter(group)
                plan = self._step_together(group)
            except WorkerLost as error:
                leaving = ()
                self._interruption.broken(group, error)
                if len(group.members) <= self._least_ranks:
                    self._leave(error)
                continue
            finally:
                group.close()
            if plan is None or plan.kind == "stop" or self._seat in plan.leaving:
                break
            leaving = plan.leaving
            self._interruption.parted(group)
        self._forget_group()

    def _step_together(self, group: StepGroup) -> StepPlan | None:
        """Until the group ends as planned; None where this rank is stopped."""
        while not self._stopped.is_set():
            plan = self._turn(group)
            if plan.kind in ("stop", "regroup"):
                return plan
            self._interruption.passed(group, plan.kind)
        return None

    def _enter(self, group: StepGroup) -> None:
        if self.epoch is not None and group.epoch > self.epoch + 1:
            # Others had a group meanwhile, and gateways have heard that it was without this rank:
            # its requests are elsewhere, as are those that came before it stood still.
            for work in self._inbox.drain():
                work()
            self._end_all(WorkerLost("the group went on without this rank", stage="decode"))
        self.epoch, self.members = group.epoch, group.members
        self._interruption.met(group)
        self._two_batches.reset()
        self._on_membership()

    def _leave(self, error: ServingError) -> None:
        """There is no group to go on in: every request here ends, and its client is told."""
        self._forget_group()
        self._end_all(error)

    def _end_all(self, error: ServingError) -> None:
        for ref in self._outputs.refs:
            self._fail(ref, error)
        for ref in self._intake.abort_all():
            self._tell_failed(ref, error)

    def _forget_group(self) -> None:
        self.epoch, self.members = None, ()
        self._on_membership()

    def _turn(self, group: StepGroup) -> StepPlan:
        """One step of the group, and what was done in it.

        Raises:
            WorkerLost: the group has broken. Nothing that was promised is lost: the step is planned
                again in the next group.
        """
        for work in self._inbox.drain():
            work()
        now = time.monotonic()
        if self._sweep.due(now):
            self._let_go(now)
        step = self._scheduler.schedule()
        for swap in step.swap_out:
            self._swap.put(swap.ref, swap.blocks)
        for swap in step.swap_in:
            self._swap.take(swap.ref, swap.blocks)
        came = time.perf_counter()
        rows = group.exchange(self._row(step, group.epoch).to_ints())
        waited_s = time.perf_counter() - came
        plan = decide([StepRow.from_ints(row) for row in rows], least_ranks=self._least_ranks)
        self._meter.add_row_exchange(waited_s, plan.skew_us)
        self._experts.follow(plan.experts, group)
        if plan.kind == "decode":
            group.expert_group.begin_step(plan.tokens_of_rank)
            in_two = self._two_batches.decide(plan.tokens_of_rank, plan.computed_us)
            began = time.perf_counter()
            self._compute(step, in_two=in_two)
            self._meter.add_step(time.perf_counter() - began, in_two=in_two)
            self._experts.after_step()
            self.account.stepped(time.monotonic() - now, len(step.refs))
        elif plan.kind == "restore":
            self._experts.restore(group, plan.teller)
        elif plan.kind == "idle":
            self.account.look()
            # Alone there is nobody to keep pace with.
            self._inbox.wait(plan.pace_s if group.world_size > 1 else IDLE_WAIT_S)
        return plan

    def _compute(self, step: DecodeStep, *, in_two: bool) -> None:
        try:
            batch = batch_from(
                [
                    SequenceStep(
                        token_ids=(token,),
                        start=position,
                        block_table=table.blocks,
                        key=self._outputs.key_of(ref),
                    )
                    for ref, token, position, table in zip(
                        step.refs, step.token_ids, step.positions, step.tables, strict=True
                    )
                ],
                block_tokens=self._runner.storage.layout.block_tokens,
                device=self._device,
            )
            logits = self._runner.run(batch, in_two=in_two)
            if not step.refs:
                return
            sampled = self._sampler.sample(logits, step.refs)
        except ServingError:
            raise
        except Exception as error:
            # The other ranks may wait for this one inside a collective: only a new group helps.
            # What failed once would fail again, so these requests end here.
            log.exception("decode step failed", requests=len(step.refs))
            lost = WorkerLost(f"a decode step failed: {type(error).__name__}", stage="decode")
            for ref in list(step.refs):
                self._fail(ref, lost)
            raise lost from error
        self._scheduler.advance(step, sampled.token_ids)
        for ref, failure in sampled.errors.items():
            self._fail(ref, failure)
        for ref in self._outputs.tell(step.refs, sampled):
            self._end(ref)

    # What is posted ------------------------------------------------------------------------------

    def _hear(self, peer: bytes, message: ToDecode) -> None:
        now = time.monotonic()
        self._clients.heard(peer, now)
        match message:
            case Reserve():
                answer = self._intake.reserve(message, now)
                if isinstance(answer, Granted):
                    self._clients.own(peer, message.request.ref)
                self._outbox.put([(peer, answer)])
            case Cancel(ref=ref):
                self._cancel(ref)
            case GatewayAlive():
                pass

    def _transferred(self, event: SinkEvent) -> None:
        outcome = self._intake.hear(event)
        if isinstance(outcome, Arrived):
            self._join(outcome)
        elif isinstance(outcome, Lost):
            self._tell_failed(outcome.ref, outcome.error)

    def _join(self, arrived: Arrived) -> None:
        request, hand_off = arrived.request, arrived.hand_off
        self._scheduler.commit(request.ref, hand_off.token_id)
        if hand_off.finish_reason is not None:
            self._scheduler.finish(request.ref)
            self._clients.disown(request.ref)
            return
        if not arrived.on_device:
            self._land(arrived.block_ids)
        outputs = (*request.output_token_ids, hand_off.token_id)
        self._outputs.begin(request, len(outputs))
        try:
            self._sampler.admit(request, outputs)
        except ServingError as error:
            self._fail(request.ref, error)

    def _cancel(self, ref: AttemptRef) -> None:
        if ref in self._outputs:
            self._end(ref)
        else:
            self._intake.cancel(ref)
            self._clients.disown(ref)

    # Ends ----------------------------------------------------------------------------------------

    def _end(self, ref: AttemptRef) -> None:
        """Free everything that a committed request holds here."""
        self._outputs.end(ref)
        self._scheduler.finish(ref)
        self._swap.discard(ref)
        self._sampler.retire(ref)
        self._clients.disown(ref)

    def _fail(self, ref: AttemptRef, error: ServingError) -> None:
        self._tell_failed(ref, error)
        self._end(ref)

    def _tell_failed(self, ref: AttemptRef, error: ServingError) -> None:
        peer = self._clients.owner(ref)
        if peer is not None:
            report = report_of(error, stage="decode")
            self._outbox.put([(peer, RequestFailed(ref=ref, worker=self._worker, error=report))])
        self._clients.disown(ref)

    def _let_go(self, now: float) -> None:
        for ref in self._clients.remove_silent(now):
            self._cancel(ref)
        for lost in self._intake.expire(now):
            self._tell_failed(lost.ref, lost.error)

    # What is told --------------------------------------------------------------------------------

    def _row(self, step: DecodeStep, epoch: int) -> StepRow:
        state = RankState.SERVING
        if self._intake.draining:
            busy = len(self._outputs) + len(self._intake)
            state = RankState.DRAINING if busy else RankState.LEAVING
        rebalancing, placement, started_with = self._experts.row()
        return StepRow(
            seat=self._seat,
            epoch=epoch,
            state=state,
            tokens=len(step.refs),
            expecting=len(self._intake) > 0,
            free_blocks=self.account.load.free_blocks,
            rebalancing=rebalancing,
            placement=placement,
            started_with=started_with,
            newcomers=self._meeting.newcomers,
            waited_us=self._meter.waited_us,
            computed_us=self._meter.computed_us,
        )
