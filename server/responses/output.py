"""A response while it grows: its output items, the events that tell of them, and its final object.

Invariant: applying the events of a stream gives exactly the object that the same answer would have
had in one piece; sequence numbers have no gaps. Event types and their fields are those of the
OpenAI API reference, Responses, Streaming events.
"""

from collections.abc import Mapping
from typing import Any, Literal

import orjson

from server.openai.answer import Answer
from server.openai.choice import Choice
from server.text.families.parts import CallArguments, CallBegun, Content, Part, Reasoning

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
Item = dict[str, Any]


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "message": ("msg", {"role": "assistant", "content": []}),
    "reasoning": ("rs", {"summary": [], "content": []}),
    "function_call": ("fc", {"arguments": ""}),
}


class Output:
    """Items are open, one at a time, until the next one begins or the text has ended."""

    def __init__(self, response_id: str) -> None:
        self._suffix = response_id.removeprefix("resp_")
        self.items: list[Item] = []
        self._open: Item | None = None

    def add(self, part: Part) -> list[tuple[str, dict[str, Any]]]:
        """Events, as name and fields."""
        match part:
            case Content(text=text):
                return [*self._begin("message"), self._text_delta("output_text", text)]
            case Reasoning(text=text):
                return [*self._begin("reasoning"), self._text_delta("reasoning_text", text)]
            case CallBegun(call_id=call_id, name=name):
                return self._begin("function_call", call_id=call_id, name=name)
            case CallArguments(text=text):
                assert self._open is not None
                self._open["arguments"] += text
                return [("response.function_call_arguments.delta", self._at(delta=text))]

    def close(self, *, status: str = "completed") -> list[tuple[str, dict[str, Any]]]:
        """End the open item, if there is one."""
        item = self._open
        if item is None:
            return []
        item["status"] = status
        events: list[tuple[str, dict[str, Any]]] = []
        if item["type"] == "function_call":
            done = self._at(arguments=item["arguments"], name=item["name"])
            events.append(("response.function_call_arguments.done", done))
        else:
            part = item["content"][0]
            kind = part["type"]
            fields: dict[str, Any] = {"content_index": 0, "text": part["text"]}
            if kind == "output_text":
                fields["logprobs"] = []
            events.append((f"response.{kind}.done", self._at(**fields)))
            events.append(("response.content_part.done", self._at(content_index=0, part=part)))
        events.append(("response.output_item.done", self._indexed(item=item)))
        self._open = None
        return events

    def _begin(self, kind: str, **fields: str) -> list[tuple[str, dict[str, Any]]]:
        if self._open is not None and self._open["type"] == kind and kind != "function_call":
            return []
        events = self.close()
        item = self._new_item(kind, fields)
        self._open = item
        self.items.append(item)
        events.append(("response.output_item.added", self._indexed(item=_copy(item))))
        if kind != "function_call":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if kind == "message":
                part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"].append(part)
            added = self._at(content_index=0, part=dict(part))
            events.append(("response.content_part.added", added))
        return events

    def _new_item(self, kind: str, fields: Mapping[str, str]) -> Item:
        number = f"{self._suffix}_{len(self.items)}"
        prefix, more = _KINDS[kind]
        empty = {name: [] if value == [] else value for name, value in more.items()}
        own = {"id": f"{prefix}_{number}", "type": kind, "status": "in_progress"}
        return {**own, **empty, **fields}

    def _text_delta(self, kind: str, text: str) -> tuple[str, dict[str, Any]]:
        assert self._open is not None
        self._open["content"][0]["text"] += text
        fields: dict[str, Any] = {"content_index": 0, "delta": text}
        if kind == "output_text":
            fields["logprobs"] = []
        return f"response.{kind}.delta", self._at(**fields)

    def _at(self, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], **self._indexed(**fields)}

    def _indexed(self, **fields: Any) -> dict[str, Any]:
        return {"output_index": len(self.items) - 1, **fields}


def usage_fields(answer: Answer) -> dict[str, Any]:
    usage = answer.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }


def ending_of(choice: Choice) -> tuple[Status, dict[str, str] | None]:
    """The response's status, and what it lacks where it is incomplete."""
    if choice.finish_reason == "length":
        return "incomplete", {"reason": "max_output_tokens"}
    return "completed", None


def event(name: str, number: int, fields: Mapping[str, Any]) -> bytes:
    data = orjson.dumps({"type": name, "sequence_number": number, **fields})
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


def _copy(item: Item) -> Item:
    return {name: list(value) if isinstance(value, list) else value for name, value in item.items()}
