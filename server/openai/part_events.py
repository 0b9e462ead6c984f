"""Answers whose text has parts: reasoning, content, calls of tools. As a message, or as deltas.

Clients know reasoning by two names, so both are sent; a delta never has reasoning beside content.
The first delta of a call has its number, id and name, later ones the number and more arguments.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from server.openai.choice import Choice
from server.text.families.parts import (
    CallArguments,
    CallBegun,
    Content,
    Part,
    PartReader,
    Reasoning,
)


class ReadAnswer:
    """The readers of an answer's choices, by index. Each text is read once, in order."""

    def __init__(self, readers: Sequence[PartReader], *, shows_reasoning: bool) -> None:
        self._readers = readers
        self._shows_reasoning = shows_reasoning
        self._arguments: dict[int, str] = {}  # of each choice's last call

    def push(self, choice: Choice, text: str) -> list[Part]:
        return self._noted(choice, self._readers[choice.index].push(text))

    def finish(self, choice: Choice) -> list[Part]:
        return self._noted(choice, self._readers[choice.index].finish())

    def finish_reason(self, choice: Choice) -> str | None:
        """The choice's, once all of its text has been read. A call that a stop string has cut off
        is none that a client should make.
        """
        arguments = self._arguments.get(choice.index)
        if choice.finish_reason != "stop" or arguments is None:
            return choice.finish_reason
        cut_off = choice.matched_stop is not None and not _is_json(arguments)
        return "stop" if cut_off else "tool_calls"

    def _noted(self, choice: Choice, parts: list[Part]) -> list[Part]:
        for part in parts:
            if isinstance(part, CallBegun):
                self._arguments[choice.index] = ""
            elif isinstance(part, CallArguments):
                self._arguments[choice.index] += part.text
        if self._shows_reasoning:
            return parts
        return [part for part in parts if not isinstance(part, Reasoning)]


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def message_of(parts: Iterable[Part]) -> dict[str, Any]:
    """The assistant's message; content is null where there are only calls."""
    content, reasoning = "", ""
    calls: list[dict[str, Any]] = []
    for part in parts:
        match part:
            case Content(text=text):
                content += text
            case Reasoning(text=text):
                reasoning += text
            case CallBegun(call_id=call_id, name=name):
                function = {"name": name, "arguments": ""}
                calls.append({"id": call_id, "type": "function", "function": function})
            case CallArguments(index=index, text=text):
                calls[index]["function"]["arguments"] += text
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if calls and not content else content,
        "refusal": None,
    }
    if reasoning:
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        message["tool_calls"] = calls
    return message


def delta_of(part: Part) -> bytes:
    """The ``delta`` of one event."""
    match part:
        case Content(text=text):
            delta: dict[str, Any] = {"content": text}
        case Reasoning(text=text):
            delta = {"reasoning": text, "reasoning_content": text}
        case CallBegun(index=index, call_id=call_id, name=name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": call_id, "type": "function", "function": function}
            delta = {"tool_calls": [call]}
        case CallArguments(index=index, text=text):
            delta = {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
    return orjson.dumps(delta)
