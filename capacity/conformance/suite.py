"""All cases, run one after another against one server."""

from collections.abc import Iterator, Sequence

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
        server = Server(client, model or _first_model(client))
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


def _first_model(client: httpx.Client) -> str:
    try:
        answer = client.get("models")
        answer.raise_for_status()
        first: str = answer.json()["data"][0]["id"]
    except (httpx.HTTPError, *_MISSHAPEN) as error:
        raise Unreachable(
            f"{client.base_url}models does not name a model: {type(error).__name__}: {error}"
        ) from error
    return first
