"""What has happened at this gateway lately: requests by stage, bytes between workers, events.

Written where a request changes hands, never at a token; how much has been written is read from the
attempt when somebody asks. Invariant: memory is bounded by the requests that are open and by the
constants below, whatever clients and workers do. It knows nothing of HTTP and asks nobody.
"""

from collections import deque
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from protocol.errors import ServingError
from protocol.ids import RequestId
from protocol.messages import PrefillTimes
from protocol.requests import GenerateRequest
from runtime.clock import Clock
from server.attempts import Attempt

Severity = Literal["info", "warning", "error"]
EventKind = Literal["worker", "request", "experts", "cluster"]
Outcome = Literal["open", "done", "failed", "cancelled"]

REQUESTS = 60
EVENTS = 200
LINKS = 4096  # pairs of workers with traffic; 72 ranks and 56 prefill workers have that many
TEXT_CHARS = 200
SAME_WITHIN_S = 10.0  # an event that repeats within that time is counted, not listed again
SAME_AMONG = 8


@dataclass(slots=True, kw_only=True)
class AttemptRecord:
    """Times are the clock's, None for what has not come about."""

    began: float
    base_tokens: int  # written by earlier attempts
    reserving: float | None = None  # the last decode rank was asked: the wait for room was over
    prefilling: float | None = None  # its blocks were granted, and prefill was asked
    first_token: float | None = None
    decoding: float | None = None  # decode's first tokens came
    ended: float | None = None
    prefill: str = ""
    decode: str = ""
    times: PrefillTimes | None = None
    tokens: int = 0  # of this attempt, once it has ended
    failure: str = ""


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    request_id: RequestId
    model: str
    prompt_tokens: int
    began: float
    ended: float | None = None
    cached_tokens: int = 0
    attempts: list[AttemptRecord] = field(default_factory=list)
    outcome: Outcome = "open"
    failure: str = ""
    live: Attempt | None = None  # the one that is running

    def output_tokens(self) -> int:
        before = sum(attempt.tokens for attempt in self.attempts)
        if self.live is None:
            return before
        return before + len(self.live.written) - self.attempts[-1].base_tokens


@dataclass(slots=True, kw_only=True)
class Event:
    """``times`` it happened, between the clock's ``first`` and ``last``."""

    kind: EventKind
    severity: Severity
    text: str
    first: float
    last: float
    times: int = 1


@dataclass(slots=True)
class LinkTotals:
    """KV that went from one prefill worker to one decode rank, for requests of this gateway."""

    requests: int = 0
    bytes: int = 0
    handed_over: int = 0  # of these, how many decode went on with
    hand_over_s: float = 0.0  # prefill's token to decode's first one: what was not hidden


