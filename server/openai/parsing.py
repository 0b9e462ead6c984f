"""From the JSON object of a body to a checked request, or to one error that names the field.

Nothing of the input is repeated in an error beyond the names of known fields: errors are small
whatever the body was, and cannot carry anything back.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from protocol.errors import InvalidRequest, invalid_field
from server.openai.json_body import read_object
from server.openai.schema import (
    ChatRequest,
    CompletionRequest,
    ContentPart,
    GenerationRequest,
    Message,
    StreamOptions,
)
from server.openai.treatment import PRINTABLE, ignored_params
from server.settings import LimitSettings

_ROLES = ("developer", "system", "user", "assistant", "tool")
_CACHE_SALT_FORBIDDEN = frozenset("@/\\\0")
_COMPLETION_DEFAULT_MAX_TOKENS = 16

R = TypeVar("R", bound=msgspec.Struct)


class ParsedChat(NamedTuple):
    request: ChatRequest
    ignored: tuple[str, ...]


class ParsedCompletion(NamedTuple):
    request: CompletionRequest
    ignored: tuple[str, ...]
    prompts: tuple[str | list[int], ...]
    max_tokens: int


def parse_chat(body: bytes, limits: LimitSettings) -> ParsedChat:
    """
    Raises:
        InvalidRequest: the first thing that is wrong; ``param`` is the field's path.
    """
    request, ignored = convert(read_object(body, limits), ChatRequest, limits)
    return check_chat(request, ignored, limits)


def check_chat(request: ChatRequest, ignored: tuple[str, ...], limits: LimitSettings) -> ParsedChat:
    """What types alone do not say of a chat request.

    Raises:
        InvalidRequest: the first thing that is wrong; ``param`` is the field's path.
    """
    _check_generation(request, limits)
    _check_messages(request.messages, limits)
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise invalid_field("top_logprobs", "needs logprobs: true")
        _check_at_most("top_logprobs", request.top_logprobs, limits.max_top_logprobs)
    if request.logprob_token_ids and not request.logprobs:
        raise invalid_field("logprob_token_ids", "needs logprobs: true")
    if request.max_tokens == 0:
        raise invalid_field("max_tokens", "must be at least 1")
    if request.continue_final_message and request.add_generation_prompt:
        raise invalid_field("continue_final_message", "excludes add_generation_prompt: true")
    if request.continue_final_message and request.messages[-1].content is None:
        raise invalid_field("continue_final_message", "the final message has no content")
    both = (request.max_completion_tokens, request.max_tokens)
    if None not in both and both[0] != both[1]:
        ignored = (*ignored, "max_tokens")
    if request.tools == []:
        ignored = (*ignored, "tools")
    return ParsedChat(request, ignored)


def parse_completion(body: bytes, limits: LimitSettings) -> ParsedCompletion:
    """``prompts`` are texts or token ids, one entry a prompt, however the caller grouped them.

    Raises:
        InvalidRequest: the first thing that is wrong; ``param`` is the field's path.
    """
    request, ignored = convert(read_object(body, limits), CompletionRequest, limits)
    _check_generation(request, limits)
    prompts = _prompts(request.prompt)
    if not prompts:
        raise invalid_field("prompt", "must not be empty")
    if len(prompts) > limits.max_prompts:
        raise invalid_field("prompt", f"more than {limits.max_prompts} prompts")
    if request.logprobs is not None:
        _check_at_most("logprobs", request.logprobs, limits.max_top_logprobs)
    if request.logprob_token_ids and (request.logprobs is None or request.max_tokens == 0):
        raise invalid_field("logprob_token_ids", "needs logprobs, and at least 1 token of output")
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = _COMPLETION_DEFAULT_MAX_TOKENS
    if max_tokens == 0 and not request.echo:
        raise invalid_field("max_tokens", "must be at least 1 unless echo is true")
    return ParsedCompletion(request, ignored, prompts, max_tokens)


def stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    if request.stop is None:
        return ()
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)


def convert(raw: dict[str, Any], kind: type[R], limits: LimitSettings) -> tuple[R, tuple[str, ...]]:
    """``raw`` as a ``kind``, and the names of its fields that will have no effect.

    Raises:
        InvalidRequest: a field is missing, of the wrong type, out of range or not to be ignored.
    """
    ignored = ignored_params(raw, frozenset(kind.__struct_fields__))
    options = raw.get("stream_options")
    if isinstance(options, dict) and issubclass(kind, GenerationRequest):
        known = frozenset(StreamOptions.__struct_fields__)
        unknown = [name for name, value in options.items() if value and name not in known]
        ignored += tuple(f"stream_options.{name}" for name in unknown if PRINTABLE.match(name))
    if ignored and limits.strict_params:
        raise invalid_field(ignored[0], "this server does not know it, or would ignore it")
    try:
        return msgspec.convert(raw, kind, strict=True), ignored
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None


def _wrong_type(message: str) -> InvalidRequest:
    """Msgspec's errors name types, bounds and the path; the value only where it is a choice."""
    what, _, path = message.partition(" - at `$")
    path = path.removesuffix("`").lstrip(".")
    what = what.replace("`", "").replace(" | null", "")
    if what.startswith("Object missing required field "):
        field = what.removeprefix("Object missing required field ")
        return invalid_field(f"{path}.{field}" if path else field, "is required")
    if what.startswith("Object contains unknown field "):
        field = what.removeprefix("Object contains unknown field ")
        known = PRINTABLE.match(field)
        return invalid_field(f"{path}.{field}" if known else path, "this server does not know it")
    if path.startswith("[...]") or not path:
        return InvalidRequest(what)
    if what.startswith("Invalid enum value"):  # and the value
        return invalid_field(path, "is none of the values that it may have")
    return invalid_field(path, what[0].lower() + what[1:])


