"""Runs one request of either endpoint: read, plan, generate, and send in one piece or as events.

Invariant: when the call returns, however it ended, every generation it began has ended too. It is
a plain ASGI application, because a framework's response object for each request, and its wrappers
around each event, would cost more than the rest of the gateway.
"""

from collections.abc import Awaitable, Sequence
from functools import partial
from http import HTTPStatus
from time import monotonic
from typing import Protocol

import anyio
from starlette.types import Receive, Scope, Send

from protocol.errors import Overloaded, ServingError
from protocol.messages import PrefillTimes
from runtime.log import bind, get_log
from server.admission import logged_ids, read_json_body, time_allowed_s
from server.callers import ANYONE, Caller
from server.error_bodies import error_body
from server.exchange import exchange_of
from server.generation import Deliver, TokenChunk
from server.metrics import HttpMetrics, RequestOutcome, outcome_of
from server.openai.answer import Answer, Kind, Services
from server.openai.choice import Choice, run_choice
from server.openai.errors import ErrorAnswer, HttpError, describe
from server.openai.request_span import refused_span, request_span
from server.openai.sse import DONE, EventStream, Outcome, StreamTimes, unless_hung_up
from server.openai.streaming import AnswerStream, ChoiceStream
from server.quotas import UNLIMITED, Quota
from server.responses.background import BackgroundResponses
from server.responses.form import ResponsesForm
from server.tracing import TraceContext

log = get_log(__name__)

_STREAM_OUTCOMES: dict[Outcome, RequestOutcome] = {
    Outcome.COMPLETE: "ok",
    Outcome.FAILED: "server_error",
    Outcome.HUNG_UP: "disconnected",
    Outcome.STALLED: "disconnected",
}


class Plan(Protocol):
    """Reads a body: ``plan_chat`` or ``plan_completion``."""

    def __call__(
        self, body: bytes, services: Services, *, answer_id: str, caller: Caller
    ) -> Awaitable[Answer]: ...


class OpenRequests:
    """How many requests are being answered, over all endpoints."""

    def __init__(self, limit: int) -> None:
        self.count = 0
        self.limit = limit


class GenerationEndpoint:
    def __init__(
        self,
        kind: Kind,
        plan: Plan,
        services: Services,
        *,
        metrics: HttpMetrics,
        times: StreamTimes,
        open_requests: OpenRequests,
        request_timeout_s: float,
        background: BackgroundResponses,
    ) -> None:
        self._background = background
        self._kind = kind
        self._plan = plan
        self._services = services
        self._metrics = metrics
        self._times = times
        self._open = open_requests
        self._request_timeout_s = request_timeout_s
        self._in_flight = metrics.in_flight.labels(kind)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = monotonic()
        outcome: RequestOutcome = "server_error"
        self._open.count += 1
        self._in_flight.inc()
        state = scope["state"]
        quota: Quota = state.get("quota") or Quota(UNLIMITED)
        admitted = False
        try:
            quota.begin(arrived)
            admitted = True
            with bind(**logged_ids(scope)):
                outcome = await self._answer(scope, receive, send, arrived, quota)
        except (ServingError, HttpError) as error:
            refusal = describe(error)
            outcome = outcome_of(refusal.status)
            if "run" not in state:
                self._trace_refusal(state.get("trace"), arrived, refusal)
            raise
        finally:
            if admitted:
                quota.end()
            self._open.count -= 1
            self._in_flight.dec()
            self._metrics.requests.labels(self._kind, outcome).inc()
            self._metrics.request_time.observe(monotonic() - arrived)
            if outcome == "disconnected":
                self._metrics.disconnects.inc()

    def _trace_refusal(
        self, trace: TraceContext | None, arrived: float, refusal: ErrorAnswer
    ) -> None:
        spans = self._services.spans
        if spans is not None and (trace is None or trace.sampled):
            span = refused_span(
                self._kind,
                trace=trace,
                seconds=monotonic() - arrived,
                status=int(refusal.status),
                code=refusal.code,
            )
            spans.exporter.add(span)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, arrived: float, quota: Quota
    ) -> RequestOutcome:
        if self._open.count > self._open.limit:
            raise Overloaded("too many open requests")
        deadline = arrived + time_allowed_s(scope, at_most=self._request_timeout_s)
        body = await read_json_body(scope, receive, timeout_s=self._services.limits.body_timeout_s)
        state = scope["state"]
        answer = await self._plan(
            body,
            self._services,
            answer_id=state["answer_id"],
            caller=state.get("caller", ANYONE),
        )
        asked_tokens = answer.most_tokens()
        quota.take_tokens(asked_tokens, monotonic())
        run = state["run"] = AnswerRun(
            answer,
            self._services,
            self._metrics,
            arrived=arrived,
            deadline=deadline,
            trace=state.get("trace"),
        )
        ignored = ",".join(answer.ignored).encode()
        headers = [(b"x-ignored-params", ignored)] if ignored else []
        if isinstance(answer.form, ResponsesForm) and answer.form.in_background:

            async def collect(texts: list[str]) -> None:
                try:
                    await run.collect_into(texts)
                finally:
                    quota.end()
                    quota.give_back_tokens(asked_tokens - answer.used_tokens(), monotonic())
                    run.account()

            try:
                begun = self._background.begin(answer, answer.form, collect)
                quota.goes_on()
            except ServingError:
                quota.give_back_tokens(asked_tokens, monotonic())
                raise
            await _send_json(send, begun, headers)
            return "ok"
        exchange = exchange_of(scope, send)
        try:
            if answer.asked.stream:
                stream = EventStream(
                    exchange,
                    send,
                    headers=headers,
                    times=self._times,
                    ending=DONE if answer.form is None else b"",
                    error_body=partial(error_body, path=scope["path"]),
                )
                return _STREAM_OUTCOMES[await stream.run(run.stream_to)]
            texts: list[str] = []
            if not await unless_hung_up(exchange, lambda: run.collect_into(texts)):
                return "disconnected"
            await _send_json(send, answer.body(texts), headers + run.timing_headers())
        finally:
            quota.give_back_tokens(asked_tokens - answer.used_tokens(), monotonic())
            run.account()
        return "ok"


