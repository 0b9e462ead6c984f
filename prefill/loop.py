"""The engine thread of a prefill worker: schedule, compute while pushing, hand off.

Everything here belongs to one thread; other threads only post work to its inbox. A request ends
here exactly once: its push is over (committed, failed or aborted) and its blocks are released.
"""

import threading
import time
from collections.abc import Callable, Sequence

import msgspec
from torch import Tensor

from engine.kvcache.block_pool import BlockPool
from engine.kvcache.prefix_index import PrefixIndex
from engine.sampling.sampler import Sampled, Sampler
from kvtransfer.interface import KVSource
from prefill.flow import Flow
from prefill.forward import Forward, part_of
from prefill.held import Held
from prefill.lockstep import Part
from prefill.pace import Pace
from prefill.prefix_feed import PrefixFeed
from prefill.push_times import TimedSource
from prefill.ranks import Ranks
from prefill.scheduler import Chunk, PrefillScheduler, PrefillStep
from prefill.scoring import rows_of, score_step
from protocol.codec import encode
from protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    EngineError,
    InvalidRequest,
    ServingError,
    TransferError,
    WorkerLost,
)
from protocol.ids import AttemptRef, WorkerRef
from protocol.messages import (
    GATEWAY_SILENT_S,
    Cancel,
    GatewayAlive,
    HandOff,
    Prefill,
    RequestFailed,
    ToPrefill,
)
from protocol.reports import report_of
from protocol.requests import GenerateRequest
from runtime.clients import Clients
from runtime.log import get_log
from runtime.mailbox import Inbox, Outbox
from runtime.worker_process import Beat, ToPeer

log = get_log(__name__)

SWEEP_S = 1.0
MAX_TOMBSTONES = 4096
NO_STEP = PrefillStep(chunks=())


