"""Request bodies of ``/v1/messages``, as far as this server honours them."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from server.openai.schema import Count, Effort, Fraction

Id = Annotated[str, Meta(max_length=256)]


class Block(msgspec.Struct, kw_only=True):
    """Text, a call of a tool, its result, or earlier thinking."""

    type: str
    text: str | None = None
    id: Id | None = None
    name: Id | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Id | None = None
    content: "str | list[Block] | None" = None


class InputMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[Block]


class MessageTool(msgspec.Struct, kw_only=True):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class MessageToolChoice(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True):
    """``display`` omitted leaves the thinking out of the answer."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: OutputFormat | None = None
    effort: Effort | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """What decides how many tokens a prompt has."""

    model: str
    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    system: str | list[Block] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # where clients wrote the format before


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: Count
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
