"""What a fault cost: availability and goodput before it, until recovery, and after.

What had ended before the fault is *before*; a request that was under way belongs to *during*.
Recovered means that goodput is back at 95 % of what it was before, for three seconds on end that
had attempts; the time counts from the fault to the first of them. Attempts belong to the second
they were meant for.
"""

from collections.abc import Sequence

import msgspec

from capacity.load.objectives import Objectives
from capacity.load.records import Failure, Record

SECOND = 1_000_000_000
BACK_SHARE = 0.95
_STEADY_SECONDS = 3


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """``available``: the share of attempts that succeeded; ``good``: within the objectives too."""

    seconds: float
    attempts: int
    available: float | None
    good: float | None
    goodput_per_s: float | None


class FaultImpact(msgspec.Struct, frozen=True, kw_only=True):
    """``at_ns`` counts from the start of the run; ``recovery_s`` is None if it did not recover
    while there was load.
    """

    what: str
    process: str
    at_ns: int
    recovery_s: float | None
    failed: int
    before: Span
    during: Span
    after: Span


def impact_of(
    what: str,
    process: str,
    at_ns: int,
    records: Sequence[Record],
    *,
    begin_ns: int,
    end_ns: int,
    objectives: Objectives | None,
) -> FaultImpact:
    """The impact of a fault on the requests meant for ``begin_ns`` to ``end_ns``."""
    tried = [
        record
        for record in records
        if begin_ns <= record.intended_ns < end_ns and record.error != Failure.INTERRUPTED
    ]
    untouched = [record for record in tried if record.done_ns < at_ns]
    exposed = [record for record in tried if record.done_ns >= at_ns]
    before = _span(untouched, at_ns - begin_ns, objectives)
    back_ns = _recovered(exposed, at_ns, end_ns, before.good or 0.0, objectives)
    until_ns = end_ns if back_ns is None else back_ns
    during = [record for record in exposed if record.intended_ns < until_ns]
    after = [record for record in exposed if record.intended_ns >= until_ns]
    return FaultImpact(
        what=what,
        process=process,
        at_ns=at_ns,
        recovery_s=None if back_ns is None else (back_ns - at_ns) / SECOND,
        failed=sum(not record.succeeded for record in exposed),
        before=before,
        during=_span(during, until_ns - at_ns, objectives),
        after=_span(after, end_ns - until_ns, objectives),
    )


def _good(record: Record, objectives: Objectives | None) -> bool:
    return record.succeeded if objectives is None else objectives.good(record)


def _span(records: Sequence[Record], length_ns: int, objectives: Objectives | None) -> Span:
    good = sum(_good(record, objectives) for record in records)
    seconds = max(0.0, length_ns / SECOND)
    return Span(
        seconds=seconds,
        attempts=len(records),
        available=sum(r.succeeded for r in records) / len(records) if records else None,
        good=good / len(records) if records else None,
        goodput_per_s=good / seconds if seconds > 0 else None,
    )


def _recovered(
    tried: Sequence[Record],
    at_ns: int,
    end_ns: int,
    good_before: float,
    objectives: Objectives | None,
) -> int | None:
    """When the first of three steady seconds began; seconds without attempts say nothing."""
    counts: dict[int, tuple[int, int]] = {}
    for record in tried:
        if record.intended_ns >= at_ns:
            second = (record.intended_ns - at_ns) // SECOND
            good, attempts = counts.get(second, (0, 0))
            counts[second] = (good + _good(record, objectives), attempts + 1)
    steady: list[int] = []
    for second in range((end_ns - at_ns) // SECOND):
        if second not in counts:
            continue
        good, attempts = counts[second]
        if good < BACK_SHARE * good_before * attempts:
            steady = []
        else:
            steady.append(second)
        if len(steady) == _STEADY_SECONDS:
            return at_ns + steady[0] * SECOND
    return None
