"""The figures of one stage, computed from its records and nothing else.

Requests count by the time they were *meant* to be sent: those of the steady window, between
warm-up and the end of the load, however late they ended. Throughput counts what *arrived* in that
window. Latency is from intended; ``*_from_sent`` is what clients with a laxer clock would say.
Tokens are the server's count; an event of a stream is a chunk, whatever it holds.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec
import numpy as np

from capacity.load.objectives import Attainment, Objectives, attainment
from capacity.load.records import Failure, Record

SECOND = 1_000_000_000
# A percentile is told only when the sample carries it: five samples or more lie beyond it, for
# p99.9 ten.
NEEDED = {"p50": 5, "p90": 50, "p95": 100, "p99": 500, "p99.9": 10_000}
_QUANTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}


class Spread(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Milliseconds, unless the name says otherwise. ``percentiles`` has those that ``count``
    carries.
    """

    count: int
    mean: float = 0.0
    least: float = 0.0
    most: float = 0.0
    percentiles: dict[str, float] = {}

    def at(self, name: str) -> float | None:
        return self.percentiles.get(name)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """See the module; ``unfinished`` are requests that were under way when the test was stopped
    and are in no other count.
    """

    window_s: float
    attempts: int
    succeeded: int
    unfinished: int
    errors: dict[str, int]
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    output_tokens_per_s_per_gpu: float | None
    output_tokens_per_s_per_user: float | None
    ttft: Spread
    ttft_from_sent: Spread
    ttfb: Spread
    tpot: Spread
    icl: Spread
    e2e: Spread
    e2e_from_sent: Spread
    attainment: Attainment | None
    goodput_per_s: float | None
    schedule_lag: Spread
    schedule_lag_p99_ms: float  # of any sample: it judges the client, not the server
    connect: Spread
    input_tokens: Spread
    output_tokens: Spread
    cached_share: float | None
    input_drift: float | None  # (counted - wanted) / wanted, over all requests that say both
    short_outputs: float | None  # share of successful requests that ended before the wanted length
    tokens_per_chunk: float | None
    without_usage: int
    server: dict[str, Spread]


def spread(values: Iterable[float], *, scale: float = 1e-6) -> Spread:
    """Of nanoseconds, as milliseconds; other units with another scale."""
    sample = np.fromiter(values, dtype=np.float64) * scale
    if not sample.size:
        return Spread(count=0)
    names = [name for name, needed in NEEDED.items() if sample.size >= needed]
    found = np.percentile(sample, [_QUANTILES[name] for name in names])
    return Spread(
        count=int(sample.size),
        mean=float(sample.mean()),
        least=float(sample.min()),
        most=float(sample.max()),
        percentiles=dict(zip(names, (float(value) for value in found), strict=True)),
    )


def in_window(records: Iterable[Record], begin_ns: int, end_ns: int) -> list[Record]:
    """Those that were meant to be sent then and were not interrupted."""
    return [
        record
        for record in records
        if begin_ns <= record.intended_ns < end_ns and record.error != Failure.INTERRUPTED
    ]


