"""A group's experts are the sums over its ranks, from the worker's beat to the command's table."""

import json
from pathlib import Path

import anyio
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from deploy.expert_status import Group, groups_in, lines_of_experts, record
from engine.experts.recorded_load import parse_load
from protocol.errors import ConfigError
from protocol.ids import GatewayId
from protocol.messages import Announce, ExpertUpdate, Heartbeat, Message, WatchCluster, Withdraw
from protocol.workers import ExpertReport, ExpertTraffic, WorkerLoad, WorkerState
from runtime.clock import MonotonicClock
from server.expert_metrics import expert_metrics, groups_of, traffic_metrics
from server.scheduler import Scheduler
from tests.support.arithmetic import a_worker_info

TRAFFIC = ExpertTraffic(
    transport="all_to_all",
    buffer_bytes=3_500_000,
    layer_calls=10,
    dispatch_s=0.5,
    compute_s=0.25,
    combine_s=0.75,
    dispatch_bytes=40_000,
    combine_bytes=10_000,
    row_exchanges=5,
    row_exchange_s=0.03,
    steps=9,
    steps_in_two=4,
    skew_s=0.01,
    groups_formed=2,
    interrupted_s=1.2,
)
RANKS = [
    WorkerState(
        info=a_worker_info(f"d/{rank}", "decode", group_id="d", rank=rank, world_size=2),
        load=WorkerLoad(traffic=TRAFFIC),
    )
    for rank in range(2)
]


def report(
    tokens: tuple[int, ...], held: tuple[int, ...], shares: tuple[int, ...] = (8, 8, 8)
) -> ExpertReport:
    return ExpertReport(
        layers=(3,),
        tokens=(tuple(10 * count for count in tokens),),
        window_tokens=(tokens,),
        held=(held,),
        shares=(shares,),
        placement_epoch=4,
        migrations=2,
    )


# Expert 0 has two replicas. Ranks carry 2/3 * 6 + 1 = 5 and 1/3 * 6 + 5 = 7 of the window's 12
# tokens.
REPORTS = [
    report((4, 1, 2), (0, 1, -1), (16, 24, 0)),
    report((2, 0, 3), (0, 2, -1), (8, 24, 0)),
]
OF_RANK = {state.info.ref: of for state, of in zip(RANKS, REPORTS, strict=True)}


class Metrics(Collector):
    def collect(self) -> list[Metric]:
        return [*expert_metrics(RANKS, OF_RANK), *traffic_metrics(RANKS)]


def scraped() -> str:
    registry = CollectorRegistry()
    registry.register(Metrics())
    return generate_latest(registry).decode()


def test_a_group_is_the_sum_of_its_ranks() -> None:
    group = groups_of(RANKS, OF_RANK)["d"]
    layer = group.layers[3]
    assert list(layer.tokens) == [60, 10, 50]
    assert list(layer.replicas) == [2, 1, 1]
    assert list(layer.largest_share) == pytest.approx([2 / 3, 1, 1])
    assert list(layer.rank_tokens) == pytest.approx([5, 7])
    assert layer.slots == 6
    assert layer.balancedness == pytest.approx(6 / 7)
    assert (group.placement_epoch, group.migrations) == (4, 4)


def test_the_command_shows_what_each_ranks_exchanges_cost() -> None:
    (group,) = groups_in(scraped()).values()
    assert group.group_epoch == RANKS[0].info.epoch
    assert group.ranks[1].seconds["combine"] == 0.75
    assert group.ranks[1].sent_bytes == {"dispatch": 40_000, "combine": 10_000}
    lines = lines_of_experts({"d": group})
    assert "ranks come 2.000 ms apart" in lines[-4]
    assert "4 of 9 steps as two batches" in lines[-4]
    shown = lines[-1].split()
    assert shown[0] == "1"
    assert shown[1:9:2] == ["50.000", "25.000", "75.000", "6.000"]
    assert shown[9:] == ["5.0", "kB", "2", "1.2", "s", "all_to_all", "3.5", "MB"]


def test_the_command_shows_ranks_before_the_first_window_is_over() -> None:
    registry = CollectorRegistry()

    class Early(Collector):
        def collect(self) -> list[Metric]:
            return list(traffic_metrics(RANKS))

    registry.register(Early())
    lines = lines_of_experts(groups_in(generate_latest(registry).decode()))
    assert "rebalance_window" in lines[2]
    assert lines[-1].split()[0] == "1"


def test_a_group_is_not_shown_in_part() -> None:
    assert groups_of(RANKS, {RANKS[0].info.ref: REPORTS[0]}) == {}


def test_a_window_without_tokens_is_balanced() -> None:
    idle = {state.info.ref: report((0, 0, 0), (0, 1, 2)) for state in RANKS}
    assert groups_of(RANKS, idle)["d"].layers[3].balancedness == 1


def test_the_command_reads_what_the_gateway_shows() -> None:
    groups = groups_in(scraped())
    assert groups["d"].layers[3].tokens == {0: 60, 1: 10, 2: 50}
    assert groups["d"].layers[3].largest_share == {0: pytest.approx(2 / 3)}
    assert groups["d"].placement_epoch == 4
    lines = lines_of_experts(groups)
    assert lines[1] == "d: group epoch 1, placement epoch 4, 4 experts moved"
    assert lines[3].split() == ["3", "3", "6", "120", "0.857", "0", "50.0%", "2", "67%"]


def test_without_decode_workers_the_command_says_so() -> None:
    assert lines_of_experts(groups_in("")) == ["no decode worker has reported yet"]


def test_the_recorded_load_can_be_placed_by(tmp_path: Path) -> None:
    file = tmp_path / "load.json"
    record(groups_in(scraped()), file)
    load = parse_load(file.read_bytes(), "load.json")
    assert (load.num_experts, dict(load.layers)) == (3, {3: [60, 10, 50]})
    assert json.loads(file.read_bytes())["format"] == "headrace-expert-load"


@pytest.mark.parametrize("groups", [{}, {"a": Group(), "b": Group()}])
def test_only_the_load_of_one_worker_can_be_recorded(
    groups: dict[str, Group], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="needs one decode worker"):
        record(groups, tmp_path / "load.json")


def test_the_scheduler_passes_reports_on_and_forgets_those_of_the_gone() -> None:
    told: list[tuple[bytes, Message]] = []

    async def send(peer: bytes, message: Message) -> None:
        told.append((peer, message))

    async def life() -> None:
        scheduler = Scheduler(send, clock=MonotonicClock())
        worker = RANKS[0].info
        update = ExpertUpdate(worker=worker.ref, report=REPORTS[0])
        await scheduler.hear(b"w", Announce(info=worker, load=WorkerLoad()))
        await scheduler.hear(b"g", WatchCluster(gateway_id=GatewayId("g")))
        await scheduler.hear(
            b"w", Heartbeat(worker=worker.ref, load=WorkerLoad(), experts=REPORTS[0])
        )
        assert (b"g", update) in told
        await scheduler.hear(b"late", WatchCluster(gateway_id=GatewayId("late")))
        assert (b"late", update) in told
        await scheduler.hear(b"w", Withdraw(worker=worker.ref, reason="leaving"))
        told.clear()
        await scheduler.hear(b"later", WatchCluster(gateway_id=GatewayId("later")))
        assert not any(isinstance(message, ExpertUpdate) for _, message in told)

    anyio.run(life)
