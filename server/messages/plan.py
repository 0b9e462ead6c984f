"""Reads a request for a message, plans it as a chat; or only counts its prompt's tokens."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from protocol.errors import InvalidRequest
from server.admission import read_json_body
from server.callers import Caller
from server.json_response import json_response
from server.messages.conversation import chat_fields, takes_effort
from server.messages.form import MessagesForm
from server.messages.schema import CountRequest, MessagesRequest
from server.openai.answer import Answer, Services
from server.openai.chat import chat_prompt, plan_parsed_chat
from server.openai.json_body import read_object
from server.openai.models import find_model
from server.openai.parsing import check_chat, convert
from server.openai.schema import ChatRequest

# What a caller of this API names as the chat's fields begin, the longer ones first.
_FIELD_OF = (
    (re.compile(r"max_completion_tokens\b"), "max_tokens"),
    (re.compile(r"stop\b"), "stop_sequences"),
    (re.compile(r"thinking_token_budget\b"), "thinking.budget_tokens"),
    (re.compile(r"reasoning_effort\b"), "output_config.effort"),
    (re.compile(r"response_format\.json_schema\b"), "output_config.format"),
    (re.compile(r"response_format\b"), "output_config.format"),
    (re.compile(r"(tools\[[0-9]+\])\.function\.parameters\b"), r"\1.input_schema"),
    (re.compile(r"(tools\[[0-9]+\])\.function\b"), r"\1"),
    (re.compile(r"tool_choice\.function\b"), "tool_choice"),
)


async def plan_message(
    body: bytes, services: Services, *, answer_id: str, caller: Caller
) -> Answer:
    """
    Raises:
        RequestError: the request cannot be served as it is.
        NoWorkerAvailable: no worker has announced itself yet.
    """
    raw = read_object(body, services.limits)
    asked, ignored = convert(raw, MessagesRequest, services.limits)
    chat = _chat(chat_fields(asked, services.text), services)
    effort = None if asked.output_config is None else asked.output_config.effort
    if effort is not None and not takes_effort(services.text):
        ignored = (*ignored, "output_config.effort")
    with _fields_named_as_asked():
        return await plan_parsed_chat(
            chat, services, answer_id=answer_id, caller=caller, ignored=ignored, form=MessagesForm()
        )


class CountTokens:
    def __init__(self, services: Services) -> None:
        self._services = services

    async def count(self, request: Request) -> Response:
        services = self._services
        body = await read_json_body(
            request.scope, request.receive, timeout_s=services.limits.body_timeout_s
        )
        asked, _ = convert(read_object(body, services.limits), CountRequest, services.limits)
        chat = _chat(chat_fields(asked, services.text), services)
        model = find_model(services.generator, chat.model)
        with _fields_named_as_asked():
            prompt = await chat_prompt(chat, services, model=model)
        return json_response({"input_tokens": len(prompt.token_ids)})


def _chat(fields: dict[str, Any], services: Services) -> ChatRequest:
    with _fields_named_as_asked():
        chat, _ = convert(fields, ChatRequest, services.limits)
        return check_chat(chat, (), services.limits).request


@contextmanager
def _fields_named_as_asked() -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        for chat_field, name in _FIELD_OF:
            if error.param and chat_field.match(error.param):
                renamed = chat_field.sub(name, error.param, count=1)
                message = str(error).replace(error.param, renamed, 1)
                raise InvalidRequest(message, param=renamed) from None
        raise
