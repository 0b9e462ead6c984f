"""What clients need of calls of tools."""

import json
from typing import Any

from capacity.conformance.case import Case, NotOffered, expect
from capacity.conformance.server import Server, a_chat

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint something",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "green", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
FORCED = {"type": "function", "function": {"name": "paint"}}
FIELDS: dict[str, Any] = {"tools": [TOOL], "tool_choice": FORCED, "max_tokens": 100}
_OK = 200


def _called(server: Server) -> dict[str, Any]:
    answer = server.post("chat/completions", a_chat(**FIELDS))
    if answer.status_code != _OK:
        raise NotOffered(f"HTTP {answer.status_code}: {answer.text[:100]}")
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def _forced(server: Server) -> None:
    choice = _called(server)
    calls = choice["message"].get("tool_calls") or []
    expect(len(calls) >= 1, "no call was made")
    call = calls[0]
    expect(call.get("type") == "function" and call.get("id"), "a call lacks its type or id")
    expect(call["function"]["name"] == "paint", f"it calls {call['function']['name']}")
    arguments = json.loads(call["function"]["arguments"])
    expect(arguments.get("colour") in ("red", "green", "blue"), "not the tool's schema")
    expect(choice["message"].get("content") in (None, ""), "there is content beside a forced call")


def _deltas(server: Server) -> None:
    _called(server)
    stream = server.stream_chat(**FIELDS)
    deltas = [
        call
        for event in stream.events
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls") or []
    ]
    expect(deltas, "no delta has a call")
    expect(all("index" in call for call in deltas), "a delta of a call has no index")
    indexes = sorted({call["index"] for call in deltas})
    expect(indexes == list(range(len(indexes))), f"the indexes are {indexes}")
    for index in indexes:
        mine = [call for call in deltas if call["index"] == index]
        ids = [call["id"] for call in mine if call.get("id")]
        names = [call["function"]["name"] for call in mine if call["function"].get("name")]
        expect(len(ids) == 1 and len(names) == 1, "id or name is not there exactly once")
        expect(mine[0].get("id"), "the first delta of a call has no id")
        json.loads("".join(call["function"].get("arguments") or "" for call in mine))


def _finish(server: Server) -> None:
    _called(server)
    choice = server.chat(**{**FIELDS, "tool_choice": "required"})["choices"][0]
    reason = choice["finish_reason"]
    expect(reason == "tool_calls", f"finish_reason is {reason}")


def _round_trip(server: Server) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "paint", "arguments": '{"colour": "red"}'},
    }
    _called(server)
    result: str | list[dict[str, str]] = "painted"
    for said in ({"content": None}, {"content": ""}, {}):
        messages = [
            {"role": "user", "content": "Paint it."},
            {"role": "assistant", **said, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": result},
        ]
        server.chat(messages=messages, tools=[TOOL])
        result = [{"type": "text", "text": "painted"}]


def _content_is_there(server: Server) -> None:
    message = _called(server)["message"]
    expect("content" in message, "the message has no content, not even null")


def _none(server: Server) -> None:
    _called(server)
    message = server.chat(tools=[TOOL], tool_choice="none")["choices"][0]["message"]
    expect(not message.get("tool_calls"), "there is a call although tool_choice is none")


def _one_call(server: Server) -> None:
    _called(server)
    asked = {**FIELDS, "tool_choice": "required", "parallel_tool_calls": False}
    calls = server.chat(**asked)["choices"][0]["message"].get("tool_calls") or []
    expect(len(calls) == 1, f"{len(calls)} calls with parallel_tool_calls false")


def _stream_finish(server: Server) -> None:
    whole = _called(server)["message"]["tool_calls"]
    events = server.stream_chat(**FIELDS).events
    reasons = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
    asked = {**FIELDS, "tool_choice": "required", "parallel_tool_calls": False}
    required = server.stream_chat(**asked).events
    reasons += [c["finish_reason"] for e in required for c in e["choices"] if c["finish_reason"]]
    expect(len(reasons) == 2, "not one finish_reason")  # noqa: PLR2004
    expect(reasons[1] == "tool_calls", f"finish_reason is {reasons[1]}")
    text = "".join(
        call["function"].get("arguments") or ""
        for event in events
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls") or []
    )
    expect(text == "".join(call["function"]["arguments"] for call in whole), "not the whole one's")


def _unknown(server: Server) -> None:
    _called(server)
    choice = {"type": "function", "function": {"name": "sing"}}
    answer = server.post("chat/completions", a_chat(tools=[TOOL], tool_choice=choice))
    expect(answer.status_code == 400, f"HTTP {answer.status_code}")  # noqa: PLR2004


CASES = (
    Case(
        name="tools.forced",
        reason="a forced call must be made, with arguments that parse and match the schema",
        breaks="instructor, LangChain with_structured_output, Pydantic AI",
        check=_forced,
    ),
    Case(
        name="tools.deltas",
        reason="calls are put together by dense indexes; an id or name that comes twice is joined",
        breaks="openai-python stream helper (TypeError), Vercel AI SDK, agno",
        check=_deltas,
    ),
    Case(
        name="tools.finish-reason",
        reason="agents call tools only when they see tool_calls",
        breaks="LangChain agents, AutoGen",
        check=_finish,
    ),
    Case(
        name="tools.content-null",
        reason="content is required in a message, and null beside calls",
        breaks="typed clients: openai-go, openai-java",
        check=_content_is_there,
    ),
    Case(
        name="tools.none",
        reason="an agent that asks for words must get words",
        breaks="agents that sum up at the end",
        check=_none,
    ),
    Case(
        name="tools.one-call",
        reason="an agent that can do one thing at a time must get one call",
        breaks="OpenAI Agents SDK, agents with side effects",
        check=_one_call,
    ),
    Case(
        name="tools.stream",
        reason="streamed calls are the same calls, and end with tool_calls",
        breaks="LangChain agents, Vercel AI SDK",
        check=_stream_finish,
    ),
    Case(
        name="tools.round-trip",
        reason="a conversation with calls and results, with content or without, must be accepted",
        breaks="every agent",
        check=_round_trip,
    ),
    Case(
        name="tools.unknown",
        reason="a forced tool that does not exist is a caller's mistake",
        breaks="callers that wait for a call",
        check=_unknown,
    ),
)
