"""A link counts what goes over it, and warns where it is far slower than its path."""

import logging

import pytest

from kvtransfer.choice import Route
from kvtransfer.links import MEASUREMENTS, Link
from protocol.ids import WorkerId

ROUTE = Route("tcp", "h:1", "same host", "same host, auto")


def a_link() -> Link:
    link = Link(WorkerId("prefill-0"), WorkerId("decode-0/0"))
    link.up(ROUTE)
    return link


def test_a_link_that_has_never_come_up_reports_nothing() -> None:
    assert Link(WorkerId("prefill-0"), WorkerId("decode-0/0")).report() is None


def test_a_report_adds_up_and_outlives_a_lost_connection() -> None:
    link = a_link()
    link.moved(1000, 0.5)
    link.lost()
    link.up(ROUTE)
    link.moved(500, 0.25)
    report = link.report()
    assert report is not None
    assert (report.bytes, report.seconds, report.lost) == (1500, 0.75, 1)
    assert (report.transport, report.reason) == ("tcp", "same host, auto")


def test_the_probe_is_over_with_its_last_answer() -> None:
    link = a_link()
    link.probing(3, 1 << 20)
    link.probed()
    link.probed()
    report = link.report()
    assert report is not None
    assert report.measured_bytes_per_s == 0
    link.probed()
    report = link.report()
    assert report is not None
    assert report.measured_bytes_per_s > 0


@pytest.mark.parametrize(("bytes_per_s", "warns"), [(1e6, True), (1e12, False)])
def test_a_slow_link_is_worth_a_warning(
    caplog: pytest.LogCaptureFixture, bytes_per_s: float, warns: bool
) -> None:
    link = a_link()
    with caplog.at_level(logging.WARNING):
        for _ in range(MEASUREMENTS - 1):
            assert link.measured(bytes_per_s) is warns
        assert "kv link is slow" not in caplog.text
        assert not link.measured(bytes_per_s)
    assert ("kv link is slow" in caplog.text) is warns


def test_one_good_measurement_of_several_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    link = a_link()
    with caplog.at_level(logging.WARNING):
        assert link.measured(1e6)
        assert not link.measured(1e9)
    assert not caplog.text
    report = link.report()
    assert report is not None
    assert report.measured_bytes_per_s == 1e9


def test_the_warning_says_what_was_measured_and_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    link = a_link()
    with caplog.at_level(logging.WARNING):
        for _ in range(MEASUREMENTS):
            link.measured(90e6)
    said = vars(caplog.records[-1])["fields"]
    assert (said["measured_mb_s"], said["expected_mb_s"], said["warned_below_mb_s"]) == (
        90,
        1000,
        250,
    )
    assert "harmless where other programs keep this machine busy" in said["advice"]
