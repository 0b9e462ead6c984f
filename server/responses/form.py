"""How ``/v1/responses`` writes an answer: as one object, or as events that build it."""

from collections.abc import Sequence
from typing import Any, Literal

import anyio
import msgspec
import orjson

from server.openai.answer import Answer
from server.openai.choice import Choice
from server.openai.errors import ErrorAnswer
from server.responses.conversation import Message, messages_of_output
from server.responses.output import Output, Status, ending_of, event, usage_fields
from server.responses.schema import ResponsesRequest
from server.responses.store import ResponseStore, StoredResponse


class ResponsesForm:
    """For one request. The finished response is stored unless the caller does not want that."""

    kind: Literal["responses"] = "responses"

    def __init__(
        self,
        asked: ResponsesRequest,
        messages: list[Message],
        *,
        store: ResponseStore,
        tenant: str,
    ) -> None:
        self._asked = asked
        self._messages = messages
        self._store = store
        self._tenant = tenant

    def body(self, answer: Answer, texts: Sequence[str]) -> bytes:
        (choice,), (text,) = answer.choices, texts
        output = Output(response_id(answer))
        for part in answer.parts(choice, text):
            output.add(part)
        return orjson.dumps(self.finished(answer, choice, output))

    def events(self, answer: Answer) -> "ResponseEvents":
        return ResponseEvents(answer, self)

    def finished(self, answer: Answer, choice: Choice, output: Output) -> dict[str, Any]:
        """The whole response; it is stored by then."""
        status, incomplete = ending_of(choice)
        output.close(status=status)
        shown = self.shown(answer, status=status, output=output.items)
        shown |= {"incomplete_details": incomplete, "usage": usage_fields(answer)}
        if self._asked.store is not False:
            conversation = [*self._messages, *messages_of_output(output.items)]
            self._store.put(StoredResponse(tenant=self._tenant, shown=shown, messages=conversation))
        return shown

    def begin(self, answer: Answer, running: anyio.CancelScope) -> bytes:
        """Store what will be generated in the background; the response as it is now."""
        shown = self.shown(answer, status="in_progress")
        self._store.put(
            StoredResponse(
                tenant=self._tenant, shown=shown, messages=self._messages, running=running
            )
        )
        return orjson.dumps(shown)

    def fail(self, answer: Answer, error: ErrorAnswer) -> None:
        """A background response has failed: those who ask for it learn why."""
        shown = self.shown(answer, status="failed")
        shown["error"] = {"code": error.code or error.type, "message": error.message}
        self._store.put(StoredResponse(tenant=self._tenant, shown=shown, messages=self._messages))

    @property
    def in_background(self) -> bool:
        return bool(self._asked.background)

    def shown(
        self, answer: Answer, *, status: Status, output: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        asked = self._asked
        tools = [msgspec.to_builtins(tool) for tool in asked.tools or ()]
        sampling = answer.choices[0].request.sampling
        return {
            "id": response_id(answer),
            "object": "response",
            "created_at": answer.created,
            "status": status,
            "background": bool(asked.background),
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": answer.model.id,
            "output": list(output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None},
            "store": asked.store is not False,
            "temperature": sampling.temperature,
            "text": {"format": _format(asked)},
            "tool_choice": msgspec.to_builtins(asked.tool_choice or "auto"),
            "tools": [{"strict": None, "parameters": None, **tool} for tool in tools],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }


class ResponseEvents:
    def __init__(self, answer: Answer, form: ResponsesForm) -> None:
        self._answer = answer
        self._form = form
        self._output = Output(response_id(answer))
        self._number = 0

    def opening(self, _choice: Choice) -> bytes:
        begun = {"response": self._form.shown(self._answer, status="in_progress")}
        return self._event("response.created", begun) + self._event("response.in_progress", begun)

    def text(self, choice: Choice, text: str) -> bytes:
        events = [e for part in self._answer.parts(choice, text) for e in self._output.add(part)]
        return b"".join(self._event(name, fields) for name, fields in events)

    def finish(self, choice: Choice) -> bytes:
        held = self.text(choice, "")
        status, _ = ending_of(choice)
        events = self._output.close(status=status)
        closing = b"".join(self._event(name, fields) for name, fields in events)
        response = self._form.finished(self._answer, choice, self._output)
        return held + closing + self._event(f"response.{status}", {"response": response})

    def usage(self) -> bytes:
        return b""  # the finished response has it

    def around_text(self, _choice: Choice) -> None:
        return None  # what has been written changes with every event

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        number, self._number = self._number, self._number + 1
        return event(name, number, fields)


def response_id(answer: Answer) -> str:
    return f"resp_{answer.id.removeprefix('chatcmpl-')}"


def _format(asked: ResponsesRequest) -> dict[str, Any]:
    if asked.text is None or asked.text.format is None:
        return {"type": "text"}
    built: dict[str, Any] = msgspec.to_builtins(asked.text.format)
    return {name: value for name, value in built.items() if value is not None}
