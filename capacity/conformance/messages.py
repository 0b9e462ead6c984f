"""What clients need of Anthropic's Messages API."""

import json
from typing import Any

from capacity.conformance.case import Case, expect, offered
from capacity.conformance.server import Server

PATH = "messages"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16}
TOOL: dict[str, Any] = {
    "name": "paint",
    "input_schema": {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    },
}
FORCED: dict[str, Any] = {
    **ASKED,
    "max_tokens": 100,
    "tools": [TOOL],
    "tool_choice": {"type": "tool", "name": "paint"},
}


def _create(server: Server) -> None:
    message = offered(server.post(PATH, ASKED))
    expect(message["type"] == "message" and message["role"] == "assistant", "not a message")
    counts = message["usage"]
    expect({"input_tokens", "output_tokens"} <= counts.keys(), "usage lacks a count")


def _events(server: Server) -> None:
    offered(server.post(PATH, ASKED))
    events = server.stream(PATH, {**ASKED, "stream": True}).events
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    expect(kinds[:2] == ["message_start", "content_block_start"], f"it begins with {kinds[:2]}")
    ending = ["content_block_stop", "message_delta", "message_stop"]
    expect(kinds[-3:] == ending, f"it ends with {kinds[-3:]}")
    delta = next(event for event in events if event["type"] == "message_delta")
    expect(delta["delta"].get("stop_reason"), "message_delta has no stop_reason")
    expect("output_tokens" in delta.get("usage", {}), "message_delta has no output_tokens")


def _tool_use(server: Server) -> None:
    offered(server.post(PATH, ASKED))
    message = offered(server.post(PATH, FORCED))
    calls = [block for block in message["content"] if block["type"] == "tool_use"]
    expect(calls, "no call was made")
    expect(calls[0]["input"].get("colour") in ("red", "green"), "not the tool's schema")
    expect(message["stop_reason"] == "tool_use", f"stop_reason is {message['stop_reason']}")
    result = {"type": "tool_result", "tool_use_id": calls[0]["id"], "content": "painted"}
    turn = [
        *ASKED["messages"],
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": [result]},
    ]
    offered(server.post(PATH, {**ASKED, "tools": [TOOL], "messages": turn}))


def _tool_deltas(server: Server) -> None:
    offered(server.post(PATH, ASKED))
    events = server.stream(PATH, {**FORCED, "stream": True}).events
    started = [event for event in events if event["type"] == "content_block_start"]
    indexes = [event["index"] for event in started]
    expect(indexes == list(range(len(indexes))), f"the blocks' indexes are {indexes}")
    (index,) = [e["index"] for e in started if e["content_block"]["type"] == "tool_use"]
    pieces = [
        event["delta"]["partial_json"]
        for event in events
        if event["type"] == "content_block_delta" and event["index"] == index
    ]
    expect(json.loads("".join(pieces))["colour"] in ("red", "green"), "the pieces are no input")


def _errors(server: Server) -> None:
    offered(server.post(PATH, ASKED))
    answer = server.post(PATH, {**ASKED, "max_tokens": 0})
    expect(answer.status_code == 400, f"HTTP {answer.status_code}")  # noqa: PLR2004
    body = answer.json()
    expect(body.get("type") == "error", f"the body's type is {body.get('type')}")
    kind = body["error"].get("type")
    expect(kind == "invalid_request_error", f"the error's type is {kind}")


def _format(server: Server) -> None:
    offered(server.post(PATH, ASKED))
    form = {"type": "json_schema", "schema": TOOL["input_schema"]}
    body = {**ASKED, "max_tokens": 100, "output_config": {"format": form}}
    message = offered(server.post(PATH, body))
    found = json.loads("".join(block.get("text", "") for block in message["content"]))
    expect(found.get("colour") in ("red", "green"), "not the schema's")


def _count(server: Server) -> None:
    counted = offered(server.post(f"{PATH}/count_tokens", {"messages": ASKED["messages"]}))
    read = offered(server.post(PATH, ASKED))["usage"]
    cached = (read.get("cache_read_input_tokens") or 0) + (
        read.get("cache_creation_input_tokens") or 0
    )
    expect(counted["input_tokens"] == read["input_tokens"] + cached, "the message reads others")


CASES = (
    Case(
        name="messages.create",
        reason="tools built for Anthropic's API use this endpoint",
        breaks="Claude Code and other coding agents",
        check=_create,
    ),
    Case(
        name="messages.events",
        reason="messages are put together from blocks that are opened, filled and closed",
        breaks="anthropic-sdk-python messages.stream, Claude Code",
        check=_events,
    ),
    Case(
        name="messages.tool-use",
        reason="agents send a call back as they got it, with its result behind",
        breaks="Claude Code and other coding agents",
        check=_tool_use,
    ),
    Case(
        name="messages.tool-deltas",
        reason="a call's input is joined from pieces of JSON, by the index of its block",
        breaks="anthropic-sdk-python messages.stream",
        check=_tool_deltas,
    ),
    Case(
        name="messages.errors",
        reason="errors have a shape of their own here; in the other one they say nothing",
        breaks="anthropic-sdk-python, Claude Code",
        check=_errors,
    ),
    Case(
        name="messages.format",
        reason="output that silently lacks its format is parsed all the same",
        breaks="anthropic-sdk-python messages.parse",
        check=_format,
    ),
    Case(
        name="messages.count-tokens",
        reason="agents compact their conversation by this count",
        breaks="Claude Code",
        check=_count,
    ),
)
