"""Attempts in flight: what the workers have said of each, and the task that waits for it.

The readers of ``server.worker_links`` write and the request's own task reads, on one event loop.
Tokens of an attempt come out in order and once: whatever is from another attempt, another worker
or another place in the output is refused here, and counted by whoever brought it.

A stream's tokens do not wake its task: the reader of the step's frame hands them on itself
(``Attempt.take``), because a wake-up costs several times what a token does.
"""

import asyncio
from collections.abc import Callable, Collection
from typing import Literal

import msgspec

from protocol.errors import DeadlineExceeded, WorkerLost
from protocol.ids import RequestId, WorkerId, WorkerRef
from protocol.kv import Grant
from protocol.messages import (
    ErrorReport,
    Granted,
    PrefillDone,
    Rejected,
    RequestFailed,
    TokenDelta,
)
from protocol.plain_tokens import PlainToken
from protocol.reports import error_of
from protocol.requests import GenerateRequest
from runtime.clock import Clock
from server.cluster_view import Pair
from server.generation import Deliver, SteadyText, TokenChunk
from server.policies import Demand, Work
from server.step_writer import StepWriter

Stage = Literal["queue", "reserve", "prefill", "transfer", "decode"]
SWEEP_S = 0.05
LATE_S = 1.0


class Attempt:
    """One attempt. At most one task may wait on it, and only inside ``changed`` and its callers."""

    __slots__ = (
        "_deliver",
        "_early",
        "_next_offset",
        "_steady",
        "_waiter",
        "_writer",
        "_written",
        "answer_by",
        "avoid",
        "deadline",
        "decode",
        "demand",
        "enough",
        "failure",
        "finished",
        "first",
        "grant",
        "on_decoding",
        "prefill",
        "ref",
        "rejection",
        "request",
        "stage",
        "undelivered",
        "within",
        "work",
    )

    def __init__(
        self,
        request: GenerateRequest,
        *,
        deadline: float,
        avoid: Collection[WorkerId] = (),
        within: Pair | None = None,
    ) -> None:
        self.request = request
        self.avoid = avoid  # workers that have failed the request before
        self.within = within  # the only workers to use, if set
        self.demand: Demand | None = None  # how placement sees it, once that has been worked out
        self.work: dict[WorkerRef, Work] = {}  # what it has put on whom, until they are done
        self.ref = request.ref
        self.deadline = deadline
        self.answer_by = deadline  # the worker that is being asked must have answered by then
        self.stage: Stage = "queue"
        self.decode: WorkerRef | None = None
        self.prefill: WorkerRef | None = None
        self.grant: Grant | None = None
        self.rejection: ErrorReport | None = None
        self.first: PrefillDone | None = None
        self.finished = False  # the workers have ended it by themselves: nothing is left to cancel
        self.enough = False  # ``deliver`` wants no more, or the last token has been delivered
        self.failure: Exception | None = None
        self.undelivered = False  # ``deliver`` has raised: that is no worker's failure
        self._written = list(request.output_token_ids)
        self.on_decoding: Callable[[], None] = _nothing  # decode's first tokens have come
        self._deliver: Deliver | None = None
        self._early: list[TokenDelta] = []  # what decode said before prefill was heard
        self._next_offset = len(self._written) + 1  # of decode's tokens, which follow prefill's
        self._steady: SteadyText | None = None  # ``deliver`` may be passed by
        self._writer: StepWriter | None = None  # that writes this attempt's tokens now
        self._waiter: asyncio.Future[None] | None = None

    # -- for the readers ---------------------------------------------------------------------

    def hear(self, message: Granted | Rejected | PrefillDone | RequestFailed) -> bool:
        """Take in what a worker says; False if it is stale or from the wrong worker."""
        match message:
            case Granted(grant=grant):
                current = grant.ref == self.ref and grant.decode == self.decode
                if not current or self.grant is not None:
                    return False
                self.grant, self.answer_by = grant, self.deadline
            case Rejected(ref=ref, worker=worker, error=error):
                current = ref == self.ref and worker == self.decode
                if not current or self.grant is not None:
                    return False
                self.rejection = error
                self.stage, self.decode, self.answer_by = "queue", None, self.deadline
            case PrefillDone(ref=ref, worker=worker):
                if ref != self.ref or worker != self.prefill or self.first is not None:
                    return False
                self.first = message
                self.stage = "transfer"
                self.finished = message.finish_reason is not None
            case RequestFailed(ref=ref, worker=worker, error=error):
                if ref != self.ref or worker not in (self.prefill, self.decode):
                    return False
                self.fail(error_of(error))
        self.wake()
        return True

    def take(self, delta: TokenDelta, worker: WorkerRef) -> bool:
        """Hand on decode's next tokens; False if they are stale. A gap fails the attempt."""
        if delta.ref.attempt != self.ref.attempt or worker != self.decode or self.enough:
            return False
        self.leave_writer()
        if delta.offset != self._next_offset:
            if delta.offset > self._next_offset:
                self.fail(WorkerLost("tokens were lost between worker and gateway", stage="decode"))
            return False
        self._next_offset += len(delta.token_ids)
        if self._deliver is None:
            self._early.append(delta)
        else:
            self._hand_on(delta, self._deliver)
        return True

    def _hand_on(self, delta: TokenDelta, deliver: Deliver) -> None:
        self.finished = delta.finish_reason is not None
        self._written += delta.token_ids
        try:
            more = deliver(
                TokenChunk(
                    token_ids=delta.token_ids,
                    logprobs=delta.logprobs,
                    finish_reason=delta.finish_reason,
                )
            )
        except Exception as error:  # noqa: BLE001  it must not end the link that brings all streams
            self._deliver, self.undelivered = None, True
            self.fail(error)
        else:
            if self.finished or not more:
                self.enough = True
                self.wake()
            elif more is not True:
                self._steady = more

    def enter_writer(self, writer: StepWriter, token: PlainToken, worker: WorkerRef) -> bool:
        """Whether ``writer`` writes the attempt's tokens from now on, ``token`` the first of them.

        That one knows the attempt by its number, and looks at no worker: only the rank that
        granted the blocks has anything of this attempt.
        """
        steady = self._steady
        if (
            steady is None
            or self._writer is not None
            or token.offset != self._next_offset
            or worker != self.decode
            or self.enough
            or self.failure is not None
            or not writer.takes(steady.around)
        ):
            return False
        descriptor = steady.lend(self.leave_writer)
        if descriptor is None:
            return False
        self._writer = writer
        writer.enter(
            token.stream,
            offset=token.offset,
            descriptor=descriptor,
            around=steady.around,
            at=steady.delivered_at,
        )
        return True

    def leave_writer(self) -> None:
        """Whatever is said, read or written next of the attempt finds all its tokens here."""
        if self._writer is None:
            return
        assert self._steady is not None
        steady, self._steady = self._steady, None
        written = self._writer.leave(self.request.stream)
        self._writer = None
        self._written += written.token_ids
        self._next_offset += len(written.token_ids)
        steady.give_back(len(written.token_ids), written.at, written.unsent)

    @property
    def written(self) -> list[int]:
        """What has been delivered, by this and earlier attempts."""
        self.leave_writer()
        return self._written

    def worker_lost(self, worker: WorkerRef) -> None:
        """Fail, unless what was wanted of ``worker`` has been done."""
        if worker == self.decode or (worker == self.prefill and self.first is None):
            self.fail(WorkerLost(f"{worker.worker_id} was lost", stage=self.stage))

    def fail(self, error: Exception) -> None:
        """End the attempt; the first failure counts."""
        self.leave_writer()
        if self.failure is None:
            self.failure = error
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def expire(self, now: float) -> None:
        if now >= self.deadline:
            message = f"the request's time ran out in stage {self.stage}"
            self.fail(DeadlineExceeded(message, stage=self.stage))
        elif now >= self.answer_by:
            name = self.decode.worker_id if self.decode else "the worker"
            self.fail(WorkerLost(f"{name} does not answer", stage=self.stage))

    # -- for the request's task ----------------------------------------------------------------

    def asks_decode(self, rank: WorkerRef, *, answer_by: float) -> None:
        self.stage, self.decode, self.rejection = "reserve", rank, None
        self.answer_by = min(answer_by, self.deadline)

    def asks_prefill(self, worker: WorkerRef) -> None:
        self.stage, self.prefill = "prefill", worker

    @property
    def workers(self) -> list[WorkerRef]:
        """Those that may hold something of the attempt."""
        return [worker for worker in (self.prefill, self.decode) if worker is not None]

    async def changed(self) -> None:
        """Wait for news; return at once if there has been a failure."""
        if self.failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def reservation(self) -> Grant | ErrorReport:
        """The decode rank's answer.

        Raises:
            ServingError: the attempt has failed meanwhile.
        """
        while self.grant is None and self.rejection is None:
            self.raise_failure()
            await self.changed()
        answer = self.grant or self.rejection
        assert answer is not None
        return answer

    async def first_token(self) -> PrefillDone:
        while self.first is None:
            self.raise_failure()
            await self.changed()
        return self.first

    def begin(self, first: PrefillDone, deliver: Deliver) -> bool:
        """Deliver prefill's token; whether more are wanted, and to come."""
        continued = bool(self._written)
        self._written.append(first.token_id)
        self.undelivered = True  # unless the caller takes it
        more = deliver(
            TokenChunk(
                token_ids=(first.token_id,),
                logprobs=None if first.logprobs is None else (first.logprobs,),
                finish_reason=first.finish_reason,
                cached_tokens=0 if continued else first.cached_tokens,
                times=None if continued else first.times,
                prompt_logprobs=first.prompt_logprobs,
            )
        )
        self.undelivered = False
        self.enough = not more or self.finished
        return not self.enough

    async def stream(self, deliver: Deliver) -> None:
        """Hand decode's tokens on, and return after the last one or when there are enough.

        Raises:
            ServingError: the attempt has failed. What came before has been delivered.
        """

        def begin(chunk: TokenChunk) -> bool | SteadyText:
            """For the first tokens only: the others cost no call more."""
            self._deliver, self.stage = deliver, "decode"
            self.on_decoding()
            return deliver(chunk)

        early, self._early = self._early, []
        self._deliver = begin
        for delta in early:
            if self._deliver is not None and not self.enough:
                self._hand_on(delta, self._deliver)
        while not self.enough:
            self.raise_failure()
            await self.changed()

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure


