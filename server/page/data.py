"""What ``/status`` answers: the schema, and how it is read from what the gateway knows.

Times are ages and durations in seconds, never a clock of this machine. Nothing of a prompt or an
answer is in it; ids of requests and names of workers are.
"""

import msgspec

from protocol.workers import WorkerState
from server.cluster import Cluster
from server.generation import Readiness
from server.page.experts import ExpertGroup
from server.page.membership import Condition, condition_of
from server.page.records import AttemptRecord, Event, EventKind, Outcome, RequestRecord, Severity
from server.page.samples import EVERY_S, Sample
from server.page.stages import Stage, stages_of

FORMAT = 1
MAX_LINKS = 200
MAX_EVENTS = 100


class GatewayRow(msgspec.Struct, frozen=True, kw_only=True):
    ready: bool
    reason: str
    models: list[str]
    open_requests: int
    waiting: int
    retries: int
    migrations: int
    stale_frames: int


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's own account; blocks that are in no state here are free."""

    worker: str
    role: str
    group: str
    model: str
    host: str
    condition: Condition
    running: int
    queued: int
    queued_tokens: int
    blocks: int
    cached_blocks: int
    granted_blocks: int
    active_blocks: int
    quarantined_blocks: int
    step_s: float
    tokens_per_s: float
    prompt_tokens: int
    prefix_hit_tokens: int
    generated_tokens: int
    transfer_hidden_s: float | None  # mean of a prompt's KV transfer, while it was computed
    transfer_exposed_s: float | None  # and after that; None where there has been no transfer


class GroupRow(msgspec.Struct, frozen=True, kw_only=True):
    group: str
    model: str
    epoch: int
    ranks: int
    present: int
    serving: bool


class LinkRow(msgspec.Struct, frozen=True, kw_only=True):
    """KV of this gateway's requests. ``hand_over_s`` is the mean time from prefill's token to
    decode's first: the part of the transfer that was not hidden, the wait for the batch, a step.
    """

    prefill: str
    decode: str
    requests: int
    bytes: int
    hand_over_s: float | None


class StageRow(msgspec.Struct, frozen=True, kw_only=True):
    """``begin_s`` counts from the request's arrival. ``stage`` is wait (for a decode rank with
    room), reserve, queue (at the prefill worker), prefill, hand-over or decode.
    """

    stage: str
    begin_s: float
    seconds: float


class AttemptRow(msgspec.Struct, frozen=True, kw_only=True):
    prefill: str
    decode: str
    begin_s: float
    tokens: int
    failure: str
    stages: list[StageRow]


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    request: str
    model: str
    outcome: Outcome
    age_s: float
    seconds: float  # so far, for an open one
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    migrations: int
    failure: str
    attempts: list[AttemptRow]


