"""What processes say to one another over the bus, one struct a message.

Every message about a request carries its attempt and the incarnation of the worker it is meant
for or comes from; a receiver drops what is not current, counts it, and never acts on it. Times
are durations: each process has its own monotonic clock.

    gateway  -> decode     Reserve, Cancel, GatewayAlive
    decode   -> gateway    Granted, Rejected, StepTokens, RequestFailed
    gateway  -> prefill    Prefill, Cancel, GatewayAlive
    prefill  -> gateway    PrefillDone, RequestFailed
    worker   -> scheduler  Announce, Heartbeat, Withdraw
    scheduler-> worker     Welcome, Refused, UnknownWorker
    gateway  -> scheduler  WatchCluster
    scheduler-> gateway    ClusterSnapshot, PrefixUpdate, ExpertUpdate

The KV bytes, and what prefill and decode say about them, go over ``kvtransfer`` connections.
"""

from typing import Literal

import msgspec

from protocol.ids import AttemptRef, GatewayId, WorkerRef
from protocol.kv import Grant
from protocol.requests import GenerateRequest, TokenLogprobs
from protocol.workers import (
    ExpertReport,
    FingerprintDifference,
    PrefixEvents,
    WorkerInfo,
    WorkerLoad,
    WorkerState,
)

FinishReason = Literal["stop", "length"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all bus messages; the tag on the wire is the class name."""


class ErrorReport(msgspec.Struct, frozen=True, kw_only=True):
    """A ``ServingError`` on the wire: ``protocol.reports`` turns one into the other."""

    code: str
    message: str
    stage: str  # queue, reserve, prefill, transfer, decode
    retry_after_s: float | None = None


class Reserve(Message, frozen=True, kw_only=True):
    """Ask a decode rank for blocks. Answered by ``Granted`` or ``Rejected``, the same twice."""

    request: GenerateRequest
    remaining_s: float


class Granted(Message, frozen=True, kw_only=True):
    grant: Grant


class Rejected(Message, frozen=True, kw_only=True):
    ref: AttemptRef
    worker: WorkerRef
    error: ErrorReport


class Prefill(Message, frozen=True, kw_only=True):
    """Compute the prompt's KV, push it into the grant's blocks, and sample the first token."""

    request: GenerateRequest
    grant: Grant
    remaining_s: float


class PrefillTimes(msgspec.Struct, frozen=True, array_like=True):
    """Seconds at the prefill worker: until the first chunk started, and from then on."""

    queue_s: float
    compute_s: float


class PrefillDone(Message, frozen=True, kw_only=True):
    """The first token, committed output from here on. ``cached_tokens`` were not computed anew.

    ``finish_reason`` is set when the first token already ends the request: the decode rank then
    frees the grant by itself, and sends nothing. ``prompt_logprobs`` has an entry for each prompt
    token from the second on, where the request asked for them.
    """

    ref: AttemptRef
    worker: WorkerRef
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    cached_tokens: int
    times: PrefillTimes
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


class TokenDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one request. ``offset`` is the index of the first among its output tokens."""

    ref: AttemptRef
    offset: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None


class StepTokens(Message, frozen=True, kw_only=True):
    """All tokens that one engine step made for one gateway: one frame a step.

    ``plain`` has the records (``protocol.plain_tokens``) of tokens that are neither their request's
    last nor told with probabilities, of requests whose gateway gave them a number; ``deltas`` has
    all others.
    """

    worker: WorkerRef
    step: int
    deltas: tuple[TokenDelta, ...]
    plain: bytes = b""


class RequestFailed(Message, frozen=True, kw_only=True):
    """The attempt has ended at this worker, which holds nothing of it any more."""

    ref: AttemptRef
    worker: WorkerRef
    error: ErrorReport


class Cancel(Message, frozen=True, kw_only=True):
    """Stop work on the attempt and free what it holds. Unknown attempts are remembered, so a
    ``Reserve`` or ``Prefill`` that arrives later is answered as cancelled.
    """

    ref: AttemptRef


class GatewayAlive(Message, frozen=True, kw_only=True):
    """Sent every ``GATEWAY_ALIVE_S``: workers cancel what a silent gateway has left behind."""

    gateway_id: GatewayId


class Announce(Message, frozen=True, kw_only=True):
    info: WorkerInfo
    load: WorkerLoad


class Welcome(Message, frozen=True, kw_only=True):
    lease_s: float
    heartbeat_s: float


class Refused(Message, frozen=True, kw_only=True):
    """The worker may not serve in this cluster; ``differences`` says why, part by part."""

    reason: str
    differences: tuple[FingerprintDifference, ...]


class UnknownWorker(Message, frozen=True, kw_only=True):
    """A heartbeat came from a worker that the scheduler does not know: announce again."""


class Heartbeat(Message, frozen=True, kw_only=True):
    worker: WorkerRef
    load: WorkerLoad
    prefix: PrefixEvents | None = None
    experts: ExpertReport | None = None  # with the first beat after it has changed


class Withdraw(Message, frozen=True, kw_only=True):
    worker: WorkerRef
    reason: str


class AskDrain(Message, frozen=True, kw_only=True):
    """An operator wants a worker to drain: one by its id, or all ranks of a decode worker."""

    name: str


class Draining(Message, frozen=True, kw_only=True):
    """The answer: who was told to drain, nobody if there is no such worker."""

    workers: tuple[WorkerRef, ...]


class Drain(Message, frozen=True, kw_only=True):
    """To a worker: take nothing new, finish what runs, end."""

    worker: WorkerRef


class WatchCluster(Message, frozen=True, kw_only=True):
    gateway_id: GatewayId


class ClusterSnapshot(Message, frozen=True, kw_only=True):
    """The whole membership, sent on every change and with fresh loads at each heartbeat tick."""

    version: int
    workers: tuple[WorkerState, ...]


class PrefixUpdate(Message, frozen=True, kw_only=True):
    worker: WorkerRef
    events: PrefixEvents


class ExpertUpdate(Message, frozen=True, kw_only=True):
    """A decode rank's latest report, to every gateway."""

    worker: WorkerRef
    report: ExpertReport


ToDecode = Reserve | Cancel | GatewayAlive
FromDecode = Granted | Rejected | StepTokens | RequestFailed
ToPrefill = Prefill | Cancel | GatewayAlive
FromPrefill = PrefillDone | RequestFailed
FromWorker = FromDecode | FromPrefill
ToScheduler = Announce | Heartbeat | Withdraw | WatchCluster | AskDrain
FromScheduler = (
    Welcome
    | Refused
    | UnknownWorker
    | Drain
    | Draining
    | ClusterSnapshot
    | PrefixUpdate
    | ExpertUpdate
)

GATEWAY_ALIVE_S = 2.0
GATEWAY_SILENT_S = 10.0


class HandOff(msgspec.Struct, frozen=True, kw_only=True):
    """What prefill tells decode when it commits a grant: the payload of ``Push.finish``.

    With ``finish_reason`` set there is nothing to decode, and the grant is freed at once.
    """

    token_id: int
    finish_reason: FinishReason | None
