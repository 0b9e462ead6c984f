"""An answered request as a span: the whole, and what each of its choices' attempts went through.

It reads what the gateway has noted of the attempts; it measures nothing itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from server.openai.answer import Answer
from server.openai.choice import Choice
from server.page.records import AttemptRecord, Records, RequestRecord
from server.page.stages import stages_of
from server.spans import RequestSpan, Service, StageSpan, Value
from server.tracing import TraceContext

_SERVICES: Mapping[str, Service] = {
    "reserve": "decode",
    "queue": "prefill",
    "prefill": "prefill",
    "hand-over": "decode",
    "decode": "decode",
}
_CANCELLED = "cancelled: the client has gone"


def request_span(
    answer: Answer,
    records: Records,
    *,
    trace: TraceContext | None,
    arrived: float,
    ended: float,
) -> RequestSpan:
    """``arrived`` and ``ended`` are times of the records' clock."""
    output_tokens = sum(choice.completion_tokens for choice in answer.choices)
    seconds = ended - arrived
    known = [(choice, records.find(choice.request.request_id)) for choice in answer.choices]
    return RequestSpan(
        name=f"{answer.kind} {answer.model.id}",
        trace=trace,
        started_unix_s=datetime.now(UTC).timestamp() - seconds,
        seconds=seconds,
        failure=_failure(known),
        stages=[
            stage
            for choice, record in known
            if record is not None  # else nothing was asked of workers, or too long ago
            for stage in _stages_of_choice(choice, record, arrived=arrived, ended=ended)
        ],
        attributes={
            "gen_ai.operation.name": "text_completion" if answer.kind == "completions" else "chat",
            "gen_ai.request.model": answer.model.id,
            "gen_ai.response.id": answer.id,
            "gen_ai.usage.input_tokens": answer.used_tokens() - output_tokens,
            "gen_ai.usage.output_tokens": output_tokens,
        },
    )


def refused_span(
    name: str,
    *,
    trace: TraceContext | None,
    seconds: float,
    status: int,
    code: str | None,
    admitted: bool = True,
) -> RequestSpan:
    """Of a request that got an error before anything was asked of workers."""
    return RequestSpan(
        name=name,
        trace=trace,
        started_unix_s=datetime.now(UTC).timestamp() - seconds,
        seconds=seconds,
        failure=f"refused: {code or status}",
        stages=(),
        attributes={"http.response.status_code": status},
        admitted=admitted,
    )


def _failure(known: Sequence[tuple[Choice, RequestRecord | None]]) -> str:
    """Why the answer is not whole: a choice that failed, before those that it took with it."""
    failed = (record.failure for _, record in known if record is not None and record.failure)
    ended = all(choice.finish_reason is not None for choice, _ in known)
    return next(failed, "" if ended else _CANCELLED)


def _stages_of_choice(
    choice: Choice, record: RequestRecord, *, arrived: float, ended: float
) -> Iterator[StageSpan]:
    yield StageSpan(name="read", begin_s=0.0, seconds=max(0.0, record.began - arrived))
    for number, attempt in enumerate(record.attempts, start=1):
        of_attempt: dict[str, Value] = {
            "headrace.choice": choice.index,
            "headrace.attempt": number,
        }
        stages = stages_of(attempt, until=attempt.ended or ended)
        for stage in stages:
            service = _SERVICES.get(stage.name, "gateway")
            yield StageSpan(
                name=stage.name,
                begin_s=stage.begin - arrived,
                seconds=stage.seconds,
                service=service,
                worker=_worker(service, attempt),
                failure=attempt.failure if stage is stages[-1] else "",
                attributes=of_attempt,
            )


def _worker(service: Service, attempt: AttemptRecord) -> str:
    return {"prefill": attempt.prefill, "decode": attempt.decode}.get(service, "")
