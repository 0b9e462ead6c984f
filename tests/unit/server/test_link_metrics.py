"""A link's figures, from the prefill worker's account to the command's table."""

from collections.abc import Iterable

from msgspec import structs
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from deploy.link_status import lines_of_links, links_in
from protocol.ids import WorkerId
from protocol.workers import LinkReport, WorkerLoad, WorkerState
from server.link_metrics import link_metrics
from tests.support.arithmetic import a_worker_info

REPORT = LinkReport(
    prefill=WorkerId("p-0"),
    decode=WorkerId("decode-0/1"),
    transport="tcp",
    reason='elsewhere, auto; not shm: needs "one" host',
    bytes=30_000_000,
    seconds=0.02,
    measured_bytes_per_s=1.2e9,
    expected_bytes_per_s=1e9,
    lost=2,
)
OTHERS = structs.replace(REPORT, prefill=WorkerId("p-0/1"), transport="shm", lost=0)
MEMBERS = [
    WorkerState(info=a_worker_info("p-0", "prefill"), load=WorkerLoad(links=(REPORT, OTHERS))),
    WorkerState(info=a_worker_info("d/0", "decode"), load=WorkerLoad()),
]


class Links(Collector):
    def collect(self) -> Iterable[Metric]:
        return link_metrics(MEMBERS)


def text() -> str:
    registry = CollectorRegistry()
    registry.register(Links())
    return generate_latest(registry).decode()


def test_every_figure_of_a_link_reaches_the_command() -> None:
    link = links_in(text())["p-0 > decode-0/1"]
    assert (link.transport, link.reason) == (REPORT.transport, REPORT.reason)
    assert (link.bytes, link.seconds, link.lost) == (30_000_000, 0.02, 2)
    assert link.measured_bytes_per_second == 1.2e9
    assert link.expected_bytes_per_second == 1e9
    assert round(link.bytes_per_second) == 1_500_000_000


def test_the_table_says_what_was_chosen_and_why() -> None:
    _, head, row, _ = lines_of_links(links_in(text()))
    assert head.split()[:3] == ["prefill", "decode", "transport"]
    assert row.split()[:5] == ["p-0", "decode-0/1", "tcp", "30.0", "MB"]
    assert row.endswith(REPORT.reason)


def test_each_rank_of_a_prefill_worker_has_its_own_figures() -> None:
    links = links_in(text())
    assert links["p-0 > decode-0/1"].lost == 2
    assert links["p-0/1 > decode-0/1"].transport == "shm"
    assert links["p-0/1 > decode-0/1"].lost == 0


def test_no_links_is_said_in_words() -> None:
    assert "no links yet" in lines_of_links({})[1]
