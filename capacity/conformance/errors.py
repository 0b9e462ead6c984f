"""What clients need of errors."""

import re
from typing import Any

import httpx

from capacity.conformance.case import Case, expect
from capacity.conformance.server import Server, a_chat

CHAT = "chat/completions"
_LEAK = re.compile(r'Traceback|File \\?"|site-packages|/home/|/usr/lib|0x[0-9a-f]{6,}')
MAX_ERROR_BYTES = 16_384
NOTHING = "a-model-that-nobody-serves"


def nested(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer that must be one."""
    shown = answer.text[:200]
    expect(answer.status_code == status, f"HTTP {answer.status_code} instead of {status}: {shown}")
    try:
        body = answer.json()
    except ValueError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    expect(isinstance(error, dict), f"no object under error: {shown}")
    assert isinstance(error, dict)
    return error


def _is_nested(server: Server) -> None:
    error = nested(server.post(CHAT, a_chat(temperature=99)), 400)
    missing = {"message", "type", "param", "code"} - error.keys()
    expect(not missing, f"error lacks {', '.join(sorted(missing))}")
    expect(isinstance(error["message"], str) and error["message"], "message is empty")


def _code_is_text(server: Server) -> None:
    error = nested(server.post(CHAT, a_chat(temperature=99)), 400)
    expect(error.get("code") is None or isinstance(error["code"], str), f"code is {error['code']}")


def _names_the_field(server: Server) -> None:
    error = nested(server.post(CHAT, a_chat(temperature=99)), 400)
    expect(error.get("param") == "temperature", f"param is {error.get('param')}")


def _is_400(server: Server) -> None:
    for body in (a_chat(temperature="hot"), {"messages": "x"}, {}):
        nested(server.post(CHAT, body), 400)


def _broken_json(server: Server) -> None:
    nested(server.post_bytes(CHAT, b'{"model": '), 400)


def _array_body(server: Server) -> None:
    nested(server.post_bytes(CHAT, b"[]"), 400)


def _not_a_number(server: Server) -> None:
    body = b'{"model": "%b", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}'
    nested(server.post_bytes(CHAT, body % server.model.encode()), 400)


def _strict_integers(server: Server) -> None:
    for value in ("3", True, 2.5):
        nested(server.post(CHAT, a_chat(n=value)), 400)


def _lone_surrogate(server: Server) -> None:
    body = b'{"model": "%b", "messages": [{"role": "user", "content": "\\ud800"}]}'
    nested(server.post_bytes(CHAT, body % server.model.encode()), 400)


def _unknown_model(server: Server) -> None:
    error = nested(server.post(CHAT, {**a_chat(), "model": NOTHING}), 404)
    expect(error.get("code") == "model_not_found", f"code is {error.get('code')}")


def _unknown_path(server: Server) -> None:
    nested(server.send("GET", "nothing/here"), 404)


def _wrong_method(server: Server) -> None:
    nested(server.send("GET", CHAT), 405)


def _no_leaks(server: Server) -> None:
    answers = [
        server.post(CHAT, a_chat(temperature=99)),
        server.post_bytes(CHAT, b"{"),
        server.post(CHAT, a_chat(logit_bias={"x": 1})),
        server.send("GET", "nothing/here"),
    ]
    for answer in answers:
        found = _LEAK.search(answer.text)
        expect(found is None, f"an error shows {found[0] if found else ''}")


def _small(server: Server) -> None:
    messages = [{"role": "user", "content": {"x": i}} for i in range(500)]
    answer = server.post(CHAT, {"messages": messages})
    nested(answer, 400)
    size = len(answer.content)
    expect(size <= MAX_ERROR_BYTES, f"the error has {size} bytes")


def _no_redirect(server: Server) -> None:
    answer = server.post(f"{CHAT}/", a_chat())
    expect(not answer.is_redirect, f"HTTP {answer.status_code} redirects, and the body is lost")


def _too_long(server: Server) -> None:
    error = nested(server.post(CHAT, a_chat(max_tokens=100_000_000)), 400)
    expect(error.get("code") == "context_length_exceeded", f"code is {error.get('code')}")


CASES = (
    Case(
        name="errors.nested",
        reason="a flat body reads as an empty message, and in mid-stream as a normal chunk",
        breaks="openai-python (silent in streams), openai-node ('400 status code (no body)')",
        check=_is_nested,
    ),
    Case(
        name="errors.code-is-text",
        reason="a number where the API has a string or null does not decode",
        breaks="typed clients: openai-go, openai-java, Rust async-openai",
        check=_code_is_text,
    ),
    Case(
        name="errors.param",
        reason="without the field's name a caller cannot tell what to change",
        breaks="agents that repair their own requests",
        check=_names_the_field,
    ),
    Case(
        name="errors.400-not-422",
        reason="422 is not among the statuses that the API has for a bad request",
        breaks="openai-python raises UnprocessableEntityError instead of BadRequestError",
        check=_is_400,
    ),
    Case(
        name="errors.broken-json",
        reason="a body that is cut off must still get the usual error",
        breaks="any client behind a proxy with a body limit",
        check=_broken_json,
    ),
    Case(
        name="errors.array-body",
        reason="a JSON body that is no object must still get the usual error",
        breaks="gateways that batch",
        check=_array_body,
    ),
    Case(
        name="errors.not-a-number",
        reason="NaN passes range checks and reaches the sampler, where it has ended whole servers",
        breaks="the server (CVE-2026-54235)",
        check=_not_a_number,
    ),
    Case(
        name="errors.strict-integers",
        reason="true read as 1 hides a caller's mistake",
        breaks="callers with a wrong type that works until it does not",
        check=_strict_integers,
    ),
    Case(
        name="errors.lone-surrogate",
        reason="half a character cannot be encoded: unchecked, it is an internal error",
        breaks="clients that cut strings by UTF-16 units",
        check=_lone_surrogate,
    ),
    Case(
        name="errors.unknown-model",
        reason="routers fall back to another server on 404 with model_not_found",
        breaks="LiteLLM, OpenRouter",
        check=_unknown_model,
    ),
    Case(
        name="errors.unknown-path",
        reason="a 404 in another shape reads as an empty message",
        breaks="openai-python, openai-node",
        check=_unknown_path,
    ),
    Case(
        name="errors.wrong-method",
        reason="a 405 in another shape reads as an empty message",
        breaks="openai-python, openai-node",
        check=_wrong_method,
    ),
    Case(
        name="errors.no-leaks",
        reason="stack traces, paths and addresses help attackers",
        breaks="the server (CVE-2026-22778)",
        check=_no_leaks,
    ),
    Case(
        name="errors.small",
        reason="an error that repeats its input turns kilobytes into megabytes",
        breaks="the server, and every log behind it",
        check=_small,
    ),
    Case(
        name="errors.no-redirect",
        reason="clients follow 307 without the body",
        breaks="httpx-based clients with a trailing slash in their base URL",
        check=_no_redirect,
    ),
    Case(
        name="errors.context-length",
        reason="agents shorten their conversation when they see context_length_exceeded",
        breaks="LangChain, LlamaIndex, coding agents",
        check=_too_long,
    ),
)
