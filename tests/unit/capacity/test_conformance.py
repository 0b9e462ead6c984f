"""The suite finds the faults that real servers have had."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from capacity.conformance.case import Fails, NotOffered
from capacity.conformance.server import Server
from capacity.conformance.suite import CASES, Unreachable, first_model, run_suite
from deploy.conformance import conformance
from deploy.conformance_options import add_conformance_options

Answer = Callable[[httpx.Request], httpx.Response]
BY_NAME = {case.name: case for case in CASES}
HEAD: dict[str, Any] = {"id": "x", "created": 1, "model": "m", "object": "chat.completion.chunk"}


def check(name: str, answer: Answer) -> None:
    transport = httpx.MockTransport(answer)
    with httpx.Client(transport=transport, base_url="http://server/v1/") as client:
        BY_NAME[name].check(Server(client, "m"))


def always(status: int, body: object) -> Answer:
    return lambda _: httpx.Response(status, json=body)


def streaming(*events: object, done: bool = True) -> Answer:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    text = "".join(lines) + ("data: [DONE]\n\n" if done else "")
    headers = {"content-type": "text/event-stream", "x-accel-buffering": "no"}
    return lambda _: httpx.Response(200, text=text, headers=headers)


def chunk(delta: object, reason: str | None = None, **more: object) -> dict[str, Any]:
    return {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more}


GOOD_ERROR = {"message": "no", "type": "invalid_request_error", "param": "temperature", "code": "x"}
FORCED_CALL = {
    "id": "c",
    "type": "function",
    "function": {"name": "paint", "arguments": '{"colour": "red"}'},
}


def calling(*deltas: dict[str, Any]) -> Answer:
    """A whole answer with a call, then a stream with ``deltas`` of it."""
    choice = {"index": 0, "message": {"tool_calls": [FORCED_CALL]}, "finish_reason": "stop"}
    streamed = streaming(*(chunk({"tool_calls": [delta]}) for delta in deltas), chunk({}, "stop"))

    def answer(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content).get("stream"):
            return streamed(request)
        return httpx.Response(200, json={"choices": [choice]})

    return answer


BEGUN = {"index": 0, "id": "c", "function": {"name": "paint", "arguments": ""}}
MORE = {"index": 0, "function": {"arguments": "{}"}}


@pytest.mark.parametrize(
    ("name", "answer", "found"),
    [
        ("errors.nested", always(400, {"object": "error", "message": "flat"}), "no object"),
        ("errors.nested", always(422, {"error": GOOD_ERROR}), "422"),
        ("errors.code-is-text", always(400, {"error": {**GOOD_ERROR, "code": 400}}), "400"),
        ("errors.param", always(400, {"error": {**GOOD_ERROR, "param": None}}), "None"),
        ("errors.unknown-path", always(404, {"detail": "Not Found"}), "no object"),
        ("errors.small", always(400, {"error": {**GOOD_ERROR, "message": "x" * 20_000}}), "bytes"),
        (
            "errors.no-leaks",
            always(400, {"error": {**GOOD_ERROR, "message": 'File "/app/x.py", line 1'}}),
            "shows",
        ),
        ("chat.null-fields", always(400, {"error": GOOD_ERROR}), "400"),
        ("errors.no-redirect", lambda _: httpx.Response(307, headers={"location": "/"}), "307"),
        ("stream.done", streaming(chunk({}, "stop"), done=False), "0 times"),
        ("stream.role", streaming(chunk({"content": "x"}), chunk({}, "stop")), "no role"),
        ("stream.finish-reason", streaming(chunk({"content": "x"})), "not one finish_reason"),
        (
            "stream.no-empty-choices",
            streaming(chunk({}, "stop"), {**HEAD, "choices": []}),
            "no choices",
        ),
        ("stream.constant", streaming(chunk({}), {**chunk({}, "stop"), "id": "y"}), "change"),
        ("stream.early-errors", streaming({"error": GOOD_ERROR}), "200"),
        ("refuse.ranges", always(200, {"choices": []}), "temperature"),
        ("refuse.bad-schema", always(500, {"error": GOOD_ERROR}), "500"),
        (
            "refuse.silent-constraints",
            always(200, {"choices": [{"message": {"content": "Well, ..."}}]}),
            "no effect",
        ),
        ("refuse.bad-key", always(401, {"error": "Unauthorized"}), "no object"),
        ("tools.content-null", calling(BEGUN, MORE), "no content"),
        ("tools.none", calling(BEGUN, MORE), "although"),
        ("tools.stream", calling(BEGUN, MORE), "finish_reason is stop"),
        ("responses.create", always(200, {"object": "chat.completion"}), "chat.completion"),
        (
            "messages.create",
            always(200, {"type": "message", "role": "assistant", "usage": {}}),
            "lacks",
        ),
        ("messages.errors", always(200, {"type": "message"}), "200"),
        ("tools.deltas", calling(BEGUN, {"function": {"arguments": "{}"}}), "no index"),
        ("tools.deltas", calling(BEGUN, {**MORE, "id": "c"}), "exactly once"),
        ("tools.deltas", calling({**BEGUN, "index": 1}, {**MORE, "index": 1}), "indexes are [1]"),
    ],
)
def test_a_known_fault_is_found(name: str, answer: Answer, found: str) -> None:
    with pytest.raises(Fails) as failure:
        check(name, answer)
    assert found in str(failure.value)


def test_a_good_stream_of_a_call_holds() -> None:
    check("tools.deltas", calling(BEGUN, MORE))


def test_what_is_not_there_is_not_offered() -> None:
    with pytest.raises(NotOffered):
        check("messages.create", always(404, {"error": GOOD_ERROR}))


def test_keys_that_nobody_asks_for_are_not_tried() -> None:
    with pytest.raises(NotOffered):
        check("refuse.bad-key", always(200, {}))


def command(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_conformance_options(parser)
    return parser.parse_args(arguments)


def test_the_cases_are_listed_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert conformance(command("--list", "--json", "--only", "tools", "--only", "stream.d")) == 0
    names = [case["name"] for case in json.loads(capsys.readouterr().out)]
    assert "stream.done" in names
    assert "tools.deltas" in names
    assert all(name.startswith(("tools", "stream.d")) for name in names)


def test_a_selection_of_nothing_is_wrong_usage() -> None:
    assert conformance(command("--only", "nothing")) == 2


def test_every_case_says_why_and_who_breaks() -> None:
    assert len(BY_NAME) == len(CASES) > 50
    for case in CASES:
        assert case.reason
        assert case.breaks


@pytest.mark.parametrize(
    ("url", "says"),
    [("http://127.0.0.1:1/v1", "nobody answers"), ("127.0.0.1:1/v1", "http://")],
)
def test_where_nobody_answers_is_said_before_the_first_case(url: str, says: str) -> None:
    with pytest.raises(Unreachable, match=says):
        list(run_suite(url, api_key=None, model=None, timeout_s=1.0))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (httpx.Response(404, text="<html>\nnot found</html>"), r"lists no model \(http 404\)"),
        (httpx.Response(200, json={"data": []}), r"lists no model \(http 200\)"),
        (httpx.Response(401, json={}), "wants an API key"),
    ],
    ids=["html", "empty", "key"],
)
def test_a_server_that_names_no_model_is_told_in_one_line(
    answer: httpx.Response, says: str
) -> None:
    transport = httpx.MockTransport(lambda _: answer)
    with (
        httpx.Client(transport=transport, base_url="http://server/v1/") as client,
        pytest.raises(Unreachable, match=says) as told,
    ):
        first_model(client)
    assert "\n" not in str(told.value)
