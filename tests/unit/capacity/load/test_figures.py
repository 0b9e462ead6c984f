import pytest

from capacity.load.figures import figures_of, spread
from capacity.load.impact import impact_of
from capacity.load.objectives import attainment, parse_objectives
from capacity.load.records import Failure, Record
from capacity.load.table import row
from capacity.load.verdict import Client, doubts, judge
from tests.support.load_runs import MS, QUIET, S, a_record


def many(count: int, **changed: object) -> list[Record]:
    return [a_record(0.1 * number, **changed) for number in range(count)]


def test_measures_follow_their_definitions() -> None:
    figures = figures_of(many(10), begin_ns=0, end_ns=1 * S)
    assert figures.ttft.at("p50") == pytest.approx(50)
    assert figures.tpot.at("p50") == pytest.approx(10)
    assert figures.icl.count == 40
    assert figures.e2e.at("p50") == pytest.approx(90)
    assert figures.output_tokens_per_s_per_user == pytest.approx(100)


def test_latency_counts_from_intended_and_is_told_from_sent_too() -> None:
    late = many(10, intended_ns=0)
    for record in late:
        record.intended_ns = record.sent_ns - 1000 * MS
    figures = figures_of(late, begin_ns=-2 * S, end_ns=2 * S)
    assert figures.ttft.at("p50") == pytest.approx(1050)
    assert figures.ttft_from_sent.at("p50") == pytest.approx(50)
    assert figures.e2e.at("p50") == pytest.approx(1090)


def test_tokens_come_from_usage_and_never_from_chunks() -> None:
    coalesced = many(10, output_tokens=20)
    figures = figures_of(coalesced, begin_ns=0, end_ns=10 * S)
    assert figures.output_tokens_per_s == pytest.approx(20)
    assert figures.tokens_per_chunk == pytest.approx(4)
    silent = figures_of(many(10, output_tokens=None), begin_ns=0, end_ns=10 * S)
    assert silent.output_tokens_per_s == 0
    assert silent.without_usage == 10
    assert silent.tpot.count == 0


def test_throughput_counts_what_arrived_in_the_window() -> None:
    straddling = a_record(-0.065)  # chunks at -15, -5, 5, 15 and 25 ms
    figures = figures_of([straddling], begin_ns=0, end_ns=20 * MS)
    assert figures.output_tokens_per_s == pytest.approx(2 / 0.020)
    assert figures.attempts == 0


def test_failures_are_attempts_and_interrupted_requests_are_not() -> None:
    records = many(4)
    records[1].error = "http 503"
    records[2].error = str(Failure.INTERRUPTED)
    figures = figures_of(records, begin_ns=0, end_ns=S, objectives=parse_objectives("e2e=1s"))
    assert (figures.attempts, figures.succeeded, figures.unfinished) == (3, 2, 1)
    assert figures.errors == {"http 503": 1}
    assert figures.attainment is not None
    assert figures.attainment.share == pytest.approx(2 / 3)
    assert figures.goodput_per_s == pytest.approx(2)


@pytest.mark.parametrize(
    ("count", "carried"),
    [
        (4, []),
        (5, ["p50"]),
        (49, ["p50"]),
        (50, ["p50", "p90"]),
        (100, ["p50", "p90", "p95"]),
        (500, ["p50", "p90", "p95", "p99"]),
        (9_999, ["p50", "p90", "p95", "p99"]),
        (10_000, ["p50", "p90", "p95", "p99", "p99.9"]),
    ],
)
def test_a_percentile_needs_a_sample_that_carries_it(count: int, carried: list[str]) -> None:
    assert list(spread([1.0] * count).percentiles) == carried


@pytest.mark.parametrize(
    ("written", "good"),
    [
        ("ttft=60ms", True),
        ("ttft=40ms", False),
        ("tpot=11ms", True),
        ("icl=9ms", False),
        ("e2e=0.1s", True),
        ("ttft=60ms,e2e=80ms", False),
    ],
)
def test_a_request_is_good_within_all_limits(written: str, good: bool) -> None:
    assert parse_objectives(written).good(a_record()) is good


