"""What the gateway costs: its CPU per 1000 streamed tokens, and the time to first token it adds.

    python -m benchmarks.gateway [--json] [--quick] [--sglang-router EXECUTABLE]

The real gateway process, scheduler inside (uvicorn, uvloop, httptools; it applies the chat
template, tokenises and detokenises), serves chat completions with simulated workers in a second
process over the real bus and a raw-socket load client in a third. A stream's first token is ready
20 ms after prefill is asked, then each engine step of 10 ms makes one token for every stream; no
two prompts of a pass are the same. In the same run: the same client straight at a mock of that
pace, and through FastAPI with httpx. Gateway and mock are measured in turns, several times, so that
their ratio says something on a machine that others use too; CPU, which is user and system time of
the process between client and workers, is the median over the turns, and times to the first token
are those of all turns together. Added time to first token is the difference from the mock's.
``--sglang-router`` measures SGLang's router, in Rust and not tokenising, before the mock as well.

How much a system call costs differs several times over between machines, so each run also measures
its own floor (``benchmarks.gateway_floor``): a process that only receives and sends what a gateway
must. It also measures the plainest gateway in Python that does the work
(``benchmarks.gateway_plain``), whose cost on the machine that the bars come from is known: where
that takes three times as long, 12 ms there are 36 here. The gateway's ratios to these and to the
router say more of it than its milliseconds do.

The full form then sends 100,000 short requests and watches the gateway's resident memory: what it
has grown by over the last four fifths of them, after everything that is kept is full.
"""

import argparse
import multiprocessing
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import anyio
import httpx
import psutil

from benchmarks.child import READY_WITHIN_S, child, wait_for_port
from benchmarks.gateway_floor import floor_process
from benchmarks.gateway_peers import serve_mock, serve_pass_through
from benchmarks.gateway_plain import ELSEWHERE_MS, plain_process
from benchmarks.local_system import free_port
from benchmarks.report import Bar, print_report
from benchmarks.sse_load import Load, run_load
from deploy.demo import demo_weights
from runtime.collector import spare_the_collector
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
CPU_MS_PER_1000_TOKENS = 12.0
BARS_AT = (64, 256)  # concurrencies
ADDED_TTFT_AT = 64
ADDED_TTFT_MS = {50: 2.0, 99: 15.0}  # by percentile
MEMORY_CONCURRENCY = 64
MEMORY_TOKENS = 2
MEMORY_LOOKS = 10  # at equal distances; the first two are not compared
MEMORY_GROWTH_MB = 10.0
PATH = "/v1/chat/completions"
PROMPTS = random.Random(0)
WORDS = ["water", "flows", "from", "the", "headrace", "to", "a", "turbine", "below", "and", "on"]
MAX_CHATS = 512  # different ones; then they come again


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    concurrencies: tuple[int, ...]
    pass_through_at: tuple[int, ...]  # of these; it takes longest
    turns: int
    rounds: int  # streams a connection, in a turn
    memory_requests: int  # after which memory is to be what it was; 0 leaves that out


