"""Reads a request for a response and plans it as a chat."""

from typing import Any

from protocol.errors import InvalidRequest
from server.callers import Caller
from server.openai.answer import Answer, Services
from server.openai.chat import plan_parsed_chat
from server.openai.json_body import read_object
from server.openai.parsing import check_chat, convert
from server.openai.schema import ChatRequest
from server.responses.conversation import chat_fields
from server.responses.form import ResponsesForm
from server.responses.schema import ResponsesRequest
from server.responses.store import ResponseStore

_FIELD_OF = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}

# What they name is part of the prompt, and an answer without it is an answer to something else.
_ELSEWHERE = {
    "conversation": "send the conversation as input, or previous_response_id",
    "prompt": "send its text as instructions and input",
}


class ResponsePlan:
    def __init__(self, store: ResponseStore, *, stores: bool = True) -> None:
        """``stores``: who asks for a response again will ask the process that has it."""
        self._store = store
        self._stores = stores

    async def __call__(
        self, body: bytes, services: Services, *, answer_id: str, caller: Caller
    ) -> Answer:
        """
        Raises:
            RequestError: the request cannot be served as it is.
            NoWorkerAvailable: no worker has announced itself yet.
        """
        raw = read_object(body, services.limits)
        asked, ignored = convert(raw, ResponsesRequest, services.limits)
        _check(asked)
        for name, instead in _ELSEWHERE.items():
            if raw.get(name) is not None:
                raise InvalidRequest(f"{name}: this server stores none: {instead}", param=name)
        if not self._stores:
            _check_without_store(asked)
            asked.store = False
        earlier: list[dict[str, Any]] = []
        if asked.previous_response_id is not None:
            previous = self._store.get(
                asked.previous_response_id, caller.name, param="previous_response_id"
            )
            earlier = previous.messages
        fields = chat_fields(asked, earlier)
        said = fields["messages"][0 if asked.instructions is None else 1 :]
        try:
            chat, _ = convert(fields, ChatRequest, services.limits)
            chat, _ = check_chat(chat, (), services.limits)
            return await plan_parsed_chat(
                chat,
                services,
                answer_id=answer_id,
                caller=caller,
                ignored=ignored,
                form=ResponsesForm(asked, said, store=self._store, tenant=caller.name),
            )
        except InvalidRequest as error:
            raise _in_own_words(error) from None


def _check(asked: ResponsesRequest) -> None:
    if asked.truncation not in (None, "disabled"):
        raise InvalidRequest(
            "truncation: this server never shortens a conversation by itself", param="truncation"
        )
    if asked.background and asked.stream:
        raise InvalidRequest(
            "stream: a background response is not streamed: ask for it later", param="stream"
        )
    if asked.background and asked.store is False:
        raise InvalidRequest("store: a background response is always stored", param="store")


def _check_without_store(asked: ResponsesRequest) -> None:
    given = {
        "store": asked.store,
        "background": asked.background,
        "previous_response_id": asked.previous_response_id,
    }
    for name, value in given.items():
        if value:
            raise InvalidRequest(
                f"{name}: several processes answer here, and none keeps responses for the others: "
                "leave it out and send the whole conversation as input",
                param=name,
            )


def _in_own_words(error: InvalidRequest) -> InvalidRequest:
    """The chat's fields by the names that they have here."""
    param, message = error.param or "", str(error)
    for theirs, ours in _FIELD_OF.items():
        if param.startswith(theirs):
            return InvalidRequest(
                message.replace(theirs, ours, 1), param=param.replace(theirs, ours, 1)
            )
    return error