class EventRow(msgspec.Struct, frozen=True, kw_only=True):
    """Happened ``times``, first and last so long ago."""

    kind: EventKind
    severity: Severity
    text: str
    first_s: float
    last_s: float
    times: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Requests and events are newest first, samples oldest first."""

    format: int
    sample_every_s: float
    gateway: GatewayRow
    workers: list[WorkerRow]
    groups: list[GroupRow]
    links: list[LinkRow]
    experts: list[ExpertGroup]
    requests: list[RequestRow]
    events: list[EventRow]
    samples: list[Sample]


def status_of(
    cluster: Cluster,
    readiness: Readiness,
    *,
    experts: list[ExpertGroup],
    samples: list[Sample],
) -> Status:
    now = cluster.clock.now()
    records = cluster.records
    events = sorted(records.events, key=lambda event: event.last, reverse=True)
    links = sorted(records.links.items(), key=lambda item: item[1].bytes, reverse=True)
    members = sorted(cluster.members, key=_place)
    return Status(
        format=FORMAT,
        sample_every_s=EVERY_S,
        gateway=GatewayRow(
            ready=readiness.ready,
            reason=readiness.reason,
            models=cluster.view.models(),
            open_requests=records.open_requests,
            waiting=cluster.waiting_requests,
            retries=cluster.retries,
            migrations=cluster.migrations,
            stale_frames=cluster.links.stale_frames,
        ),
        workers=[_worker(state, condition_of(state, cluster.links.is_up)) for state in members],
        groups=[
            GroupRow(
                group=group.group_id,
                model=group.model,
                epoch=group.epoch,
                ranks=group.world_size,
                present=len(group.ranks),
                serving=group.serving,
            )
            for group in cluster.view.groups
        ],
        links=[
            LinkRow(
                prefill=prefill,
                decode=decode,
                requests=link.requests,
                bytes=link.bytes,
                hand_over_s=_mean(link.hand_over_s, link.handed_over),
            )
            for (prefill, decode), link in links[:MAX_LINKS]
        ],
        experts=experts,
        requests=[_request(record, now) for record in records.requests()],
        events=[_event(event, now) for event in events[:MAX_EVENTS]],
        samples=samples,
    )


def _place(state: WorkerState) -> tuple[bool, str, int, str]:
    """Prefill workers first, then ranks in their order."""
    info = state.info
    return info.role == "decode", info.group_id, info.rank, info.ref.worker_id


def _worker(state: WorkerState, condition: Condition) -> WorkerRow:
    info, load = state.info, state.load
    return WorkerRow(
        worker=info.ref.worker_id,
        role=info.role,
        group=info.group_id,
        model=info.model,
        host=info.host,
        condition=condition,
        running=load.running_requests,
        queued=load.queued_requests,
        queued_tokens=load.queued_tokens,
        blocks=load.total_blocks,
        cached_blocks=load.cached_blocks,
        granted_blocks=load.granted_blocks,
        active_blocks=load.active_blocks,
        quarantined_blocks=load.quarantined_blocks,
        step_s=round(load.step_seconds, 6),
        tokens_per_s=round(load.tokens_per_second, 3),
        prompt_tokens=load.prompt_tokens,
        prefix_hit_tokens=load.prefix_hit_tokens,
        generated_tokens=load.generated_tokens,
        transfer_hidden_s=_mean(load.push_hidden_s, load.pushes),
        transfer_exposed_s=_mean(load.push_exposed_s, load.pushes),
    )


def _mean(seconds: float, count: int) -> float | None:
    return round(seconds / count, 6) if count else None


def _request(record: RequestRecord, now: float) -> RequestRow:
    ended = now if record.ended is None else record.ended
    attempts = [_attempt(attempt, record, ended) for attempt in record.attempts]
    return RequestRow(
        request=record.request_id,
        model=record.model,
        outcome=record.outcome,
        age_s=round(now - record.began, 3),
        seconds=round(ended - record.began, 6),
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        output_tokens=record.output_tokens(),
        migrations=sum(attempt.base_tokens > 0 for attempt in record.attempts),
        failure=record.failure,
        attempts=attempts,
    )


def _attempt(attempt: AttemptRecord, record: RequestRecord, ended: float) -> AttemptRow:
    last = attempt is record.attempts[-1]
    tokens = record.output_tokens() - attempt.base_tokens if last else attempt.tokens
    return AttemptRow(
        prefill=attempt.prefill,
        decode=attempt.decode,
        begin_s=round(attempt.began - record.began, 6),
        tokens=tokens,
        failure=attempt.failure,
        stages=[
            _stage(stage, record.began)
            for stage in stages_of(attempt, until=attempt.ended or ended)
        ],
    )


def _stage(stage: Stage, since: float) -> StageRow:
    return StageRow(
        stage=stage.name, begin_s=round(stage.begin - since, 6), seconds=round(stage.seconds, 6)
    )


def _event(event: Event, now: float) -> EventRow:
    return EventRow(
        kind=event.kind,
        severity=event.severity,
        text=event.text,
        first_s=round(now - event.first, 3),
        last_s=round(now - event.last, 3),
        times=event.times,
    )
