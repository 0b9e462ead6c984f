"""How ``/v1/messages`` writes an answer: content blocks, whole or as events that build them.

Source: Anthropic API reference, Messages and Streaming messages.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import orjson

from server.openai.answer import Answer
from server.openai.choice import Choice
from server.text.families.parts import CallArguments, CallBegun, Content, Part, Reasoning

_DELTAS = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}


class MessagesForm:
    kind: Literal["messages"] = "messages"

    def body(self, answer: Answer, texts: Sequence[str]) -> bytes:
        (choice,), (text,) = answer.choices, texts
        blocks: list[dict[str, Any]] = []
        for part in answer.parts(choice, text):
            _add(blocks, part)
        for block in blocks:
            if block["type"] == "tool_use":
                block["input"] = _parsed(block["input"])
        message = {**_message(answer), "content": blocks, **_ending(answer, choice)}
        return orjson.dumps({**message, "usage": _usage(answer)})

    def events(self, answer: Answer) -> "MessageEvents":
        return MessageEvents(answer)


class MessageEvents:
    """One block is open at a time; blocks are numbered without gaps."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False

    def opening(self, _choice: Choice) -> bytes:
        usage = {**_usage(self._answer), "output_tokens": 0}
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**_message(self._answer), **nothing, "usage": usage}
        return _event("message_start", {"message": message})

    def text(self, choice: Choice, text: str) -> bytes:
        return b"".join(map(self._part, self._answer.parts(choice, text)))

    def finish(self, choice: Choice) -> bytes:
        ending = {"delta": _ending(self._answer, choice), "usage": _usage(self._answer)}
        return b"".join(
            (
                self.text(choice, ""),
                self._close(len(self._blocks) - 1),
                _event("message_delta", ending),
                _event("message_stop", {}),
            )
        )

    def usage(self) -> bytes:
        return b""  # the last events have it

    def around_text(self, _choice: Choice) -> None:
        return None  # what has been written changes with every event

    def _part(self, part: Part) -> bytes:
        before = len(self._blocks)
        delta = _add(self._blocks, part)
        begun = b""
        if len(self._blocks) > before:
            block = self._blocks[-1]
            shown = dict(_EMPTY[block["type"]])
            shown.update((name, block[name]) for name in ("id", "name") if name in block)
            begun = self._close(before - 1) + self._event(
                "content_block_start", content_block=shown
            )
            self._is_open = True
        return begun + (self._event("content_block_delta", delta=delta) if delta else b"")

    def _close(self, index: int) -> bytes:
        was_open, self._is_open = self._is_open, False
        return _event("content_block_stop", {"index": index}) if was_open else b""

    def _event(self, name: str, **fields: Any) -> bytes:
        return _event(name, {"index": len(self._blocks) - 1, **fields})


_EMPTY: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "tool_use": {"type": "tool_use", "input": {}},
}


def _add(blocks: list[dict[str, Any]], part: Part) -> dict[str, Any] | None:
    """Put ``part`` into the last block or a new one; the delta that says so."""
    match part:
        case CallBegun(call_id=call_id, name=name):
            blocks.append({"type": "tool_use", "id": call_id, "name": name, "input": ""})
            return None
        case CallArguments(text=text):
            blocks[-1]["input"] += text
            return {"type": "input_json_delta", "partial_json": text}
        case Content(text=text) | Reasoning(text=text):
            kind = "text" if isinstance(part, Content) else "thinking"
            delta, field = _DELTAS[kind]
            if not blocks or blocks[-1]["type"] != kind:
                blocks.append(dict(_EMPTY[kind]))
            blocks[-1][field] += text
            return {"type": delta, field: text}


def _message(answer: Answer) -> dict[str, Any]:
    message_id = f"msg_{answer.id.removeprefix('chatcmpl-')}"
    return {"id": message_id, "type": "message", "role": "assistant", "model": answer.model.id}


def _ending(answer: Answer, choice: Choice) -> dict[str, str | None]:
    reason = answer.finish_reason(choice)
    if choice.matched_stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.matched_stop}
    named = {"tool_calls": "tool_use", "length": "max_tokens"}.get(reason or "", "end_turn")
    return {"stop_reason": named, "stop_sequence": None}


def _usage(answer: Answer) -> dict[str, int]:
    """Cached tokens do not count as input here, but beside it."""
    cached = sum(choice.cached_tokens for choice in answer.choices)
    (choice,) = answer.choices
    return {
        "input_tokens": len(choice.request.prompt_token_ids) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": choice.completion_tokens,
    }


def _parsed(arguments: str) -> dict[str, Any]:
    """The call's input; what the model cut off or wrote wrong is shown as it is."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {"invalid_json": arguments}


def _event(name: str, fields: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **fields}))
