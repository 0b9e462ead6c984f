"""What must be refused, because to do something else instead is worse."""

from typing import Any

from capacity.conformance.case import Case, NotOffered, expect
from capacity.conformance.errors import CHAT, nested
from capacity.conformance.server import Server, a_chat

_OK = 200
_OUT_OF_RANGE: dict[str, Any] = {
    "temperature": -1,
    "top_p": 1.5,
    "n": 0,
    "max_tokens": -1,
    "presence_penalty": 9,
    "logit_bias": {"5": 1000},
    "stop": ["a", "b", "c", "d", "e"],
    "messages": [],
}


def _ranges(server: Server) -> None:
    taken = [
        name
        for name, value in _OUT_OF_RANGE.items()
        if server.post(CHAT, a_chat(**{name: value})).status_code == _OK
    ]
    expect(not taken, f"accepted out of range: {', '.join(taken)}")
    for name, value in _OUT_OF_RANGE.items():
        nested(server.post(CHAT, a_chat(**{name: value})), 400)


def _form(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _bad_schema(server: Server) -> None:
    for form in (_form({"type": "nothing"}), {"type": "a format that nobody knows"}):
        nested(server.post(CHAT, a_chat(response_format=form)), 400)


def _slow_schema(server: Server) -> None:
    """Either answer is right, but it must come, and others must be served after it."""
    pattern = "^(([a-z]{1,500}x?){1,500}y?){1,500}$"
    answer = server.post(
        CHAT, a_chat(response_format=_form({"type": "string", "pattern": pattern}))
    )
    if answer.status_code != _OK:
        nested(answer, 400)
    server.chat()


def _no_silent_constraint(server: Server) -> None:
    fields: dict[str, Any] = {"guided_json": {"type": "object"}, "guided_choice": ["red", "green"]}
    for name, value in fields.items():
        answer = server.post(CHAT, a_chat(**{name: value}))
        if answer.status_code != _OK:
            nested(answer, 400)
            continue
        content = answer.json()["choices"][0]["message"]["content"]
        kept = content.startswith("{") if name == "guided_json" else content in value
        expect(kept, f"{name} is accepted and has no effect")


def _bad_key(server: Server) -> None:
    headers = {"authorization": "Bearer nobody-has-this-key"}
    answer = server.send("POST", CHAT, headers=headers, json={"model": server.model, **a_chat()})
    if answer.status_code == _OK:
        raise NotOffered("no API key is needed")
    error = nested(answer, 401)
    expect(error.get("code") == "invalid_api_key", f"code is {error.get('code')}")
    expect("www-authenticate" in answer.headers, "there is no www-authenticate header")
    for method, path in (("GET", "models"), ("POST", "completions"), ("GET", "nothing/here")):
        status = server.send(method, path, headers=headers).status_code
        expect(status == 401, f"{method} {path} without a key is HTTP {status}")  # noqa: PLR2004


def _request_id(server: Server) -> None:
    answer = server.post(CHAT, a_chat(temperature=99))
    expect(answer.headers.get("x-request-id"), "an error has no x-request-id header")


def _images(server: Server) -> None:
    """A model that sees images may answer; one that does not must say so."""
    url = "http://127.0.0.1:9/x.png"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    answer = server.post(CHAT, a_chat(messages=[{"role": "user", "content": parts}]))
    expect(answer.status_code != _OK, "an image that cannot be had is answered as if it were there")
    nested(answer, 400)


CASES = (
    Case(
        name="refuse.ranges",
        reason="a value that is cut to its range, or ignored, hides a caller's mistake",
        breaks="callers who tune sampling; the server, where the value reaches the sampler",
        check=_ranges,
    ),
    Case(
        name="refuse.bad-schema",
        reason="a schema that cannot be used is the caller's mistake, and not the server's",
        breaks="clients that retry every 500; the server (CVE-2025-48943, CVE-2025-48944)",
        check=_bad_schema,
    ),
    Case(
        name="refuse.slow-schema",
        reason="to compile a pattern must take neither the caller's time nor that of others",
        breaks="the server (CVE-2026-55574)",
        check=_slow_schema,
    ),
    Case(
        name="refuse.silent-constraints",
        reason="output that silently lacks its constraint is parsed all the same",
        breaks="clients written for vLLM before structured_outputs",
        check=_no_silent_constraint,
    ),
    Case(
        name="refuse.bad-key",
        reason="every path needs the key, and its refusal the usual shape",
        breaks="openai-python (AuthenticationError); operators who trust the key",
        check=_bad_key,
    ),
    Case(
        name="refuse.request-id",
        reason="support starts with the id that the exception shows",
        breaks="openai-python (error.request_id)",
        check=_request_id,
    ),
    Case(
        name="refuse.images",
        reason="a model that cannot see must not answer as if it did",
        breaks="chat interfaces with attachments",
        check=_images,
    ),
)
