"""The pieces that touch the system: the alarm, and workers as processes."""

from time import monotonic_ns

import psutil
import pytest

from capacity.load.address import parse_address, resolve
from capacity.load.alarm import Alarm
from capacity.load.api import Api
from capacity.load.arrivals import Arrivals, Ramp
from capacity.load.crew import crew_of
from capacity.load.errors import LoadError
from capacity.load.lengths import parse_lengths
from capacity.load.messages import OpenLoop, Progress, Setup, Stage, StageEnd
from capacity.load.records import Record
from capacity.load.text import Calibration
from capacity.load.workload import WorkloadSpec
from tests.support.scripted_server import Script, scripted_server

pytestmark = pytest.mark.anyio
LENGTH = parse_lengths("8", "--input")


async def test_an_alarm_never_rings_early() -> None:
    alarm = Alarm()
    for ahead_ns in (-1, 0, 10_000, 300_000, 1_700_000, 5_000_000):
        due_ns = monotonic_ns() + ahead_ns
        await alarm.until(due_ns)
        assert monotonic_ns() >= due_ns
    alarm.close()


async def test_workers_share_a_schedule_without_gaps_or_repeats() -> None:
    with scripted_server(Script(first_token_s=0.005, token_s=0.001)) as reference:
        async with crew_of(3) as crew:
            for worker in range(3):
                await crew.order(worker, a_setup(reference.url, worker, 3))
            load = OpenLoop(rate=Ramp(60, 60), arrivals=Arrivals())
            start_ns = monotonic_ns() + 20_000_000
            await crew.order_all(
                Stage(number=0, load=load, start_ns=start_ns, duration_s=1.0, grace_s=20.0)
            )
            records: list[Record] = []
            ends = 0
            while ends < 3:
                news = await crew.next_news()
                ends += isinstance(news, StageEnd)
                if isinstance(news, Progress):
                    records += news.records
    assert sorted(record.session for record in records) == list(range(len(records)))
    assert {record.worker for record in records} == {0, 1, 2}
    assert len({record.index for record in records}) == len(records) > 30
    assert all(record.started_ns >= record.intended_ns for record in records)


async def test_a_worker_that_dies_ends_the_test_with_a_reason() -> None:
    async with crew_of(1) as crew:
        children = psutil.Process().children()
        (worker,) = (child for child in children if "capacity.load.worker" in child.cmdline())
        worker.kill()
        with pytest.raises(LoadError, match="load worker 0: it ended with code -9"):
            await crew.next_news()


def a_setup(url: str, worker: int, workers: int) -> Setup:
    return Setup(
        address=resolve(parse_address(url)),
        api=Api(endpoint="chat", model="scripted"),
        workload=WorkloadSpec(input=LENGTH, output=LENGTH),
        calibration=Calibration(),
        timeout_s=20.0,
        worker=worker,
        workers=workers,
        zero_ns=monotonic_ns(),
    )
