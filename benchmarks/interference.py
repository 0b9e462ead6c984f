"""Does a long prompt stall anybody's token stream?

Four streams decode; a 4096-token prompt arrives. Measured is the time between a stream's tokens,
at the client, before and while that prompt is computed. Prefill and decode are pinned to one core
each; the reference is the same engine with both phases in one process on both cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import anyio
import httpx

from benchmarks.local_system import LocalSystem, running_system
from benchmarks.report import Bar, print_report
from benchmarks.sse_client import Stream, stream_completion
from deploy.demo import demo_weights

STREAMS = 4
PROMPT_WORDS = 100
LONG_PROMPT_TOKENS = 4096
CHUNK_TOKENS = 512
TOKENS_ALONE = 150
MODEL = "smollm2"
WORST_GAP_S = 0.25
WORST_OVER_P99 = 2.0


@dataclass(slots=True)
class Gaps:
    """Seconds between consecutive chunks of a stream."""

    alone: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)


async def disaggregated(system: LocalSystem, tokens_alone: int, long_prompt: int) -> Gaps:
    async with httpx.AsyncClient(base_url=system.url, timeout=300.0) as client:
        streams = [Stream() for _ in range(STREAMS)]
        arriving = Stream()

        async def one(index: int) -> None:
            words = [str((index * 7919 + n * 104729) % 997) for n in range(PROMPT_WORDS)]
            body = {
                "model": MODEL,
                "prompt": " ".join(words),
                "max_tokens": 3000,
                "temperature": 0,
                "ignore_eos": True,
            }
            await stream_completion(client, body, streams[index])

        async with anyio.create_task_group() as tasks:
            for index in range(STREAMS):
                tasks.start_soon(one, index)
            while min(len(stream.arrivals) for stream in streams) < tokens_alone:  # noqa: ASYNC110
                await anyio.sleep(0.02)
            prompt = [3 + (n * 7919) % 40_000 for n in range(long_prompt)]
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "ignore_eos": True}
            await stream_completion(client, body, arriving)
            tasks.cancel_scope.cancel()
    began, ended = arriving.sent_at, arriving.arrivals[0]
    gaps = Gaps()
    for stream in streams:
        # A gap belongs to the prompt when any part of it overlaps the prompt's computation.
        for at, seconds in stream.gaps[10:]:
            if at <= began:
                gaps.alone.append(seconds)
            elif at - seconds < ended:
                gaps.during.append(seconds)
    return gaps


def colocated(*, tokens_alone: int, long_prompt: int) -> Gaps:
    """In a process of its own, so that its threads and memory are its own."""
    arguments = {
        "model": str(demo_weights()),
        "streams": STREAMS,
        "prompt": 128,
        "alone": tokens_alone,
        "long_prompt": long_prompt,
        "chunk": CHUNK_TOKENS,
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.colocated", json.dumps(arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return Gaps(alone=found["alone"], during=found["during"])


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    parser.add_argument("--quick", action="store_true", help="a shorter run, within a minute")
    chosen = parser.parse_args()
    repetitions = 1 if chosen.quick else 3
    long_prompt = 1024 if chosen.quick else LONG_PROMPT_TOKENS
    tokens_alone = 60 if chosen.quick else TOKENS_ALONE
    apart, together = Gaps(), Gaps()
    worst: list[float] = []
    for _ in range(repetitions):
        with running_system(MODEL, "--decode-ranks", "1", "--threads", "1") as system:
            system.pin("prefill", [0])
            system.pin("decode", [1])
            found = anyio.run(disaggregated, system, tokens_alone, long_prompt)
        worst.append(max(found.during))
        apart.alone += found.alone
        apart.during += found.during
        found = colocated(tokens_alone=tokens_alone, long_prompt=long_prompt)
        together.alone += found.alone
        together.during += found.during
    figures = {
        "long_prompt_tokens": float(long_prompt),
        "alone_p50_ms": 1e3 * statistics.median(apart.alone),
        "alone_p99_ms": 1e3 * p99(apart.alone),
        "during_p50_ms": 1e3 * statistics.median(apart.during),
        "during_p99_ms": 1e3 * p99(apart.during),
        "worst_gap_ms": 1e3 * max(worst),
        "worst_gap_median_of_runs_ms": 1e3 * statistics.median(worst),
        "colocated_alone_p50_ms": 1e3 * statistics.median(together.alone),
        "colocated_alone_p99_ms": 1e3 * p99(together.alone),
        "colocated_during_p50_ms": 1e3 * statistics.median(together.during),
        "colocated_worst_gap_ms": 1e3 * max(together.during),
    }
    bars = [
        Bar(
            "worst gap over undisturbed p99",
            max(worst) / p99(apart.alone),
            at_most=WORST_OVER_P99,
        ),
        Bar("worst gap, ms", 1e3 * max(worst), at_most=1e3 * WORST_GAP_S),
    ]
    return print_report("interference", figures, bars, only_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
