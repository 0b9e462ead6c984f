"""What a chat request says of tools: which there are, which calls are forced, and how the answer's
text is to be read.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from protocol.errors import invalid_field
from protocol.ids import new_request_id
from server.openai.schema import (
    ChatRequest,
    ToolCall,
    ToolChoice,
    ToolDefinition,
    ToolReference,
)
from server.structured.constraints import WHOLE_TEXT, Constraint, lark_constraint
from server.structured.tags import lark_regex
from server.text.families.family import Tool
from server.text.families.json_call import json_rule
from server.text.families.parts import CallArguments, CallBegun, Content, Part, PartReader
from server.text.families.reasoning import PlainReader, ReasoningReader
from server.text.model_text import ModelText

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")  # 64 in OpenAI's API, 128 in Anthropic's
_CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """``tools`` are those the model is told of; ``forced`` are those of which it must call one.
    ``parallel``: there may be several calls. Who names a function wants one, and so do clients.
    """

    tools: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()
    parallel: bool = True


def tool_use(asked: ChatRequest) -> ToolUse:
    """
    Raises:
        InvalidRequest: a tool or the choice among them is not valid.
    """
    tools = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(asked.tools or ()))
    if len(tools) > MAX_TOOLS:
        raise invalid_field("tools", f"more than {MAX_TOOLS} tools")
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise invalid_field("tools", "two tools have the same name")
    choice = asked.tool_choice
    if isinstance(choice, str) and choice not in _CHOICES:
        raise invalid_field("tool_choice", f"must be {', '.join(_CHOICES)}, or name a function")
    if choice == "none":
        return ToolUse()
    if choice not in (None, "auto") and not tools:
        raise invalid_field("tool_choice", "needs tools")
    parallel = asked.parallel_tool_calls is not False
    if not isinstance(choice, ToolChoice):
        forced = tools if choice == "required" else ()
        return ToolUse(tools=tools, forced=forced, parallel=parallel)
    if choice.allowed_tools is None:
        named = _named(choice, tools, "tool_choice")
        return ToolUse(tools=tools, forced=(named,), parallel=False)
    allowed = tuple(
        _named(reference, tools, f"tool_choice.allowed_tools.tools[{i}]")
        for i, reference in enumerate(choice.allowed_tools.tools)
    )
    forced = allowed if choice.allowed_tools.mode == "required" else ()
    return ToolUse(tools=allowed, forced=forced, parallel=parallel)


def called(call: ToolCall, path: str, *, arguments_as_text: bool) -> dict[str, Any]:
    """An earlier call as templates know it. Arguments that are no JSON object stay the text that
    they are: an answer that ended too early has such, and agents send it back.

    Raises:
        InvalidRequest: it is no call of a function.
    """
    if call.type != "function":
        raise invalid_field(f"{path}.type", "must be function")
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    as_text = arguments_as_text or not isinstance(arguments, dict)
    shown = call.function.arguments if as_text else arguments
    function = {"name": call.function.name, "arguments": shown}
    return {"id": call.id or "", "type": "function", "function": function}


def tool_constraint(
    use: ToolUse, other: Constraint | None, text: ModelText, *, reasons: bool
) -> Constraint | None:
    """What the whole text must match: a forced call, or what ``other`` says, or a call or that.

    Where the model ``reasons`` first, its reasoning is free.

    Raises:
        InvalidRequest: ``other`` cannot be combined with calls.
    """
    if not use.forced and other is None:
        return None
    reasoning = text.reasoning if reasons else None
    if not use.tools and reasoning is None:
        return other
    rules: list[str] = []
    choices: list[str] = []
    if use.tools:
        listed = use.forced or use.tools
        rules.append(text.family.grammar(listed, parallel=use.parallel, spell=text.spell))
        choices.append("calls")
    if not use.forced and other is not None:
        if other.param in WHOLE_TEXT:
            raise invalid_field(other.param, "cannot be combined with tools or with reasoning")
        rules.append(f"answer: {_as_rule(other)}\n")
        choices.append("answer")
    start = "start: " + " | ".join(choices)
    if reasoning is not None:
        start = f"start: reasoning ({' | '.join(choices)})\n"
        start += f"reasoning[suffix={json.dumps(reasoning.close)}]: /(?s:.*)/"
    param = "tools" if other is None or use.forced else other.param
    return lark_constraint("\n".join((start, *rules)), param=param)


def _as_rule(constraint: Constraint) -> str:
    match constraint.kind:
        case "json":
            return json_rule(json.loads(constraint.source), lenient=constraint.lenient)
        case "regex":
            return lark_regex(constraint.source)
        case "lark":
            return f"%lark {{\n{constraint.source}\n}}"


def part_reader(use: ToolUse, text: ModelText, *, reasons: bool) -> PartReader | None:
    """How to read one choice's text; None where all of it is plain content."""
    uses_family = bool(use.tools) or text.family.reads_every_text
    if not uses_family and text.reasoning is None:
        return None
    reader: PartReader = PlainReader()
    if uses_family:
        reader = text.family.reader(_new_call_id, use.tools)
    if use.forced:
        reader = _Only(_is_no_content, reader)
    if not use.parallel:
        reader = _Only(_is_of_first_call, reader)
    if text.reasoning is not None:
        reader = ReasoningReader(text.reasoning, reader, begun=reasons)
    return reader


class _Only:
    """Leaves out the parts that are not wanted."""

    def __init__(self, wanted: Callable[[Part], bool], inner: PartReader) -> None:
        self._wanted = wanted
        self._inner = inner

    def push(self, text: str) -> list[Part]:
        return list(filter(self._wanted, self._inner.push(text)))

    def finish(self) -> list[Part]:
        return list(filter(self._wanted, self._inner.finish()))


def _is_of_first_call(part: Part) -> bool:
    return not isinstance(part, CallBegun | CallArguments) or part.index == 0


def _is_no_content(part: Part) -> bool:
    """Where a call is forced, what looks like content is one that was cut off before its name."""
    return not isinstance(part, Content)


def _new_call_id() -> str:
    return f"call_{new_request_id()}"


def _tool(tool: ToolDefinition, path: str) -> Tool:
    if tool.type != "function" or tool.function is None:
        raise invalid_field(f"{path}.type", "must be function, with a function beside it")
    function = tool.function
    if not _NAME.match(function.name):
        raise invalid_field(f"{path}.function.name", "must be 1 to 128 letters, digits, _ or -")
    definition: Mapping[str, Any] = msgspec.to_builtins(function)
    return Tool(
        name=function.name,
        parameters=function.parameters or {"type": "object", "properties": {}},
        definition={"type": "function", "function": dict(definition)},
    )


def _named(reference: ToolReference, tools: tuple[Tool, ...], path: str) -> Tool:
    if reference.function is None:
        raise invalid_field(f"{path}.function", "is required")
    found = next((tool for tool in tools if tool.name == reference.function.name), None)
    if found is None:
        raise invalid_field(f"{path}.function.name", "is none of the tools")
    return found