def _nothing() -> None:
    pass


class Attempts:
    """The attempts of this gateway that are in flight, one a request."""

    def __init__(self, clock: Clock, writer: StepWriter | None = None) -> None:
        self._clock = clock
        self.writer = writer
        self.by_request: dict[RequestId, Attempt] = {}
        self.by_stream: dict[int, Attempt] = {}

    def open(self, attempt: Attempt) -> Attempt:
        self.by_request[attempt.ref.request_id] = attempt
        stream = 0 if self.writer is None else self.writer.number()
        if stream:
            attempt.request = msgspec.structs.replace(attempt.request, stream=stream)
            self.by_stream[stream] = attempt
        return attempt

    def close(self, attempt: Attempt) -> None:
        attempt.leave_writer()
        self.by_request.pop(attempt.ref.request_id, None)
        stream = attempt.request.stream
        if self.writer is not None and stream in self.by_stream:
            del self.by_stream[stream]
            self.writer.release(stream)

    def worker_lost(self, worker: WorkerRef) -> None:
        for attempt in list(self.by_request.values()):
            attempt.worker_lost(worker)

    async def expire_forever(self) -> None:
        """Fail attempts whose time is over, so that no wait needs a timer of its own."""
        while True:
            due = self._clock.now() + SWEEP_S
            await self._clock.sleep(SWEEP_S)
            if self._clock.now() > due + LATE_S:
                # This process was held up. What was said to it meanwhile comes first.
                await self._clock.sleep(SWEEP_S)
            now = self._clock.now()
            for attempt in list(self.by_request.values()):
                if now >= attempt.answer_by:
                    attempt.expire(now)
