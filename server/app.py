"""The gateway's HTTP application: its routes, and the one boundary where errors become answers."""

from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version

from anyio.abc import TaskGroup
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from protocol.errors import ServingError
from runtime.log import get_log
from server.access import ApiKeys
from server.admission import Admission
from server.cluster import Cluster
from server.error_bodies import error_body
from server.generation import Generator
from server.json_response import json_response
from server.messages.plan import CountTokens, plan_message
from server.metrics import HttpMetrics
from server.openai.answer import Services, Spans
from server.openai.chat import plan_chat
from server.openai.completions import plan_completion
from server.openai.endpoint import GenerationEndpoint, OpenRequests
from server.openai.errors import HttpError, describe
from server.openai.models import ModelEndpoints
from server.openai.sse import StreamTimes
from server.openai.tokens import TokenEndpoints
from server.openapi import openapi
from server.page.endpoints import status_routes
from server.page.records import Records, Severity
from server.page.samples import Samples
from server.responses.background import BackgroundResponses
from server.responses.endpoints import StoredResponseEndpoints
from server.responses.plan import ResponsePlan
from server.responses.store import ResponseStore
from server.settings import GatewaySettings
from server.spans import DroppedSpans, SpanExporter
from server.structured.compiler import GrammarCompiler
from server.text.long_texts import LongTexts
from server.text.model_text import ModelText

log = get_log(__name__)


def create_app(
    generator: Generator,
    text: ModelText,
    settings: GatewaySettings,
    *,
    registry: CollectorRegistry | None = None,
    metrics: HttpMetrics | None = None,
    times: StreamTimes | None = None,
    spans: SpanExporter | None = None,
    grammars: GrammarCompiler | None = None,
    long_texts: LongTexts | None = None,
    tasks: TaskGroup | None = None,
    cluster: Cluster | None = None,
) -> ASGIApp:
    """The ASGI application. ``registry`` is what /metrics shows, the application's own included;
    ``grammars`` and ``long_texts`` stay the caller's to close. Background responses live in
    ``tasks``, and are refused without. With ``cluster`` there is a status page, whose samples are
    taken in ``tasks``, and ``spans`` get what requests went through.

    Raises:
        ConfigError: the file of API keys cannot be used.
    """
    registry = registry or CollectorRegistry()
    times = times or StreamTimes(write_stall_s=settings.limits.write_stall_s)
    services = Services(
        generator=generator,
        text=text,
        limits=settings.limits,
        grammars=grammars or GrammarCompiler(text.tokenizer.vocabulary()),
        long_texts=long_texts,
        spans=Spans(exporter=spans, records=cluster.records) if spans and cluster else None,
        records=cluster.records if cluster else None,
    )
    metrics = metrics or HttpMetrics(registry)
    if spans is not None:
        registry.register(DroppedSpans(spans))
    store = ResponseStore()
    endpoint = partial(
        GenerationEndpoint,
        services=services,
        metrics=metrics,
        times=times,
        open_requests=OpenRequests(settings.max_open_requests),
        request_timeout_s=settings.request_timeout_s,
        background=BackgroundResponses(tasks),
    )
    responses = ResponsePlan(store, stores=settings.processes == 1)
    stored = StoredResponseEndpoints(store)
    tokens = TokenEndpoints(services)
    models = ModelEndpoints(generator)
    operations = OperationEndpoints(generator, registry)
    page: list[Route] = []
    answer: Callable[[Request, Exception], Awaitable[Response]] = answer_error
    if cluster is not None:
        samples = Samples(cluster, metrics, cluster.clock)
        page = status_routes(cluster, generator, samples)
        answer = partial(answer_and_note, cluster.records)
        if tasks is not None:
            tasks.start_soon(samples.run)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", endpoint("chat", plan_chat), methods=["POST"]),
            Route("/v1/completions", endpoint("completions", plan_completion), methods=["POST"]),
            Route("/v1/responses", endpoint("responses", responses), methods=["POST"]),
            Route("/v1/responses/{id}", stored.show_or_delete, methods=["GET", "DELETE"]),
            Route("/v1/responses/{id}/cancel", stored.cancel, methods=["POST"]),
            Route("/v1/messages", endpoint("messages", plan_message), methods=["POST"]),
            Route("/v1/messages/count_tokens", CountTokens(services).count, methods=["POST"]),
            Route("/tokenize", tokens.tokenize, methods=["POST"]),
            Route("/detokenize", tokens.detokenize, methods=["POST"]),
            Route("/v1/models", models.list_models),
            Route("/v1/models/{id:path}", models.get_model),
            Route("/health", operations.health),
            Route("/ready", operations.ready),
            Route("/metrics", operations.metrics),
            Route("/version", operations.version),
            Route("/openapi.json", operations.openapi),
            *page,
        ],
        exception_handlers={
            ServingError: answer,
            HttpError: answer,
            HTTPException: answer_routing_error,
            Exception: answer,  # a bug: the server's own log gets the traceback
        },
    )
    app.router.redirect_slashes = False  # clients drop the body when they follow
    return Admission(
        app,
        max_body_bytes=int(settings.limits.max_body_bytes),
        api_keys=ApiKeys.read(settings.api_keys_file) if settings.api_keys_file else None,
        spans=spans,
    )


class OperationEndpoints:
    """For probes and operators. None of them asks a worker anything."""

    def __init__(self, generator: Generator, registry: CollectorRegistry) -> None:
        self._generator = generator
        self._registry = registry

    async def health(self, _request: Request) -> Response:
        """This process answers; it says nothing of the workers."""
        return json_response({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        readiness = self._generator.readiness()
        status = HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE
        response = json_response({"ready": readiness.ready, "reason": readiness.reason}, status)
        if not readiness.ready:
            response.headers["retry-after"] = "1"
        return response

    async def metrics(self, _request: Request) -> Response:
        shown = generate_latest(self._registry)
        return Response(shown, headers={"content-type": CONTENT_TYPE_LATEST})

    async def version(self, _request: Request) -> Response:
        return json_response({"version": _version()})

    async def openapi(self, _request: Request) -> Response:
        return json_response(openapi(_version()))


async def answer_error(request: Request, error: Exception) -> Response:
    """The details go to the log, the allow-listed message to the caller."""
    answer = describe(error)
    if isinstance(error, ServingError):
        fields = {**error.details, "code": error.code, "stage": error.stage}
        log.info("request refused", **{**fields, "status": int(answer.status), "why": str(error)})
    body = error_body(answer, request.scope["path"])
    return Response(body, answer.status, dict(answer.headers), media_type="application/json")


async def answer_and_note(records: Records, request: Request, error: Exception) -> Response:
    """``answer_error``, and the refusal is among the events of the status page. What has failed in
    some stage has been noted there.
    """
    if not (isinstance(error, ServingError) and error.stage):
        told = describe(error)
        ours = told.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        severity: Severity = "error" if ours else "warning"
        records.note("request", severity, f"refused with {told.status:d}: {told.message}")
    return await answer_error(request, error)


async def answer_routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    allowed = (error.headers or {}).get("Allow", "")
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        wrong = HttpError(status, f"use {allowed}", headers=(("allow", allowed),))
    else:
        wrong = HttpError(status, "there is nothing at this path; the API is under /v1")
    return await answer_error(request, wrong)


def _version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