QUICK = Plan(concurrencies=BARS_AT, pass_through_at=(64,), turns=2, rounds=2, memory_requests=0)
FULL = Plan(
    concurrencies=(1, 16, *BARS_AT),
    pass_through_at=(1, 16, *BARS_AT),
    turns=5,
    rounds=4,
    memory_requests=100_000,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    url: str
    process: psutil.Process  # its CPU counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    cpu_ms: float  # per 1000 tokens
    load: Load


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one system at one concurrency."""

    turns: list[Turn]

    @property
    def cpu_ms(self) -> float:
        return statistics.median(turn.cpu_ms for turn in self.turns)

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(turn.load.tokens / turn.load.wall_s for turn in self.turns)

    def ttft_ms(self, percent: int) -> float:
        times = [seconds for turn in self.turns for seconds in turn.load.first_token_s]
        return 1e3 * statistics.quantiles(times, n=100)[percent - 1]

    def cpu_by(self, other: "Figures") -> float:
        """The median over turns that followed one another."""
        pairs = zip(self.turns, other.turns, strict=False)
        return statistics.median(mine.cpu_ms / theirs.cpu_ms for mine, theirs in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    parser.add_argument("--quick", action="store_true", help="two concurrencies, fewer turns")
    parser.add_argument("--sglang-router", metavar="EXECUTABLE", help="a router to measure as well")
    chosen = parser.parse_args()
    plan = QUICK if chosen.quick else FULL
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        client = stack.enter_context(
            ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=spare_the_collector
            )
        )
        systems = {
            name: stack.enter_context(serve())
            for name, serve in (
                ("direct", direct),
                ("gateway", gateway),
                ("floor", floor),
                ("plain", plain),
                ("httpx", pass_through),
            )
        }
        if chosen.sglang_router:
            router = stack.enter_context(sglang_router(chosen.sglang_router))
            systems["sglang_router"] = router
        for concurrency in plan.concurrencies:
            found = {
                name: Figures([])
                for name in systems
                if name != "httpx" or concurrency in plan.pass_through_at
            }
            for turn in range(plan.turns + 1):
                for name, figures_of in found.items():
                    slow, warm_up = name == "httpx", turn == 0
                    if slow and turn != 1:
                        continue  # one turn of it says enough
                    rounds = plan.rounds // 2 if slow or warm_up else plan.rounds
                    measured = measure(client, systems[name], concurrency, rounds)
                    if not warm_up:
                        figures_of.turns.append(measured)
            for name, figures_of in found.items():
                keep(figures, f"{name}_c{concurrency}", figures_of, found["direct"])
            for name in ("floor", "plain", "sglang_router"):
                if name in found:
                    ratio = found["gateway"].cpu_by(found[name])
                    figures[f"gateway_c{concurrency}_cpu_by_{name}"] = round(ratio, 2)
        if plan.memory_requests:
            figures |= watch_memory(client, systems["gateway"], plan.memory_requests)
    return print_report("gateway", figures, list(bars_of(figures)), only_json=chosen.json)


def bars_of(figures: dict[str, float]) -> Generator[Bar]:
    for concurrency in BARS_AT:
        name = f"gateway_c{concurrency}_cpu_ms_per_1000_tokens"
        yield Bar(
            f"gateway CPU ms per 1000 tokens at concurrency {concurrency}",
            figures[name],
            at_most=CPU_MS_PER_1000_TOKENS,
        )
        yield Bar(
            f"gateway CPU by the plainest gateway's at concurrency {concurrency}",
            figures[f"gateway_c{concurrency}_cpu_by_plain"],
            at_most=round(CPU_MS_PER_1000_TOKENS / ELSEWHERE_MS[concurrency], 2),
        )
    for percent, limit_ms in ADDED_TTFT_MS.items():
        name = f"gateway_c{ADDED_TTFT_AT}_added_ttft_p{percent}_ms"
        what = f"added time to first token p{percent} ms at concurrency {ADDED_TTFT_AT}"
        yield Bar(what, figures[name], at_most=limit_ms)
    if "gateway_rss_growth_mb" in figures:
        growth = figures["gateway_rss_growth_mb"]
        yield Bar("gateway memory growth MB", growth, at_most=MEMORY_GROWTH_MB)


def watch_memory(client: ProcessPoolExecutor, system: System, requests: int) -> dict[str, float]:
    """Resident MB of the gateway after every tenth of ``requests``, and how it has grown."""
    rounds = -(-requests // (MEMORY_LOOKS * MEMORY_CONCURRENCY))
    chats = [{**a_chat(), "max_tokens": MEMORY_TOKENS} for _ in range(MAX_CHATS)]
    resident_mb: list[float] = []
    for _ in range(MEMORY_LOOKS):
        client.submit(
            run_load, system.url + PATH, chats, concurrency=MEMORY_CONCURRENCY, rounds=rounds
        ).result()
        resident_mb.append(system.process.memory_info().rss / 1e6)
    return {
        "gateway_rss_requests": rounds * MEMORY_CONCURRENCY * MEMORY_LOOKS,
        "gateway_rss_first_mb": round(resident_mb[0], 1),
        "gateway_rss_last_mb": round(resident_mb[-1], 1),
        "gateway_rss_growth_mb": round(resident_mb[-1] - resident_mb[1], 1),
    }


def keep(figures: dict[str, float], name: str, found: Figures, direct: Figures) -> None:
    figures[f"{name}_cpu_ms_per_1000_tokens"] = round(found.cpu_ms, 2)
    figures[f"{name}_tokens_per_second"] = round(found.tokens_per_second)
    for percent in (50, 99):
        figures[f"{name}_ttft_p{percent}_ms"] = round(found.ttft_ms(percent), 2)
    if found is not direct:
        figures[f"{name}_cpu_by_direct"] = round(found.cpu_by(direct), 2)
        for percent in (50, 99):
            added_ms = found.ttft_ms(percent) - direct.ttft_ms(percent)
            figures[f"{name}_added_ttft_p{percent}_ms"] = round(added_ms, 2)


def measure(client: ProcessPoolExecutor, system: System, concurrency: int, rounds: int) -> Turn:
    chats = [a_chat() for _ in range(min(concurrency * rounds, MAX_CHATS))]
    before = system.process.cpu_times()
    submitted = client.submit(
        run_load, system.url + PATH, chats, concurrency=concurrency, rounds=rounds
    )
    load: Load = submitted.result()
    after = system.process.cpu_times()
    expected = concurrency * rounds * TOKENS
    if load.tokens != expected:
        raise RuntimeError(f"{load.tokens} tokens arrived instead of {expected}")
    cpu_s = after.user + after.system - before.user - before.system
    return Turn(cpu_ms=1e6 * cpu_s / load.tokens, load=load)


def a_chat() -> dict[str, object]:
    words = PROMPTS.choices(WORDS, k=PROMPT_WORDS)
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": " ".join(words)}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


# -- the systems under test -----------------------------------------------------------------------


@contextmanager
def gateway() -> Generator[System]:
    port, scheduler = free_port(), f"tcp://127.0.0.1:{free_port()}"
    with child(_gateway, port, scheduler) as process, child(_workers, scheduler):
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/ready")
        yield System(url=url, process=process)


@contextmanager
def floor() -> Generator[System]:
    port = free_port()
    with floor_process(
        port, tokens=TOKENS, first_token_s=FIRST_TOKEN_S, step_s=STEP_S, ranks=DECODE_RANKS
    ) as process:
        yield System(url=f"http://127.0.0.1:{port}", process=process)


@contextmanager
def plain() -> Generator[System]:
    port = free_port()
    with plain_process(
        port, first_token_s=FIRST_TOKEN_S, step_s=STEP_S, ranks=DECODE_RANKS
    ) as process:
        yield System(url=f"http://127.0.0.1:{port}", process=process)


@contextmanager
def direct() -> Generator[System]:
    port = free_port()
    with child(serve_mock, port, FIRST_TOKEN_S, STEP_S) as process:
        wait_for_port(port)
        yield System(url=f"http://127.0.0.1:{port}", process=process)


@contextmanager
def pass_through() -> Generator[System]:
    port = free_port()
    with direct() as upstream, child(serve_pass_through, port, upstream.url) as process:
        wait_for_port(port)
        yield System(url=f"http://127.0.0.1:{port}", process=process)


@contextmanager
def sglang_router(executable: str) -> Generator[System]:
    port, metrics = free_port(), free_port()
    with direct() as upstream:
        process = psutil.Popen(
            [
                *(executable, "launch", "--worker-urls", upstream.url, "--log-level", "error"),
                *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)),
            ],
            stdout=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(f"{url}/readiness")
            yield System(url=url, process=process)
        finally:
            process.terminate()
            process.wait(10.0)


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

    spare_the_collector()
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