class Records:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._open: dict[RequestId, RequestRecord] = {}
        self._ended: deque[RequestRecord] = deque(maxlen=REQUESTS)
        self._tokens_of_ended = 0
        self.events: deque[Event] = deque(maxlen=EVENTS)
        self.links: dict[tuple[str, str], LinkTotals] = {}
        self.prompt_tokens = 0  # of requests that got a first token
        self.requests_ended = 0
        self.requests_failed = 0

    # -- what the gateway notes ----------------------------------------------------------------

    def note(self, kind: EventKind, severity: Severity, text: str) -> None:
        """Something an operator may want to know. ``text`` may hold what a caller has sent."""
        now, text = self._clock.now(), text[:TEXT_CHARS]
        for event in islice(reversed(self.events), SAME_AMONG):
            if event.text == text and event.kind == kind and now - event.last <= SAME_WITHIN_S:
                event.times += 1
                event.last = now
                return
        self.events.append(Event(kind=kind, severity=severity, text=text, first=now, last=now))

    @contextmanager
    def request(self, request: GenerateRequest) -> Generator[None]:
        """Record the request and its attempts for the duration of the block."""
        record = self._open[request.request_id] = RequestRecord(
            request_id=request.request_id,
            model=request.model,
            prompt_tokens=len(request.prompt_token_ids),
            began=self._clock.now(),
        )
        try:
            yield
        except Exception as error:
            record.outcome = "failed"
            self.requests_failed += 1
            why = str(error) if isinstance(error, ServingError) else "a fault of the gateway"
            record.failure = why[:TEXT_CHARS]
            self.note("request", "error", f"a request has failed: {why}")
            raise
        except BaseException:
            record.outcome = "cancelled"
            raise
        else:
            record.outcome = "done"
        finally:
            record.ended = self._clock.now()
            del self._open[request.request_id]
            self._ended.append(record)
            self._tokens_of_ended += record.output_tokens()
            self.requests_ended += 1

    @contextmanager
    def attempt(self, attempt: Attempt) -> Generator[None]:
        """Record the attempt for the duration of the block, if its request is being recorded: a
        canary's is not.
        """
        record = self._open.get(attempt.ref.request_id)
        if record is None:
            yield
            return
        began = self._clock.now()
        if record.attempts and not record.attempts[-1].decode:
            began = record.attempts.pop().began  # that one found no worker to ask: one wait in all
        current = AttemptRecord(began=began, base_tokens=len(attempt.written))
        record.attempts.append(current)
        record.live = attempt
        attempt.on_decoding = lambda: self._decoding(current)
        try:
            yield
        except ServingError as error:  # the request's end; ``retried`` notes the others
            current.failure = str(error)[:TEXT_CHARS]
            raise
        finally:
            record.live = None
            current.ended = self._clock.now()
            current.tokens = len(attempt.written) - current.base_tokens

    def asks_decode(self, attempt: Attempt) -> None:
        if (current := self._current(attempt)) is not None and attempt.decode is not None:
            current.reserving = self._clock.now()
            current.decode = attempt.decode.worker_id

    def asks_prefill(self, attempt: Attempt) -> None:
        if (current := self._current(attempt)) is not None and attempt.prefill is not None:
            current.prefilling = self._clock.now()
            current.prefill = attempt.prefill.worker_id

    def first_token(self, attempt: Attempt, *, kv_bytes: int) -> None:
        """``kv_bytes`` were promised at the decode rank for the prompt, and are there or coming."""
        current = self._current(attempt)
        if current is None or attempt.first is None:
            return
        record = self._open[attempt.ref.request_id]
        current.first_token = self._clock.now()
        current.times = attempt.first.times
        if len(record.attempts) == 1:
            record.cached_tokens = attempt.first.cached_tokens
            self.prompt_tokens += record.prompt_tokens
        link = self._link(current)
        link.requests += 1
        link.bytes += kv_bytes

    def retried(self, attempt: Attempt, *, migrates: bool) -> None:
        """The attempt has failed, and the request goes on with another. Where no worker was asked
        it still waits for one, which is no news.
        """
        current = self._current(attempt)
        if current is None or not current.decode:
            return
        current.failure = str(attempt.failure or "every worker has refused it")[:TEXT_CHARS]
        what = "a stream migrates" if migrates else "a request is tried again"
        self.note("request", "warning", f"{what}: {current.failure}")

    # -- what is asked for ---------------------------------------------------------------------

    def requests(self, limit: int = REQUESTS) -> Iterable[RequestRecord]:
        """The newest by arrival: those that are open, and the last that have ended."""
        known = [*self._ended, *self._open.values()]
        return sorted(known, key=lambda record: record.began, reverse=True)[:limit]

    def find(self, request_id: RequestId) -> RequestRecord | None:
        """None: it has ended before all that are remembered, or was never here."""
        ended = (r for r in reversed(self._ended) if r.request_id == request_id)
        return self._open.get(request_id) or next(ended, None)

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def output_tokens(self) -> int:
        """Of all requests since the start, those of open ones included."""
        return self._tokens_of_ended + sum(r.output_tokens() for r in self._open.values())

    # -- inside --------------------------------------------------------------------------------

    def _decoding(self, current: AttemptRecord) -> None:
        now = current.decoding = self._clock.now()
        if current.first_token is not None:
            link = self._link(current)
            link.handed_over += 1
            link.hand_over_s += now - current.first_token

    def _current(self, attempt: Attempt) -> AttemptRecord | None:
        record = self._open.get(attempt.ref.request_id)
        return record.attempts[-1] if record is not None and record.live is attempt else None

    def _link(self, of: AttemptRecord) -> LinkTotals:
        key = (of.prefill, of.decode)
        found = self.links.get(key)
        if found is None:
            if len(self.links) >= LINKS:
                del self.links[next(iter(self.links))]
            found = self.links[key] = LinkTotals()
        return found
