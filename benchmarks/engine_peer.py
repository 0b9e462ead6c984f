"""The engine benchmark's cases put to a running OpenAI server, seen from a client."""

import statistics
import time
from collections.abc import Sequence

import anyio
import httpx

from benchmarks.sse_client import Stream, stream_completion

TIMEOUT_S = 600.0


def measure_peer(
    url: str, batches: Sequence[int], prompts: Sequence[int], prompt_tokens: int, *, tokens: int
) -> dict[str, float]:
    """Tokens per second: of the decode phase of so many streams, and of prompts of each length.

    Every prompt is new to the server. Chunks are counted as tokens, so a server that puts several
    tokens into a chunk, or none, is misread.
    """

    async def run() -> dict[str, float]:
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
            listed = (await client.get("/v1/models")).raise_for_status().json()
            model = listed["data"][0]["id"]
            figures: dict[str, float] = {}
            for batch in batches:
                rate = await _decode_rate(client, model, batch, prompt_tokens, tokens)
                figures[f"peer_decode_b{batch}_tokens_per_s"] = rate
            for length in prompts:
                seconds = [await _first_token(client, model, length, run) for run in range(3)]
                figures[f"peer_prefill_{length}_tokens_per_s"] = length / statistics.median(seconds)
            return figures

    return anyio.run(run)


async def _decode_rate(
    client: httpx.AsyncClient, model: str, batch: int, prompt_tokens: int, tokens: int
) -> float:
    streams = [Stream() for _ in range(batch)]
    async with anyio.create_task_group() as tasks:
        for index, stream in enumerate(streams):
            body = _body(model, prompt_tokens, tokens, salt=100 * batch + index)
            tasks.start_soon(stream_completion, client, body, stream)
    all_started = max(stream.arrivals[0] for stream in streams)
    arrivals = [at for stream in streams for at in stream.arrivals if at > all_started]
    return len(arrivals) / (max(arrivals) - all_started)


async def _first_token(client: httpx.AsyncClient, model: str, length: int, run: int) -> float:
    stream = Stream()
    started = time.perf_counter()
    await stream_completion(client, _body(model, length, 1, salt=7 * length + run), stream)
    return stream.arrivals[0] - started


def _body(model: str, prompt_tokens: int, tokens: int, *, salt: int) -> dict[str, object]:
    prompt = [10 + (salt * 104_729 + n * 7919) % 40_000 for n in range(prompt_tokens)]
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
