"""From a request for a message to the chat that it means."""

from collections.abc import Sequence
from typing import Any

import orjson

from protocol.errors import invalid_field
from server.messages.schema import (
    Block,
    CountRequest,
    InputMessage,
    MessagesRequest,
    MessageTool,
    MessageToolChoice,
    OutputFormat,
    Thinking,
)
from server.text.model_text import ModelText

_SWITCH = "enable_thinking"  # what most templates call it
_EFFORT = "reasoning_effort"
_ROLES = ("user", "assistant", "system")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_THOUGHTS = ("thinking", "redacted_thinking")  # models are not shown what they thought before


def chat_fields(asked: CountRequest, text: ModelText) -> dict[str, Any]:
    """The body of the chat request that means the same to the model whose ``text`` this is.

    Raises:
        InvalidRequest: a block is something that a chat cannot say.
    """
    messages: list[dict[str, Any]] = []
    if asked.system is not None:
        messages.append({"role": "system", "content": _texts(asked.system, "system")})
    for index, message in enumerate(asked.messages):
        messages += _messages(message, f"messages[{index}]")
    choice = asked.tool_choice
    fields: dict[str, Any] = {
        "model": asked.model,
        "messages": messages,
        "tools": [_tool(tool, i) for i, tool in enumerate(asked.tools or ())] or None,
        "tool_choice": None if choice is None else _tool_choice(choice),
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
        "continue_final_message": _continues(messages) or None,
        "response_format": _response_format(asked),
        _EFFORT: _effort(asked) if takes_effort(text) else None,
        **_thinking(asked.thinking, text),
    }
    if isinstance(asked, MessagesRequest):
        fields |= {
            "max_completion_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "stop": asked.stop_sequences or None,
            "stream": asked.stream,
        }
    return {name: value for name, value in fields.items() if value is not None}


def takes_effort(text: ModelText) -> bool:
    """Whether ``output_config.effort`` changes anything."""
    return text.template is not None and _EFFORT in text.template.options


def _effort(asked: CountRequest) -> str | None:
    return None if asked.output_config is None else asked.output_config.effort


def _continues(messages: Sequence[dict[str, Any]]) -> bool:
    """An answer that the caller has begun goes on from there."""
    final = messages[-1]
    return final["role"] == "assistant" and bool(final["content"]) and "tool_calls" not in final


def _response_format(asked: CountRequest) -> dict[str, Any] | None:
    given = None if asked.output_config is None else asked.output_config.format
    if given is not None and asked.output_format is not None:
        raise invalid_field("output_format", "excludes output_config.format")
    form: OutputFormat | None = given or asked.output_format
    if form is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form.schema}}


def _thinking(asked: Thinking | None, text: ModelText) -> dict[str, Any]:
    """Clients ask every model to think: one that does not reason answers as it always does."""
    if asked is None or text.reasoning is None:
        return {}
    fields: dict[str, Any] = {"include_reasoning": asked.display != "omitted"}
    if text.template is not None and _SWITCH in text.template.options:
        fields["chat_template_kwargs"] = {_SWITCH: asked.type != "disabled"}
    if asked.type != "disabled":
        fields["thinking_token_budget"] = asked.budget_tokens
    return fields


def _messages(message: InputMessage, path: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own in a chat; they come before what is said."""
    if message.role not in _ROLES:
        raise invalid_field(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        where = f"{path}.content[{index}]"
        match block.type:
            case "text":
                texts.append(_text(block, where))
            case "tool_use":
                calls.append(_call(block, where))
            case "tool_result":
                content = _texts(block.content or "", f"{where}.content")
                result = {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
                results.append(result)
            case kind if kind in _THOUGHTS:
                pass
            case _:
                raise invalid_field(f"{where}.type", "this model takes text and tool blocks only")
    said: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        said["tool_calls"] = calls
    return [*results, said] if texts or calls or not results else results


def _call(block: Block, path: str) -> dict[str, Any]:
    if block.name is None or block.id is None:
        raise invalid_field(path, "a tool_use block needs id, name and input")
    arguments = orjson.dumps(block.input or {}).decode()
    function = {"name": block.name, "arguments": arguments}
    return {"id": block.id, "type": "function", "function": function}


def _texts(content: str | Sequence[Block], path: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text(block, f"{path}[{i}]") for i, block in enumerate(content))


def _text(block: Block, path: str) -> str:
    if block.type != "text" or block.text is None:
        raise invalid_field(f"{path}.type", "this model takes text only")
    return block.text


def _tool(tool: MessageTool, index: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise invalid_field(f"tools[{index}].type", "this server has no tools of its own")
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: MessageToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    if choice.type not in _CHOICES:
        raise invalid_field("tool_choice.type", "must be auto, any, tool or none")
    return _CHOICES[choice.type]
