"""The request bodies of the OpenAI API, as far as this server honours them, and nothing else.

Types are strict: a boolean is not a number, "3" and 2.0 are not integers. Bounds that the API
fixes are here, bounds that an operator may choose are in ``server.openai.parsing``. What happens to
fields that are not listed is decided in ``server.openai.treatment``.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from server.structured.constraints import ResponseFormat, StructuredOutputs

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
Word = Annotated[str, Meta(min_length=1, max_length=256)]
TokenIds = list[Annotated[int, Meta(ge=0)]]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
OptionValue = str | int | float | bool | None


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both endpoints share. A field that is absent or null is None."""

    model: str
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    n: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Fraction | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    stop: str | list[str] | None = None
    seed: Int64 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Extensions that other servers of open models have made common.
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop_token_ids: Annotated[TokenIds, Meta(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    allowed_token_ids: Annotated[TokenIds, Meta(min_length=1)] | None = None
    bad_words: Annotated[list[Word], Meta(max_length=128)] | None = None
    logprob_token_ids: Annotated[TokenIds, Meta(max_length=128)] | None = None
    thinking_token_budget: Annotated[int, Meta(ge=-1)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    name: Annotated[str, Meta(max_length=256)]
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call that an earlier answer made."""

    id: Annotated[str, Meta(max_length=256)] | None = None
    type: str = "function"
    function: CalledFunction


class Message(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    tool_call_id: Annotated[str, Meta(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    function_call: Any = None
    audio: Any = None


class FunctionDefinition(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct, kw_only=True):
    type: str
    function: FunctionDefinition | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    name: str


class ToolReference(msgspec.Struct, kw_only=True):
    type: str
    function: NamedFunction | None = None


class AllowedTools(msgspec.Struct, kw_only=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolReference], Meta(min_length=1, max_length=128)]


class ToolChoice(ToolReference, kw_only=True):
    """One function, or with the type ``allowed_tools`` some of them."""

    allowed_tools: AllowedTools | None = None


class ChatRequest(GenerationRequest, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0)] | None = None
    reasoning_effort: Effort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, OptionValue] | None = None
    include_reasoning: bool | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
