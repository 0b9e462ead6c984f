"""An in-process ``Generator`` whose answers follow from the request alone, for HTTP tests."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio
import msgspec

from protocol.errors import ServingError
from protocol.requests import GenerateRequest, TokenLogprobs
from server.generation import Deliver, Readiness, ServedModel, TokenChunk
from server.text.model_text import ModelText


@dataclass(kw_only=True)
class ScriptedGenerator:
    """Says ``reply``, then ends; at most ``max_tokens`` tokens of it.

    Before the token ``block_at`` it waits until ``resume`` is set, or for ever; before the token
    ``fail_at`` it raises ``error``. ``opened`` and ``closed`` count requests: a leak is a
    difference.
    """

    text: ModelText
    reply: str | Callable[[GenerateRequest], str] = "Hello, wörld 🙂!"
    tokens_per_chunk: int = 1
    cached_tokens: int = 0
    fail_at: int | None = None
    error: Exception = field(default_factory=lambda: ServingError("/secret/path 0x7f00"))
    block_at: int | None = None
    resume: threading.Event = field(default_factory=threading.Event)
    model_ids: Sequence[str] = ("tiny",)
    max_model_len: int = 512
    ready: bool = True
    opened: int = 0
    closed: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)
    deadlines_s: list[float] = field(default_factory=list)

    async def generate(
        self, request: GenerateRequest, deliver: Deliver, *, deadline_s: float
    ) -> None:
        self.opened += 1
        self.requests.append(request)
        self.deadlines_s.append(deadline_s)
        try:
            ids = self._ids(request)
            ends = ids[-1] in request.stop.stop_token_ids
            for start in range(0, len(ids), self.tokens_per_chunk):
                await self._gate(start)
                part = tuple(ids[start : start + self.tokens_per_chunk])
                last = start + len(part) == len(ids)
                reason = ("stop" if ends else "length") if last else None
                chunk = TokenChunk(
                    token_ids=part,
                    logprobs=self._logprobs(request, part),
                    finish_reason=reason,  # type: ignore[arg-type]
                    cached_tokens=self.cached_tokens if start == 0 else 0,
                    prompt_logprobs=self._prompt_logprobs(request) if start == 0 else None,
                )
                if not deliver(chunk):
                    return
        finally:
            self.closed += 1

    def _ids(self, request: GenerateRequest) -> list[int]:
        reply = self.reply if isinstance(self.reply, str) else self.reply(request)
        ids = self.text.tokenizer.encode(reply, add_special_tokens=False)
        return [*ids, *request.stop.stop_token_ids[:1]][: request.stop.max_tokens] or [0]

    async def _gate(self, number: int) -> None:
        while number == self.block_at and not self.resume.is_set():  # noqa: ASYNC110  other thread
            await anyio.sleep(0.005)
        if number == self.fail_at:
            raise self.error
        await anyio.lowlevel.checkpoint()

    def _prompt_logprobs(self, request: GenerateRequest) -> tuple[TokenLogprobs, ...] | None:
        """As for output, each by its own id."""
        count = request.sampling.prompt_logprobs
        if count is None:
            return None
        scored = msgspec.structs.replace(request.sampling, logprobs=count)
        scored_request = msgspec.structs.replace(request, sampling=scored)
        return self._logprobs(scored_request, request.prompt_token_ids[1:])

    def _logprobs(
        self, request: GenerateRequest, ids: tuple[int, ...]
    ) -> tuple[TokenLogprobs, ...] | None:
        """The chosen token has -0.5, the alternatives follow it in the vocabulary."""
        count = request.sampling.logprobs
        if count is None:
            return None
        return tuple(
            TokenLogprobs(
                -0.5, tuple((i + k, -0.5 if k == 0 else -float("inf")) for k in range(count))
            )
            for i in ids
        )

    def models(self) -> Sequence[ServedModel]:
        return [
            ServedModel(id=name, max_model_len=self.max_model_len, created=1_700_000_000)
            for name in self.model_ids
        ]

    def readiness(self) -> Readiness:
        reason = "" if self.ready else "no decode worker has announced itself"
        return Readiness(ready=self.ready, reason=reason)
