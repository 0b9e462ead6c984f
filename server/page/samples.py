"""Rates and latencies every few seconds, so that a page which has just been opened shows a past.

Latencies are quantiles of the gateway's own histograms over one interval, interpolated within a
bucket: as exact as the buckets are narrow. None where nothing was observed.
"""

from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from runtime.clock import Clock
from server.cluster import Cluster
from server.metrics import HttpMetrics, Latencies

EVERY_S = 2.0
KEPT = 300  # ten minutes


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Rates are of this gateway, over the interval that ends with the sample."""

    number: int  # counts from 1
    age_s: float  # when it is sent
    output_tokens_per_s: float
    prompt_tokens_per_s: float  # of requests that got their first token
    requests_per_s: float
    failed_per_s: float
    running: int
    waiting: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None


class Samples:
    def __init__(self, cluster: Cluster, metrics: HttpMetrics, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock
        self._kept: deque[tuple[float, Sample]] = deque(maxlen=KEPT)
        self._number = 0
        self._ttft = Window(metrics.first_token)
        self._itl = Window(metrics.token_gap)
        self._at = clock.now()
        self._totals = self._count()

    async def run(self) -> NoReturn:
        while True:
            await self._clock.sleep(EVERY_S)
            self.take()

    def take(self) -> None:
        """One sample, of the time since the one before."""
        now, totals = self._clock.now(), self._count()
        seconds = max(now - self._at, 1e-3)
        output, prompt, ended, failed = (
            round((new - old) / seconds, 3) for new, old in zip(totals, self._totals, strict=True)
        )
        self._at, self._totals = now, totals
        self._number += 1
        ttft, itl = self._ttft.next(), self._itl.next()
        sample = Sample(
            number=self._number,
            age_s=0.0,
            output_tokens_per_s=output,
            prompt_tokens_per_s=prompt,
            requests_per_s=ended,
            failed_per_s=failed,
            running=self._cluster.records.open_requests,
            waiting=self._cluster.waiting_requests,
            ttft_p50_s=quantile(ttft, self._ttft.bounds, 0.5),
            ttft_p99_s=quantile(ttft, self._ttft.bounds, 0.99),
            itl_p50_s=quantile(itl, self._itl.bounds, 0.5),
            itl_p99_s=quantile(itl, self._itl.bounds, 0.99),
        )
        self._kept.append((now, sample))

    def after(self, number: int) -> list[Sample]:
        """Those that came after the sample of that number, oldest first. A number from the time
        before a restart, which is not known here, gets all of them.
        """
        now = self._clock.now()
        if number > self._number:
            number = 0
        return [
            msgspec.structs.replace(sample, age_s=round(now - at, 3))
            for at, sample in self._kept
            if sample.number > number
        ]

    def _count(self) -> tuple[int, int, int, int]:
        records = self._cluster.records
        return (
            records.output_tokens(),
            records.prompt_tokens,
            records.requests_ended,
            records.requests_failed,
        )


class Window:
    """What a histogram has counted since the last look."""

    def __init__(self, latencies: Latencies) -> None:
        self._latencies = latencies
        self._before = latencies.counts()
        self.bounds = latencies.bounds

    def next(self) -> list[int]:
        counts = self._latencies.counts()
        fresh = [new - old for new, old in zip(counts, self._before, strict=True)]
        self._before = counts
        return fresh


def quantile(counts: Sequence[int], bounds: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` of the observations lie. ``counts`` has one bucket more than
    ``bounds``; for what lies in that one the last bound is all that is known.
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    below, lower = 0, 0.0
    for count, upper in zip(counts, bounds, strict=False):
        if count and below + count >= wanted:
            return round(lower + (upper - lower) * (wanted - below) / count, 6)
        below, lower = below + count, upper
    return bounds[-1]