def test_a_request_without_the_measure_is_not_good() -> None:
    assert not parse_objectives("tpot=1s").good(a_record(output_tokens=None))


def test_the_wilson_interval_is_the_published_one() -> None:
    found = attainment(8, 10)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert attainment(10, 10).high == 1.0


def test_a_quiet_client_and_the_wanted_lengths_are_valid() -> None:
    invalid, notes = doubts(
        figures_of(many(20), begin_ns=0, end_ns=2 * S), QUIET, exact_length=True
    )
    assert (invalid, notes) == ([], [])


@pytest.mark.parametrize(
    ("changed", "client", "said"),
    [
        ({"started_ns": 100 * S}, QUIET, "after they were due"),
        ({}, Client(workers=1, busiest_cpu=0.9, loop_lag_p99_ms=0), "90% of its core"),
        ({}, Client(workers=1, busiest_cpu=0.1, loop_lag_p99_ms=11), "event loop lagged"),
        ({}, Client(workers=1, busiest_cpu=0, loop_lag_p99_ms=0, capped=True), "connections"),
        ({"input_tokens": 110}, QUIET, "prompts had +10.0% tokens"),
        ({"output_tokens": 4}, QUIET, "before the wanted length"),
        ({"error": "http 500"}, QUIET, "no request succeeded"),
        ({"error": str(Failure.EXHAUSTED)}, QUIET, "ran out of connections"),
    ],
    ids=["late", "cpu", "lag", "capped", "drift", "short", "failed", "ports"],
)
def test_what_makes_a_measurement_invalid(
    changed: dict[str, object], client: Client, said: str
) -> None:
    figures = figures_of(many(20, **changed), begin_ns=0, end_ns=2 * S)
    verdict = judge([("x", figures, client)], None, exact_length=True, interrupted=False)
    assert verdict.exit_code == 2
    assert said in verdict.text


def test_an_objective_for_tpot_needs_usage() -> None:
    figures = figures_of(many(20, output_tokens=None), begin_ns=0, end_ns=2 * S)
    objectives = parse_objectives("tpot=50ms")
    verdict = judge([("x", figures, QUIET)], objectives, exact_length=True, interrupted=False)
    assert verdict.exit_code == 2
    assert "tpot cannot be judged" in verdict.text
    assert row("x", figures)[3] == "–"


def test_a_missed_objective_is_one_and_a_met_one_zero() -> None:
    for written, code in (("ttft=60ms", 0), ("ttft=40ms", 1)):
        objectives = parse_objectives(written)
        figures = figures_of(many(20), begin_ns=0, end_ns=2 * S, objectives=objectives)
        verdict = judge([("x", figures, QUIET)], objectives, exact_length=True, interrupted=False)
        assert verdict.exit_code == code


def test_a_faults_impact_is_told_before_during_and_after() -> None:
    records = [a_record(0.1 * number) for number in range(300)]
    for record in records:
        if 10 * S <= record.intended_ns < 14 * S:
            record.error = "http 503"
    impact = impact_of(
        "kill", "decode 1", 10 * S, records, begin_ns=0, end_ns=30 * S, objectives=None
    )
    assert impact.recovery_s == pytest.approx(4)
    assert impact.failed == 40
    assert (impact.before.available, impact.during.available, impact.after.available) == (1, 0, 1)
    assert impact.after.goodput_per_s == pytest.approx(10)


def test_a_system_that_stays_down_has_not_recovered() -> None:
    records = [a_record(0.1 * n, error="" if n < 100 else "timeout") for n in range(300)]
    impact = impact_of("kill", "p", 10 * S, records, begin_ns=0, end_ns=30 * S, objectives=None)
    assert impact.recovery_s is None
    assert impact.during.seconds == pytest.approx(20)