class AnswerRun:
    """The choices of one answer being generated, side by side."""

    def __init__(
        self,
        answer: Answer,
        services: Services,
        metrics: HttpMetrics,
        *,
        arrived: float,
        deadline: float,
        trace: TraceContext | None = None,
    ) -> None:
        self._answer = answer
        self._generator = services.generator
        self._spans = services.spans
        self._records = services.records
        self._trace = trace
        self._metrics = metrics
        self._arrived = arrived
        self._deadline = deadline
        self._timing: tuple[PrefillTimes, float] | None = None

    async def stream_to(self, stream: EventStream) -> None:
        answer_stream = AnswerStream(self._answer, stream)

        def observe(choice: Choice) -> None:
            if self._observe(choice):
                stream.add_headers(self.timing_headers())

        gaps = self._metrics.token_gap
        await self._run(
            [
                ChoiceStream(choice, answer_stream, gaps=gaps, observe=observe).deliver
                for choice in self._answer.choices
            ]
        )

    async def collect_into(self, texts: list[str]) -> None:
        """Fill ``texts`` with the whole text of each choice."""
        pieces: list[list[str]] = [[] for _ in self._answer.choices]
        pairs = zip(self._answer.choices, pieces, strict=True)
        await self._run([partial(self._collect, choice, of_it) for choice, of_it in pairs])
        texts += map("".join, pieces)

    def _collect(self, choice: Choice, pieces: list[str], chunk: TokenChunk) -> bool:
        pieces.append(choice.accept(chunk))
        self._observe(choice)
        return choice.finish_reason is None

    async def _run(self, delivers: Sequence[Deliver]) -> None:
        """``delivers`` has one for each choice."""
        choices = self._answer.choices
        if len(choices) == 1:
            await self._run_one(choices[0], delivers[0])
            return
        failures: list[Exception] = []
        async with anyio.create_task_group() as tasks:

            async def contained(choice: Choice, deliver: Deliver) -> None:
                try:
                    await self._run_one(choice, deliver)
                except Exception as error:  # noqa: BLE001  the first one is raised below
                    failures.append(error)
                    tasks.cancel_scope.cancel()

            for choice, deliver in zip(choices, delivers, strict=True):
                tasks.start_soon(contained, choice, deliver)
        if failures:
            raise failures[0]

    async def _run_one(self, choice: Choice, deliver: Deliver) -> None:
        if choice.request.stop.max_tokens == 0:  # an echo, and nothing more
            deliver(TokenChunk(token_ids=(), finish_reason="length"))
            return
        deadline_s = self._deadline - monotonic()
        await run_choice(choice, self._generator, deadline_s=deadline_s, deliver=deliver)

    def _observe(self, choice: Choice) -> bool:
        """Whether these are the first tokens of the whole answer."""
        now = monotonic()
        last, choice.delivered_at = choice.delivered_at, now
        if last:
            self._metrics.token_gap.observe(now - last)
            return False
        self._metrics.first_token.observe(now - self._arrived)
        if self._timing is not None:
            return False
        self._timing = (choice.times or PrefillTimes(0.0, 0.0), now - self._arrived)
        return True

    def timing_headers(self) -> list[tuple[bytes, bytes]]:
        """Where the time to the first token went, in milliseconds: ``wait`` is for a decode rank
        and on the way, ``queue`` and ``prefill`` are at the prefill worker. In an answer that is
        complete, ``transfer`` is how long the first token was ahead of the decode rank's first.
        """
        if self._timing is None:
            return []
        stages = [*self._stages(), *self._transfer(), ("ttft", self._timing[1])]
        shown = ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in stages)
        return [(b"server-timing", shown.encode())]

    def _transfer(self) -> list[tuple[str, float]]:
        request_id = self._answer.choices[0].request.request_id
        record = None if self._records is None else self._records.find(request_id)
        last = record.attempts[-1] if record is not None and record.attempts else None
        if last is None or last.first_token is None or last.decoding is None:
            return []
        return [("transfer", last.decoding - last.first_token)]

    def _stages(self) -> list[tuple[str, float]]:
        """Until the first token, which there must have been."""
        assert self._timing is not None
        times, first_s = self._timing
        wait_s = max(0.0, first_s - times.queue_s - times.compute_s)
        return [("wait", wait_s), ("queue", times.queue_s), ("prefill", times.compute_s)]

    def account(self) -> None:
        """Count the tokens, however the answer ended."""
        usage = self._answer.usage()
        completion_tokens = usage["completion_tokens"]
        cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        self._metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self._metrics.completion_tokens.inc(completion_tokens)
        self._metrics.cached_tokens.inc(cached_tokens)
        seconds = monotonic() - self._arrived
        if self._spans is not None and (self._trace is None or self._trace.sampled):
            span = request_span(
                self._answer,
                self._spans.records,
                trace=self._trace,
                arrived=self._arrived,
                ended=self._arrived + seconds,
            )
            self._spans.exporter.add(span)
        log.info(
            "request ended",
            endpoint=self._answer.kind,
            choices=len(self._answer.choices),
            finished=sum(c.finish_reason is not None for c in self._answer.choices),
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
            seconds=round(seconds, 4),
        )


async def _send_json(send: Send, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    head = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *headers,
    ]
    await send({"type": "http.response.start", "status": HTTPStatus.OK, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})
