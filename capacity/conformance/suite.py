"""All cases, run one after another against one server."""

from collections.abc import Iterator, Sequence
from math import inf

import httpx

from capacity.conformance import (
    chat,
    endpoints,
    errors,
    messages,
    refusals,
    responses,
    streaming,
    tools,
)
from capacity.conformance.case import Case, Fails, Finding, NotOffered
from capacity.conformance.server import Server

CASES: tuple[Case, ...] = (
    *errors.CASES,
    *refusals.CASES,
    *chat.CASES,
    *streaming.CASES,
    *tools.CASES,
    *endpoints.CASES,
    *responses.CASES,
    *messages.CASES,
)
FIRST_ANSWER_S = 10.0  # for the list of models, which computes nothing
# What an answer of another shape makes a check run into.
_MISSHAPEN = (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration)


class Unreachable(Exception):
    """No case can be tried: the server does not answer, or names no model."""


def run_suite(
    base_url: str,
    *,
    api_key: str | None,
    model: str | None,
    timeout_s: float,
    cases: Sequence[Case] = CASES,
) -> Iterator[Finding]:
    """One finding a case, in order. ``model`` None is the first that the server lists.

    Raises:
        Unreachable: before the first finding.
    """
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    with httpx.Client(
        base_url=f"{base_url.rstrip('/')}/", headers=headers, timeout=timeout_s
    ) as client:
        server = Server(client, model or first_model(client))
        for case in cases:
            yield _try(case, server)


def _try(case: Case, server: Server) -> Finding:
    try:
        case.check(server)
    except NotOffered as reason:
        return Finding(case=case, outcome="not offered", detail=str(reason))
    except Fails as reason:
        return Finding(case=case, outcome="fails", detail=str(reason))
    except httpx.HTTPError as error:
        detail = f"the connection failed: {type(error).__name__}"
        return Finding(case=case, outcome="fails", detail=detail)
    except _MISSHAPEN as error:
        detail = f"unexpected answer: {type(error).__name__}: {error}"
        return Finding(case=case, outcome="fails", detail=detail[:300])
    return Finding(case=case, outcome="holds")


def first_model(client: httpx.Client) -> str:
    """
    Raises:
        Unreachable: the server does not answer soon, or names no model.
    """
    url = f"{client.base_url}models"
    try:
        answer = client.get("models", timeout=min(FIRST_ANSWER_S, client.timeout.read or inf))
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise Unreachable(f"nobody answers at {url}: {error}") from error
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise Unreachable(f"{url} wants an API key (http {answer.status_code}): --api-key-file")
    try:
        first: str = answer.json()["data"][0]["id"]
    except _MISSHAPEN as error:
        raise Unreachable(
            f"{url} lists no model (http {answer.status_code}): is this the base URL of an "
            "OpenAI-compatible server, with its /v1?"
        ) from error
    return first