class PrefillLoop:
    def __init__(
        self,
        *,
        worker: WorkerRef,
        scheduler: PrefillScheduler,
        forward: Forward,
        ranks: Ranks,
        sampler: Sampler,
        source: KVSource,
        outbox: Outbox[ToPeer],
        pool: BlockPool,
        prefix_index: PrefixIndex,
        prefix_feed: PrefixFeed,
        vocab_size: int,
        num_stages: int = 1,
    ) -> None:
        """``num_stages``: so many calls of ``forward`` bring a step to its end."""
        self._worker = worker
        self._scheduler = scheduler
        self._forward = forward
        self._ranks = ranks
        self._sampler = sampler
        self._source = TimedSource(source)
        self._outbox = outbox
        self._pool = pool
        self._prefix_index = prefix_index
        self._prefix_feed = prefix_feed
        self._vocab_size = vocab_size
        self._inbox: Inbox[Callable[[], None]] = Inbox()
        self._clients = Clients(silent_s=GATEWAY_SILENT_S)
        self._held: dict[AttemptRef, Held] = {}
        self._cancelled: dict[AttemptRef, None] = {}
        self._stopped = threading.Event()
        self._draining = False
        self._sweep = Beat(SWEEP_S)
        self._flow: Flow[PrefillStep] = Flow(num_stages)
        self._pace = Pace()
        self._look()

    # From any thread -----------------------------------------------------------------------------

    def post(self, peer: bytes, message: ToPrefill) -> None:
        arrived = time.monotonic()  # a step may pass before it is heard
        self._inbox.put(lambda: self._hear(peer, message, arrived))

    def drain(self) -> None:
        def start_draining() -> None:
            self._draining = True

        self._inbox.put(start_draining)

    def stop(self) -> None:
        self._stopped.set()
        self._inbox.put(lambda: None)

    # On the engine thread ------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                if self._ranks.meet(self._given_up):
                    self._turn()
                if self._draining and not self._held:
                    self._ranks.leave()
                    return
        finally:
            self._ranks.close()
            self._source.close()

    def _given_up(self) -> bool:
        """Asked while this rank waits for the others: whoever comes meanwhile hears no."""
        self._listen(time.monotonic())
        return self._stopped.is_set() or (self._draining and not self._held)

    def _listen(self, now: float) -> None:
        for work in self._inbox.drain():
            work()
        if self._sweep.due(now):
            self._let_go(now)

    def _turn(self) -> None:
        self._listen(time.monotonic())
        now = time.monotonic()  # what was heard has arrived before it is begun
        step, left = self._scheduler.schedule(), NO_STEP
        advancing = bool(step) or self._flow.busy
        if advancing:
            self._flow.enter(step)
            left = self._flow.leave() or NO_STEP
        try:
            parts = [part_of(chunk) for chunk in step.chunks]
            self._ranks.begin_step(parts)
            if advancing:
                self._advance(step, parts, left, now)
        except WorkerLost as error:
            self._lose_ranks([left, *self._flow.take_all()], error)
            return
        self._draining = self._draining or self._ranks.drain_asked
        self._look()
        if not advancing:
            self._inbox.wait(self._ranks.pace_s)

    def _look(self) -> None:
        self.load = self._pace.load(
            self._scheduler.books(), self._pool, self._source.totals(), draining=self._draining
        )

    def _hear(self, peer: bytes, message: ToPrefill, arrived: float) -> None:
        self._clients.heard(peer, arrived)
        match message:
            case Prefill():
                self._accept(peer, message, arrived)
            case Cancel(ref=ref):
                self._cancel(ref)
            case GatewayAlive():
                pass

    def _accept(self, peer: bytes, message: Prefill, arrived: float) -> None:
        request = message.request
        if request.ref in self._held:
            return  # told twice; the answer is on its way
        try:
            self._check(request)
            self._sampler.admit(request, request.output_token_ids)
            try:
                push = self._source.open(message.grant)
                try:
                    gives_way = self._scheduler.add(request, arrived, arrived + message.remaining_s)
                except ServingError as error:
                    push.abort(str(error), lambda: None)
                    raise
            except ServingError:
                self._sampler.retire(request.ref)
                raise
        except ServingError as error:
            self._answer(peer, self._failure(request.ref, error, stage="prefill"))
            return
        self._clients.own(peer, request.ref)
        self._held[request.ref] = Held(request=request, push=push, arrived_at=arrived)
        if gives_way is not None:
            self._fail(gives_way, self._scheduler.queue_full(), stage="prefill")

    def _check(self, request: GenerateRequest) -> None:
        if self._draining:
            raise Draining("this prefill worker is draining", retry_after_s=1.0)
        if request.ref in self._cancelled:
            raise Cancelled("the request was cancelled before its prefill")
        tokens = request.context_token_ids
        if not tokens:
            raise InvalidRequest("the prompt is empty: it needs at least one token", param="prompt")
        if not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
            raise InvalidRequest(
                f"a prompt token id is outside 0..{self._vocab_size - 1}", param="prompt"
            )

    # One step ------------------------------------------------------------------------------------

    def _advance(
        self, step: PrefillStep, parts: Sequence[Part], left: PrefillStep, now: float
    ) -> None:
        """Compute ``step`` at the first stage; ``left`` passes the last one, and is the same where
        there is only one.
        """
        for chunk in step.chunks:
            held = self._held[chunk.ref]
            held.started_at = held.started_at or now
        try:
            with self._ranks.computing():
                x_RD = self._forward.advance(parts, self._push)
            chunks = [chunk for chunk in left.chunks if self._is_wanted(chunk.ref)]
            sampled = self._sample(chunks, rows_of(chunks, left.chunks, x_RD))
        except WorkerLost:
            raise
        except ServingError as error:
            self._fail_step(left, error)
            return
        except Exception as error:
            log.exception("prefill step failed", requests=len(left))
            self._fail_step(left, EngineError(f"computing failed: {type(error).__name__}"))
            return
        self._scheduler.complete(left)
        self._hand_off(chunks, sampled)
        if step:
            self._pace.stepped(step.num_tokens, time.monotonic() - now)

    def _is_wanted(self, ref: AttemptRef) -> bool:
        """A request may end while its chunks are on their way through the stages."""
        return ref in self._held and not self._held[ref].ending

    def _sample(self, chunks: Sequence[Chunk], x_RD: Tensor) -> Sampled:
        if any(chunk.scored for chunk in chunks):
            counts = [self._held[chunk.ref].request.sampling.prompt_logprobs for chunk in chunks]
            logits, scores = score_step(x_RD, chunks, counts, self._forward.logits)
            for chunk, more in zip(chunks, scores, strict=True):
                self._held[chunk.ref].scores += more
        else:
            logits = self._forward.logits(x_RD)
        return self._sampler.sample(logits, [chunk.ref for chunk in chunks if chunk.final])

    def _push(self, part: Part, layers: range) -> None:
        held = self._held[part.ref]
        if held.failed is None and part.final_blocks:
            try:
                held.push.send(layers, part.first_block, part.final_blocks)
            except TransferError as error:
                held.failed = error

    def _hand_off(self, chunks: Sequence[Chunk], sampled: Sampled) -> None:
        row = 0
        now = time.monotonic()
        for chunk in chunks:
            held = self._held[chunk.ref]
            if held.failed is not None:
                self._fail(chunk.ref, held.failed, stage="transfer")
            elif chunk.final and chunk.ref in sampled.errors:
                self._fail(chunk.ref, sampled.errors[chunk.ref], stage="prefill")
            elif chunk.final:
                self._finish(chunk.ref, held, sampled, row, now)
            row += chunk.final

    def _finish(self, ref: AttemptRef, held: Held, sampled: Sampled, row: int, now: float) -> None:
        done = held.done(
            self._worker,
            token_id=sampled.token_ids[row],
            logprobs=sampled.logprobs[row],
            cached_tokens=self._scheduler.cached_tokens(ref),
            now=now,
        )
        hand_off = HandOff(token_id=done.token_id, finish_reason=done.finish_reason)
        held.ending = True
        held.push.finish(
            encode(hand_off), lambda error: self._inbox.put(lambda: self._push_ended(ref, error))
        )
        self._tell_owner(ref, done)

    # Ends ----------------------------------------------------------------------------------------

    def _push_ended(self, ref: AttemptRef, error: TransferError | None) -> None:
        if error is not None and ref in self._held:
            self._tell_owner(ref, self._failure(ref, error, stage="transfer"))
        self._release(ref)

    def _fail_step(self, step: PrefillStep, error: ServingError) -> None:
        for chunk in step.chunks:
            if self._is_wanted(chunk.ref):
                self._fail(chunk.ref, error, stage="prefill", trusted=False)
        self._scheduler.complete(step)

    def _lose_ranks(self, steps: Sequence[PrefillStep], error: WorkerLost) -> None:
        """Another rank's cache may be gone: what is held ends, and nothing cached is a hit.
        ``steps`` are not computed to their end.
        """
        log.warning("the prefill ranks have parted", reason=str(error))
        self._ranks.lose()
        self._forward.forget()
        for ref in [ref for ref, held in self._held.items() if not held.ending]:
            self._fail(ref, error, stage="prefill", trusted=False)
        for step in steps:
            self._scheduler.complete(step)
        self._prefix_index.forget_all()

    def _fail(
        self, ref: AttemptRef, error: ServingError, *, stage: str, trusted: bool = True
    ) -> None:
        self._tell_owner(ref, self._failure(ref, error, stage=stage))
        self._abort(ref, str(error), trusted=trusted)

    def _cancel(self, ref: AttemptRef) -> None:
        if ref not in self._held:
            self._cancelled[ref] = None  # its Prefill may still be on the way
            if len(self._cancelled) > MAX_TOMBSTONES:
                del self._cancelled[next(iter(self._cancelled))]
            return
        self._abort(ref, "cancelled")

    def _abort(self, ref: AttemptRef, reason: str, *, trusted: bool = True) -> None:
        """Compute no more for ``ref``; its blocks are released once the transport lets them go."""
        if trusted:
            self._scheduler.cancel(ref)
        else:
            self._scheduler.reject(ref)
        held = self._held[ref]
        held.ending = True
        held.push.abort(reason, lambda: self._inbox.put(lambda: self._release(ref)))

    def _release(self, ref: AttemptRef) -> None:
        if self._held.pop(ref, None) is not None:
            self._scheduler.release(ref)
            self._sampler.retire(ref)
            self._clients.disown(ref)

    def _let_go(self, now: float) -> None:
        for ref in self._clients.remove_silent(now):
            self._cancel(ref)
        for ref in self._scheduler.expire(now):
            error = DeadlineExceeded("no time was left to compute the prompt", stage="prefill")
            self._fail(ref, error, stage="prefill")
        events = self._prefix_index.take_events()
        if events is not None:
            self._prefix_feed.publish(events.stored, events.removed)

    def _failure(self, ref: AttemptRef, error: ServingError, *, stage: str) -> RequestFailed:
        return RequestFailed(ref=ref, worker=self._worker, error=report_of(error, stage=stage))

    def _tell_owner(self, ref: AttemptRef, message: msgspec.Struct) -> None:
        peer = self._clients.owner(ref)
        if peer is not None:
            self._answer(peer, message)

    def _answer(self, peer: bytes, message: msgspec.Struct) -> None:
        self._outbox.put([(peer, message)])
