"""What the gateway costs: its CPU per 1000 streamed tokens, and the time to first token it adds.

    python -m benchmarks.gateway [--json] [--quick]

The real gateway process, scheduler inside (uvicorn, uvloop, httptools; it applies the chat
template, tokenises and detokenises), serves chat completions with simulated workers in a second
process over the real bus and a raw-socket load client in a third. A stream's first token is ready
20 ms after prefill is asked, then each engine step of 10 ms makes one token for every stream. In
the same run: the same client straight at a mock of that pace, and through FastAPI with httpx.
Added time to first token is the difference from the mock at the same concurrency. CPU is user and
system time of the process between client and workers.
"""

import argparse
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
import httpx
import psutil

from benchmarks.child import READY_WITHIN_S, child, wait_for_port
from benchmarks.gateway_peers import serve_mock, serve_pass_through
from benchmarks.local_system import free_port
from benchmarks.report import Bar, print_report
from benchmarks.sse_load import Load, run_load
from deploy.demo import demo_weights
from runtime.settings import BusSettings, ModelSettings
from server.gateway import run as run_gateway
from server.settings import GatewaySettings, SchedulerSettings
from tests.support.arithmetic import MODEL
from tests.support.workers import Fabric, Pace, SimulatedDecode, SimulatedPrefill, serve_workers

FIRST_TOKEN_S = 0.02
STEP_S = 0.01
TOKENS = 64
DECODE_RANKS = 2
PROMPT_WORDS = 120
CPU_MS_PER_1000_TOKENS = 20.0
CONCURRENCIES = (64, 256)
PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    cpu_ms: float  # per 1000 tokens
    ttft_p50_ms: float
    ttft_p99_ms: float
    tokens_per_second: float


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    parser.add_argument("--quick", action="store_true", help="a few seconds a case instead of ten")
    chosen = parser.parse_args()
    rounds = 4 if chosen.quick else 12
    figures: dict[str, float] = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client:
        for name, serve in (("direct", direct), ("gateway", gateway), ("httpx", pass_through)):
            with serve() as (url, process):
                for concurrency in CONCURRENCIES:
                    found = measure(client, url, process, concurrency, rounds)
                    keep(figures, f"{name}_c{concurrency}", found)
    for name in ("gateway", "httpx"):
        for concurrency in CONCURRENCIES:
            for quantile in ("p50", "p99"):
                key = f"c{concurrency}_ttft_{quantile}_ms"
                added = figures[f"{name}_{key}"] - figures[f"direct_{key}"]
                figures[f"{name}_c{concurrency}_added_ttft_{quantile}_ms"] = round(added, 2)
    bars = [
        Bar(
            f"gateway CPU ms per 1000 tokens at concurrency {concurrency}",
            figures[f"gateway_c{concurrency}_cpu_ms_per_1000_tokens"],
            at_most=CPU_MS_PER_1000_TOKENS,
        )
        for concurrency in CONCURRENCIES
    ]
    return print_report("gateway", figures, bars, only_json=chosen.json)


def keep(figures: dict[str, float], name: str, found: Figures) -> None:
    figures[f"{name}_cpu_ms_per_1000_tokens"] = round(found.cpu_ms, 2)
    figures[f"{name}_ttft_p50_ms"] = round(found.ttft_p50_ms, 2)
    figures[f"{name}_ttft_p99_ms"] = round(found.ttft_p99_ms, 2)
    figures[f"{name}_tokens_per_second"] = round(found.tokens_per_second)


def measure(
    client: ProcessPoolExecutor,
    url: str,
    process: psutil.Process,
    concurrency: int,
    rounds: int,
) -> Figures:
    body = a_chat()

    def load(rounds: int) -> Load:
        submitted = client.submit(
            run_load, url + PATH, body, concurrency=concurrency, rounds=rounds
        )
        return submitted.result()

    load(1)
    before = process.cpu_times()
    found = load(rounds)
    after = process.cpu_times()
    expected = concurrency * rounds * TOKENS
    if found.tokens != expected:
        raise RuntimeError(f"{found.tokens} tokens arrived instead of {expected}")
    cpu_s = after.user + after.system - before.user - before.system
    percentiles = statistics.quantiles(found.first_token_s, n=100)
    return Figures(
        cpu_ms=1e6 * cpu_s / found.tokens,
        ttft_p50_ms=1e3 * percentiles[49],
        ttft_p99_ms=1e3 * percentiles[98],
        tokens_per_second=found.tokens / found.wall_s,
    )


def a_chat() -> dict[str, object]:
    words = random.Random(0).choices(
        ["water", "flows", "from", "the", "headrace", "to"], k=PROMPT_WORDS
    )
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": " ".join(words)}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


# -- the systems under test: each yields its URL and the process whose CPU counts ----------------


@contextmanager
def gateway() -> Generator[tuple[str, psutil.Process]]:
    port, scheduler = free_port(), f"tcp://127.0.0.1:{free_port()}"
    with child(_gateway, port, scheduler) as process, child(_workers, scheduler):
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/ready")
        yield url, process


@contextmanager
def direct() -> Generator[tuple[str, psutil.Process]]:
    port = free_port()
    with child(serve_mock, port, FIRST_TOKEN_S, STEP_S) as process:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}", process


@contextmanager
def pass_through() -> Generator[tuple[str, psutil.Process]]:
    port = free_port()
    with direct() as (upstream, _), child(serve_pass_through, port, upstream) as process:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}", process


def _gateway(port: int, scheduler: str) -> None:
    bus = BusSettings(scheduler=scheduler)
    model = ModelSettings(path=str(demo_weights()))
    run_gateway(GatewaySettings(bus=bus, model=model, port=port), SchedulerSettings(bus=bus))


def _workers(scheduler: str) -> None:
    async def serve() -> None:
        fabric = Fabric()
        pace = Pace(FIRST_TOKEN_S, STEP_S)
        ranks = [
            SimulatedDecode(
                f"decode-0/{rank}",
                fabric=fabric,
                rank=rank,
                world_size=DECODE_RANKS,
                num_blocks=100_000,
                pace=pace,
            )
            for rank in range(DECODE_RANKS)
        ]
        async with serve_workers(scheduler, [SimulatedPrefill(fabric=fabric, pace=pace), *ranks]):
            await anyio.sleep_forever()

    anyio.run(serve, backend_options={"use_uvloop": True})


def wait_until_ready(url: str) -> None:
    until = time.monotonic() + READY_WITHIN_S
    answer = "no answer"
    while time.monotonic() < until:
        try:
            response = httpx.get(url)
            answer = response.text
            if response.status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"{url} is not ready: {answer}")


if __name__ == "__main__":
    sys.exit(main())