def figures_of(
    records: Sequence[Record],
    *,
    begin_ns: int,
    end_ns: int,
    objectives: Objectives | None = None,
    gpus: int | None = None,
) -> Figures:
    """The figures of a stage whose steady window is ``begin_ns`` to ``end_ns``."""
    window_s = max(1e-9, (end_ns - begin_ns) / SECOND)
    tried = in_window(records, begin_ns, end_ns)
    done = [record for record in tried if record.succeeded]
    streamed = [record for record in done if record.first_token_ns and record.chunks_ns]
    output_rate = sum(_tokens_within(record, begin_ns, end_ns) for record in records) / window_s
    first_tokens = (r for r in records if begin_ns <= (r.first_token_ns or r.done_ns) < end_ns)
    ended = sum(begin_ns <= record.done_ns < end_ns for record in records if record.succeeded)
    reached = None
    if objectives is not None:
        reached = attainment(sum(objectives.good(record) for record in tried), len(tried))
    tpot = spread(r.tpot_ns for r in streamed if r.tpot_ns is not None)
    lags = [r.started_ns - r.intended_ns for r in tried if r.started_ns]
    return Figures(
        window_s=window_s,
        attempts=len(tried),
        succeeded=len(done),
        unfinished=sum(record.error == Failure.INTERRUPTED for record in records),
        errors=dict(Counter(record.error for record in tried if record.error).most_common()),
        requests_per_s=ended / window_s,
        input_tokens_per_s=sum(r.input_tokens or 0 for r in first_tokens) / window_s,
        output_tokens_per_s=output_rate,
        output_tokens_per_s_per_gpu=output_rate / gpus if gpus else None,
        output_tokens_per_s_per_user=1e3 / tpot.mean if tpot.mean else None,
        ttft=spread(r.first_token_ns - r.intended_ns for r in streamed),
        ttft_from_sent=spread(r.first_token_ns - r.sent_ns for r in streamed),
        ttfb=spread(r.first_byte_ns - r.intended_ns for r in done),
        tpot=tpot,
        icl=spread(later - earlier for r in streamed for earlier, later in pairwise(r.chunks_ns)),
        e2e=spread((r.last_token_ns or r.done_ns) - r.intended_ns for r in done),
        e2e_from_sent=spread((r.last_token_ns or r.done_ns) - r.sent_ns for r in done),
        attainment=reached,
        goodput_per_s=None if reached is None else reached.good / window_s,
        schedule_lag=spread(lags),
        schedule_lag_p99_ms=float(np.percentile(lags, 99)) / 1e6 if lags else 0.0,
        connect=spread(r.sent_ns - r.started_ns for r in done if r.new_connection),
        input_tokens=spread((r.input_tokens for r in done if r.input_tokens), scale=1.0),
        output_tokens=spread((r.output_tokens for r in done if r.output_tokens), scale=1.0),
        cached_share=_cached_share(done),
        input_drift=_input_drift(done),
        short_outputs=_short_outputs(done),
        tokens_per_chunk=_tokens_per_chunk(streamed),
        without_usage=sum(record.output_tokens is None for record in done),
        server=_server_stages(done),
    )


def _tokens_within(record: Record, begin_ns: int, end_ns: int) -> float:
    """Output tokens that arrived in the window, each chunk with the request's mean per chunk."""
    if record.output_tokens is None:
        return 0.0
    if not record.chunks_ns:
        return float(record.output_tokens) if begin_ns <= record.done_ns < end_ns else 0.0
    inside = sum(begin_ns <= at < end_ns for at in record.chunks_ns)
    return record.output_tokens * inside / len(record.chunks_ns)


def _cached_share(done: Sequence[Record]) -> float | None:
    told = [(r.cached_tokens, r.input_tokens) for r in done if r.cached_tokens is not None]
    given = sum(tokens or 0 for _, tokens in told)
    return sum(cached or 0 for cached, _ in told) / given if given else None


def _input_drift(done: Sequence[Record]) -> float | None:
    known = [(r.input_tokens, r.wanted_input) for r in done if r.input_tokens and r.wanted_input]
    wanted = sum(tokens for _, tokens in known)
    return sum(counted - wish for counted, wish in known) / wanted if wanted else None


def _short_outputs(done: Sequence[Record]) -> float | None:
    known = [r for r in done if r.output_tokens is not None and r.wanted_output]
    short = sum((r.output_tokens or 0) < r.wanted_output for r in known)
    return short / len(known) if known else None


def _tokens_per_chunk(streamed: Sequence[Record]) -> float | None:
    known = [record for record in streamed if record.output_tokens is not None]
    chunks = sum(len(record.chunks_ns) for record in known)
    return sum(record.output_tokens or 0 for record in known) / chunks if chunks else None


def _server_stages(done: Sequence[Record]) -> dict[str, Spread]:
    names = dict.fromkeys(name for record in done for name in record.server_ms)
    return {
        name: spread((r.server_ms[name] for r in done if name in r.server_ms), scale=1.0)
        for name in names
    }
