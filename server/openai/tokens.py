"""``/tokenize`` and ``/detokenize``: what the served model's tokenizer makes of a text."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from protocol.errors import InvalidRequest
from server.admission import read_json_body
from server.generation import ServedModel
from server.json_response import json_response
from server.openai.answer import Services
from server.openai.chat import chat_prompt
from server.openai.json_body import read_object
from server.openai.models import find_model
from server.openai.parsing import check_chat, convert
from server.openai.prompts import check_length, tokenise
from server.openai.sampling import check_token_ids
from server.openai.schema import ChatRequest, TokenIds
from server.text.detokenizer import detokenizer
from server.text.long_text_process import TextJob


class TokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: bool | None = None


class TokenEndpoints:
    """A chat is tokenised as it would be for an answer."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def tokenize(self, request: Request) -> Response:
        services = self._services
        raw = await self._read(request)
        if "messages" in raw:
            chat, ignored = convert(
                {"model": self._any_model(), **raw}, ChatRequest, services.limits
            )
            chat, _ = check_chat(chat, ignored, services.limits)
            model = find_model(services.generator, chat.model)
            prompt = await chat_prompt(chat, services, model=model)
            return self._tokens(model, prompt.token_ids, strings=bool(raw.get("return_token_strs")))
        asked, _ = convert(raw, TokenizeRequest, services.limits)
        model = find_model(services.generator, asked.model or self._any_model())
        check_length(len(asked.prompt), max_model_len=model.max_model_len, param="prompt")
        job = TextJob(text=asked.prompt, add_special_tokens=asked.add_special_tokens is not False)
        read = await tokenise(job, services, chars=len(asked.prompt), param="prompt")
        return self._tokens(model, read.token_ids, strings=bool(asked.return_token_strs))

    async def detokenize(self, request: Request) -> Response:
        asked, _ = convert(await self._read(request), DetokenizeRequest, self._services.limits)
        model = find_model(self._services.generator, asked.model or self._any_model())
        tokenizer = self._services.text.tokenizer
        if asked.tokens:
            check_token_ids(asked.tokens, vocab_size=tokenizer.vocab_size, param="tokens")
        if len(asked.tokens) > model.max_model_len:
            raise InvalidRequest(
                f"tokens: more than the {model.max_model_len} of a context", param="tokens"
            )
        stream = detokenizer(tokenizer, skip_special_tokens=bool(asked.skip_special_tokens))
        text = "".join([*map(stream.push, asked.tokens), stream.finish()])
        return json_response({"prompt": text})

    async def _read(self, request: Request) -> dict[str, Any]:
        limits = self._services.limits
        body = await read_json_body(request.scope, request.receive, timeout_s=limits.body_timeout_s)
        return read_object(body, limits)

    def _any_model(self) -> str:
        """The one that is served, for callers who name none."""
        models = self._services.generator.models()
        return models[0].id if models else ""

    def _tokens(self, model: ServedModel, ids: list[int], *, strings: bool) -> Response:
        shown: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": model.max_model_len,
            "tokens": ids,
        }
        if strings:
            piece = self._services.text.tokenizer.piece
            shown["token_strs"] = [piece(token_id).decode(errors="replace") for token_id in ids]
        return json_response(shown)
