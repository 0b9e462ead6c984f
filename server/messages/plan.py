"""Reads a request for a message, plans it as a chat; or only counts its prompt's tokens."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from protocol.errors import InvalidRequest
from server.admission import read_json_body
from server.callers import Caller
from server.json_response import json_response
from server.messages.conversation import chat_fields
from server.messages.form import MessagesForm
from server.messages.schema import CountRequest, MessagesRequest
from server.openai.answer import Answer, Services
from server.openai.chat import chat_prompt, plan_parsed_chat
from server.openai.json_body import read_object
from server.openai.models import find_model
from server.openai.parsing import check_chat, convert
from server.openai.schema import ChatRequest

_FIELD_OF = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
}


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
        prompt = await chat_prompt(chat, services, model=model)
        return json_response({"input_tokens": len(prompt.token_ids)})


def _chat(fields: dict[str, Any], services: Services) -> ChatRequest:
    try:
        chat, _ = convert(fields, ChatRequest, services.limits)
        chat, _ = check_chat(chat, (), services.limits)
    except InvalidRequest as error:
        name = _FIELD_OF.get(error.param or "", error.param or "")
        message = str(error).replace(error.param or name, name, 1)
        raise InvalidRequest(message, param=name or None) from None
    return chat
