"""How KV goes from prefill workers to decode ranks, for /metrics, by each prefill rank's account.

A worker's first rank has the worker's name, the others that and their number: ``prefill-0/1``.

headrace_link_info{prefill,decode,transport,reason}           1: what was chosen, and why
headrace_link_bytes_total{prefill,decode}                     KV written
headrace_link_seconds_total{prefill,decode}                   time spent writing it
headrace_link_measured_bytes_per_second{prefill,decode}       by a probe when the link came up
headrace_link_expected_bytes_per_second{prefill,decode}       what such a path gives at least
headrace_link_lost_total{prefill,decode}                      how often the link has ended
"""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from protocol.workers import WorkerState

_PAIR = ("prefill", "decode")


def link_metrics(members: Iterable[WorkerState]) -> Iterable[Metric]:
    info = GaugeMetricFamily(
        "headrace_link_info", "1: the transport and why", labels=(*_PAIR, "transport", "reason")
    )
    moved = CounterMetricFamily("headrace_link_bytes", "KV written", labels=_PAIR)
    seconds = CounterMetricFamily("headrace_link_seconds", "Time writing it", labels=_PAIR)
    measured = GaugeMetricFamily(
        "headrace_link_measured_bytes_per_second", "By a probe at the link's start", labels=_PAIR
    )
    expected = GaugeMetricFamily(
        "headrace_link_expected_bytes_per_second", "A healthy path gives more", labels=_PAIR
    )
    lost = CounterMetricFamily("headrace_link_lost", "Times that the link has ended", labels=_PAIR)
    for state in members:
        for link in state.load.links:
            pair = [link.prefill, link.decode]
            info.add_metric([*pair, link.transport, link.reason], 1)
            moved.add_metric(pair, link.bytes)
            seconds.add_metric(pair, link.seconds)
            measured.add_metric(pair, link.measured_bytes_per_s)
            expected.add_metric(pair, link.expected_bytes_per_s)
            lost.add_metric(pair, link.lost)
    yield from (info, moved, seconds, measured, expected, lost)