def _check_generation(request: GenerationRequest, limits: LimitSettings) -> None:
    _check_at_most("n", request.n or 1, limits.max_choices)
    if request.stream_options is not None and not request.stream:
        raise invalid_field("stream_options", "needs stream: true")
    if request.prompt_logprobs is not None:
        _check_at_most("prompt_logprobs", request.prompt_logprobs, limits.max_prompt_logprobs)
        if request.stream:
            raise invalid_field("prompt_logprobs", "cannot be streamed: leave out stream")
    stops = stop_strings(request)
    if len(stops) > limits.max_stop_strings:
        raise invalid_field("stop", f"more than {limits.max_stop_strings} stop strings")
    for stop in stops:
        if not 1 <= len(stop) <= limits.max_stop_chars:
            raise invalid_field("stop", f"each must have 1 to {limits.max_stop_chars} characters")
    if request.logit_bias and len(request.logit_bias) > limits.max_logit_bias:
        raise invalid_field("logit_bias", f"more than {limits.max_logit_bias} entries")
    if request.truncate_prompt_tokens == 0:
        raise invalid_field("truncate_prompt_tokens", "must be at least 1, or -1 for what fits")
    if request.cache_salt and not _CACHE_SALT_FORBIDDEN.isdisjoint(request.cache_salt):
        raise invalid_field("cache_salt", "must not contain @, /, backslash or NUL")


def _check_messages(messages: Sequence[Message], limits: LimitSettings) -> None:
    if len(messages) > limits.max_messages:
        raise invalid_field("messages", f"more than {limits.max_messages} messages")
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if message.role not in _ROLES:
            raise invalid_field(f"{path}.role", f"must be one of {', '.join(_ROLES)}")
        for name in ("function_call", "audio"):
            if getattr(message, name):
                raise invalid_field(f"{path}.{name}", "this server cannot pass it to a model")
        if message.tool_calls and message.role != "assistant":
            raise invalid_field(f"{path}.tool_calls", "only messages of the assistant can have it")
        if message.role == "tool" and message.tool_call_id is None:
            raise invalid_field(f"{path}.tool_call_id", "is required where the role is tool")
        if message.content is not None or not message.tool_calls:
            _check_content(message.content, f"{path}.content")


def _check_content(content: str | list[ContentPart] | None, path: str) -> None:
    if content is None:
        raise invalid_field(path, "is required")
    if isinstance(content, str):
        return
    for index, part in enumerate(content):
        if part.type not in ("text", "refusal"):
            raise invalid_field(f"{path}[{index}].type", "this model takes text parts only")
        if (part.text if part.type == "text" else part.refusal) is None:
            raise invalid_field(f"{path}[{index}].{part.type}", "is required")


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[str | list[int], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return ([token for token in prompt if isinstance(token, int)],)
    if len(kinds) > 1:
        raise invalid_field("prompt", "must be a string, strings, token ids, or lists of token ids")
    return tuple(entry for entry in prompt if not isinstance(entry, int))


def _check_at_most(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise invalid_field(name, f"must be at most {limit}")
