"""A link counts what goes over it, and warns where it is far slower than its path."""

import logging

import pytest

from kvtransfer.choice import Route
from kvtransfer.links import Link
from protocol.ids import WorkerId

ROUTE = Route("tcp", "h:1", "same host", "same host, auto")


def a_link() -> Link:
    link = Link(WorkerId("decode-0/0"))
    link.up(ROUTE)
    return link


def test_a_link_that_has_never_come_up_reports_nothing() -> None:
    assert Link(WorkerId("decode-0/0")).report() is None


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
        link.measured(bytes_per_s)
    assert ("kv link is slow" in caplog.text) is warns
