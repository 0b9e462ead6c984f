"""What clients need of the Responses API."""

import json
from typing import Any

import httpx

from capacity.conformance.case import Case, expect, offered
from capacity.conformance.errors import nested
from capacity.conformance.server import Server

PATH = "responses"
ASKED: dict[str, Any] = {"input": "Name one colour.", "max_output_tokens": 16}
_OK = 200


def _text_of(response: dict[str, Any]) -> str:
    messages = [item for item in response["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in messages for part in item["content"])


def _create(server: Server) -> None:
    response = offered(server.post(PATH, ASKED))
    expect(response["object"] == "response", f"object is {response['object']}")
    expect(_text_of(response), "there is no message")
    again = server.send("GET", f"{PATH}/{response['id']}")
    expect(again.status_code == _OK, f"asking again is HTTP {again.status_code}")


def _events(server: Server) -> None:
    offered(server.post(PATH, ASKED))
    events = server.stream(PATH, {**ASKED, "stream": True}).events
    numbers = [event["sequence_number"] for event in events]
    expect(numbers == list(range(len(numbers))), "sequence numbers have gaps")
    kinds = [event["type"] for event in events]
    expect(kinds[0] == "response.created", f"it begins with {kinds[0]}")
    expect(kinds[-1] in ("response.completed", "response.incomplete"), f"it ends with {kinds[-1]}")


def _text_events(server: Server) -> None:
    offered(server.post(PATH, ASKED))
    events = server.stream(PATH, {**ASKED, "temperature": 0, "stream": True}).events
    kinds = [event["type"] for event in events]
    order = [
        *("response.output_item.added", "response.content_part.added"),
        *("response.output_text.delta", "response.output_text.done"),
        *("response.content_part.done", "response.output_item.done"),
    ]
    missing = [kind for kind in order if kind not in kinds]
    expect(not missing, f"there is no {', '.join(missing)}")
    firsts = [kinds.index(kind) for kind in order]
    expect(firsts == sorted(firsts), "an item, a part and its text are not opened in turn")
    text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    expect(
        text == _text_of(events[-1]["response"]), "the deltas are not the text of the last event"
    )


def _conversation(server: Server) -> None:
    first = offered(server.post(PATH, ASKED))
    asked = {**ASKED, "input": "And another?", "previous_response_id": first["id"]}
    second = offered(server.post(PATH, asked))
    read = [response["usage"]["input_tokens"] for response in (first, second)]
    expect(read[1] > read[0], "the second request does not read what the first one said")
    nested(server.post(PATH, {**asked, "previous_response_id": "resp_nobody_has"}), 400)


def _delete(server: Server) -> None:
    path = f"{PATH}/{offered(server.post(PATH, ASKED))['id']}"
    deleted = server.send("DELETE", path)
    expect(deleted.status_code == _OK, f"HTTP {deleted.status_code}")
    nested(server.send("GET", path), 404)


def _call(server: Server) -> None:
    tool = {
        "type": "function",
        "name": "paint",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    }
    asked = {**ASKED, "tools": [tool], "max_output_tokens": 100}
    response = offered(server.post(PATH, {**asked, "tool_choice": "required"}))
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    expect(calls, "no call was made")
    expect(json.loads(calls[0]["arguments"])["colour"] in ("red", "green"), "not the tool's schema")
    result = {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": "painted"}
    turn = [{"role": "user", "content": "Paint."}, calls[0], result]
    answer: httpx.Response = server.post(PATH, {**asked, "input": turn})
    expect(answer.status_code == _OK, f"a call and its result give HTTP {answer.status_code}")


CASES = (
    Case(
        name="responses.create",
        reason="newer clients use the Responses API first",
        breaks="OpenAI Agents SDK, Codex",
        check=_create,
    ),
    Case(
        name="responses.events",
        reason="events are ordered by their numbers",
        breaks="openai-python responses.stream",
        check=_events,
    ),
    Case(
        name="responses.text-events",
        reason="helpers put text together from items, parts and deltas in that order",
        breaks="openai-python responses.stream, Codex",
        check=_text_events,
    ),
    Case(
        name="responses.conversation",
        reason="a conversation goes on from an id; one that is lost must not go on without it",
        breaks="OpenAI Agents SDK",
        check=_conversation,
    ),
    Case(
        name="responses.delete",
        reason="what a caller deletes must be gone",
        breaks="callers with duties to forget",
        check=_delete,
    ),
    Case(
        name="responses.function-call",
        reason="agents send calls back as they got them, with the result behind",
        breaks="OpenAI Agents SDK, Codex",
        check=_call,
    ),
)
