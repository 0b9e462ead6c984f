"""Request bodies of ``/v1/responses``, as far as this server honours them."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from server.openai.schema import Count, Effort, Fraction

ItemId = Annotated[str, Meta(max_length=256)]


class InputPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, kw_only=True):
    """A message, a call that an earlier response made, its result, or earlier reasoning."""

    type: str = "message"
    role: str | None = None
    content: str | list[InputPart] | None = None
    id: ItemId | None = None
    call_id: ItemId | None = None
    name: ItemId | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    status: str | None = None
    summary: list[Any] | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedChoice(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True):
    effort: Effort | None = None
    summary: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: ItemId | None = None
    metadata: dict[str, Annotated[str, Meta(max_length=512)]] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: str | None = None
