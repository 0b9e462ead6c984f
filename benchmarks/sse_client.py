"""The least a client can do with a stream of completions: remember when each chunk came."""

import json
import time
from dataclasses import dataclass, field

import httpx


@dataclass(slots=True)
class Stream:
    """Times are ``time.perf_counter`` seconds; ``arrivals`` has one entry a chunk with text."""

    sent_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """(when the later chunk came, seconds since the one before)."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(later, later - earlier) for earlier, later in pairs]


async def stream_completion(
    client: httpx.AsyncClient, body: dict[str, object], stream: Stream
) -> None:
    """POST to /v1/completions with ``stream`` on and fill ``stream`` as the chunks come.

    Raises:
        RuntimeError: the answer is an error, at once or in mid-stream.
    """
    stream.sent_at = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != httpx.codes.OK:
            raise RuntimeError((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(line)
            for choice in chunk["choices"]:
                stream.finish_reason = choice["finish_reason"] or stream.finish_reason
                if choice["text"]:
                    stream.text += choice["text"]
                    stream.arrivals.append(now)
