"""Requests on their way into the batch: from ``Reserve`` to committed, or to nothing.

A request here holds granted blocks that prefill may be writing into. It leaves in exactly one way:
its KV is committed, or its grant is aborted, and then the blocks stay quarantined until the
transports prove that nobody can write to them (``Quiet``). Runs on the engine thread.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from decode.scheduler import DecodeScheduler
from kvtransfer.interface import Committed, KVSink, Quiet, SinkEvent, TransferFailed
from protocol.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    Overloaded,
    ServingError,
    TransferCorrupt,
)
from protocol.ids import AttemptRef, BlockId, Generation, WorkerRef
from protocol.kv import Grant
from protocol.messages import Granted, HandOff, Rejected, Reserve
from protocol.reports import report_of
from protocol.requests import GenerateRequest
from runtime.log import get_log

log = get_log(__name__)

REMEMBERED_CANCELS = 4096
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A request whose KV is here in full."""

    request: GenerateRequest
    hand_off: HandOff
    block_ids: tuple[BlockId, ...]
    on_device: bool = False  # in the GPU's own blocks, not in their host copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A request whose KV will not come."""

    ref: AttemptRef
    error: ServingError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    request: GenerateRequest
    grant: Grant
    expires_at: float


class Intake:
    def __init__(
        self,
        *,
        worker: WorkerRef,
        scheduler: DecodeScheduler,
        sink: KVSink,
        layout_digest: str,
        max_model_len: int,
        max_granted: int,
        swap_out: Callable[[AttemptRef, Sequence[BlockId]], None],
    ) -> None:
        """``swap_out`` copies a preempted request's blocks to the host before it returns."""
        self._worker = worker
        self._scheduler = scheduler
        self._sink = sink
        self._layout_digest = layout_digest
        self._max_model_len = max_model_len
        self._max_granted = max_granted
        self._swap_out = swap_out
        self._expected: dict[AttemptRef, _Expected] = {}
        self._cancelled: OrderedDict[AttemptRef, None] = OrderedDict()
        self._generations = 0
        self.draining = False

    def __len__(self) -> int:
        return len(self._expected)

    def reserve(self, message: Reserve, now: float) -> Granted | Rejected:
        """Bind blocks for the prompt. The same ``Reserve`` again gets the same grant."""
        ref = message.request.ref
        known = self._expected.get(ref)
        if known is not None:
            return Granted(grant=known.grant)
        try:
            grant = self._grant(message)
        except ServingError as error:
            return Rejected(ref=ref, worker=self._worker, error=report_of(error, stage="reserve"))
        self._expected[ref] = _Expected(
            request=message.request, grant=grant, expires_at=now + message.remaining_s
        )
        # Expected before anybody knows of the grant: a chunk cannot come too early.
        self._sink.expect(grant)
        return Granted(grant=grant)

    def _grant(self, message: Reserve) -> Grant:
        request = message.request
        if request.ref in self._cancelled:
            raise Cancelled("the request was cancelled before it was reserved")
        if self.draining:
            raise Draining("this decode rank is draining", retry_after_s=RETRY_AFTER_S)
        if request.max_total_tokens > self._max_model_len:
            raise ContextLengthExceeded(
                f"{len(request.prompt_token_ids)} prompt tokens and up to "
                f"{request.stop.max_tokens} output tokens exceed {self._max_model_len}"
            )
        if len(self._expected) >= self._max_granted:
            raise Overloaded(
                f"{self._max_granted} grants already wait for KV", retry_after_s=RETRY_AFTER_S
            )
        reserved = self._scheduler.reserve(
            request.ref,
            request.num_context_tokens,
            request.max_total_tokens,
            caller=request.caller,
            priority=request.priority,
        )
        for swap in reserved.swap_out:  # before anybody knows where to write
            self._swap_out(swap.ref, swap.blocks)
        self._generations += 1
        return Grant(
            ref=request.ref,
            decode=self._worker,
            generation=Generation(self._generations),
            block_ids=reserved.blocks,
            layout_digest=self._layout_digest,
            endpoint=self._sink.endpoint,
            lease_s=message.remaining_s,
        )

    def hear(self, event: SinkEvent) -> Arrived | Lost | None:
        """What an event of the transports means for the request it is about, if for any."""
        if isinstance(event, Quiet):
            self._scheduler.quiet(event.ref)
            return None
        expected = self._expected.get(event.ref)
        if expected is None or expected.grant.generation != event.generation:
            if isinstance(event, Committed):
                self._scheduler.quiet(event.ref)  # it crossed our abort: nothing will be written
            return None
        del self._expected[event.ref]
        if isinstance(event, TransferFailed):
            self._scheduler.quarantine(event.ref)
            return Lost(ref=event.ref, error=event.error)
        try:
            hand_off = msgspec.msgpack.decode(event.payload, type=HandOff)
        except msgspec.DecodeError:
            # Committed, so nothing will be written any more: the blocks are free at once.
            self._scheduler.quarantine(event.ref)
            self._scheduler.quiet(event.ref)
            return Lost(ref=event.ref, error=TransferCorrupt("the hand-off cannot be read"))
        return Arrived(
            request=expected.request,
            hand_off=hand_off,
            block_ids=expected.grant.block_ids,
            on_device=event.on_device,
        )

    def cancel(self, ref: AttemptRef) -> bool:
        """Abort the grant of ``ref``; False when there is none, and then it is remembered."""
        expected = self._expected.pop(ref, None)
        if expected is None:
            self._cancelled[ref] = None
            if len(self._cancelled) > REMEMBERED_CANCELS:
                self._cancelled.popitem(last=False)
            return False
        # In this order: the sink may answer Quiet at once.
        self._scheduler.quarantine(ref)
        self._sink.abort(expected.grant)
        return True

    def expire(self, now: float) -> list[Lost]:
        """Abort the grants whose requests have no time left."""
        late = [ref for ref, expected in self._expected.items() if expected.expires_at <= now]
        for ref in late:
            self.cancel(ref)
        error = DeadlineExceeded("the KV did not arrive in the request's time", stage="transfer")
        return [Lost(ref=ref, error=error) for ref in late]

    def abort_all(self) -> list[AttemptRef]:
        refs = list(self._expected)
        for ref in refs:
            self.cancel(ref)
        return refs

    def close(self) -> None:
        """Take no KV any more, for good."""
        self._sink.close()
