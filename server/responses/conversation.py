"""From a request for a response to the chat that it means, and from an output back to a chat."""

from collections.abc import Sequence
from typing import Any

from protocol.errors import invalid_field
from server.responses.schema import (
    FunctionTool,
    InputItem,
    InputPart,
    NamedChoice,
    ResponsesRequest,
    TextFormat,
)

Message = dict[str, Any]
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text")


def chat_fields(asked: ResponsesRequest, earlier: Sequence[Message]) -> dict[str, Any]:
    """The body of the chat request that means the same; ``earlier`` is the stored conversation.

    Raises:
        InvalidRequest: the input has something that a chat cannot say.
    """
    fields: dict[str, Any] = {
        "model": asked.model,
        "messages": [*_instructions(asked), *earlier, *messages_of(asked.input)],
        "max_completion_tokens": asked.max_output_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "stream": asked.stream,
        "tools": [_tool(tool, i) for i, tool in enumerate(asked.tools or ())] or None,
        "tool_choice": _tool_choice(asked.tool_choice),
        "parallel_tool_calls": asked.parallel_tool_calls,
        "response_format": _response_format(asked.text.format if asked.text else None),
        "reasoning_effort": asked.reasoning.effort if asked.reasoning else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def messages_of(items: str | Sequence[InputItem]) -> list[Message]:
    """Chat messages; calls in a row become one message of the assistant."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Message] = []
    for index, item in enumerate(items):
        path = f"input[{index}]"
        match item.type:
            case "message":
                content = _text(item.content, f"{path}.content")
                messages.append({"role": item.role or "user", "content": content})
            case "function_call":
                _add_call(messages, item, path)
            case "function_call_output":
                content = _text(item.output, f"{path}.output")
                messages.append(
                    {"role": "tool", "tool_call_id": item.call_id or "", "content": content}
                )
            case "reasoning":
                pass  # models are not shown what they thought before
            case _:
                raise invalid_field(f"{path}.type", "this server takes messages and function calls")
    return messages


def messages_of_output(output: Sequence[dict[str, Any]]) -> list[Message]:
    """What a response said, as the messages that continue its conversation."""
    messages: list[Message] = []
    for item in output:
        if item["type"] == "message":
            text = "".join(part["text"] for part in item["content"])
            messages.append({"role": "assistant", "content": text})
        elif item["type"] == "function_call":
            call = InputItem(
                call_id=item["call_id"], name=item["name"], arguments=item["arguments"]
            )
            _add_call(messages, call, "output")
    return messages


def _instructions(asked: ResponsesRequest) -> list[Message]:
    if asked.instructions is None:
        return []
    return [{"role": "system", "content": asked.instructions}]


def _text(content: str | list[InputPart] | None, path: str) -> str:
    if content is None:
        raise invalid_field(path, "is required")
    if isinstance(content, str):
        return content
    for index, part in enumerate(content):
        if part.type not in _TEXT_PARTS:
            raise invalid_field(f"{path}[{index}].type", "this model takes text only")
    return "".join(part.text or part.refusal or "" for part in content)


def _add_call(messages: list[Message], item: InputItem, path: str) -> None:
    if item.name is None or item.arguments is None or item.call_id is None:
        raise invalid_field(path, "a function_call needs call_id, name and arguments")
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def _tool(tool: FunctionTool, index: int) -> dict[str, Any]:
    if tool.type != "function" or tool.name is None:
        raise invalid_field(
            f"tools[{index}].type", "this server has no tools of its own: use function"
        )
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: str | NamedChoice | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, NamedChoice):
        return choice
    if choice.type != "function" or choice.name is None:
        raise invalid_field("tool_choice", "must be none, auto, required or a function by name")
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(asked: TextFormat | None) -> dict[str, Any] | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type != "json_schema":
        return {"type": asked.type}
    named = {"name": asked.name or "", "schema": asked.schema or {}}
    return {"type": "json_schema", "json_schema": named}
