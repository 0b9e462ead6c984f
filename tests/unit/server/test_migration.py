"""Streams whose decode rank is lost, through a gateway and simulated workers, over the real bus."""

import anyio
import pytest

from protocol.errors import DeadlineExceeded, WorkerLost
from protocol.messages import StepTokens
from tests.support.arithmetic import a_request, expected_tokens
from tests.support.system import LONG_S, Stream, System, a_system
from tests.support.workers import SimulatedDecode

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def interrupt(system: System, stream: Stream, after: int) -> SimulatedDecode:
    """Crash the rank that writes the stream, when the client has ``after`` tokens or more."""
    await stream.has(after)
    rank = next(rank for rank in system.decode if rank.busy)
    rank.crash()
    system.decode.remove(rank)
    return rank


def halt_after(rank: SimulatedDecode, steps: int) -> None:
    """Let the rank make some steps and then hold the next."""
    left = iter(range(steps - 1))

    def count(frame: StepTokens) -> list[StepTokens]:
        rank.paused = next(left, None) is None
        return [frame]

    rank.frame_hook = count


async def test_a_stream_goes_on_elsewhere_when_its_rank_dies() -> None:
    async with (
        a_system(groups=2, patience_s=LONG_S) as system,
        anyio.create_task_group() as tasks,
    ):
        for rank in system.decode:
            halt_after(rank, 6)
        stream = Stream(system.serving, a_request(max_tokens=40))
        tasks.start_soon(stream.run)
        await stream.has(7)
        (other,) = [rank for rank in system.decode if not rank.busy]
        other.frame_hook = lambda frame: [frame]
        await interrupt(system, stream, after=7)
        await stream.end()
        assert stream.failure is None
        assert stream.tokens == expected_tokens((5, 6, 7), 40)
        assert system.serving.cluster.migrations == 1
        await system.idle()


async def test_a_stream_waits_for_a_rank_to_be_back() -> None:
    async with a_system(patience_s=LONG_S) as system, anyio.create_task_group() as tasks:
        halt_after(system.decode[0], 3)
        stream = Stream(system.serving, a_request(max_tokens=30))
        tasks.start_soon(stream.run)
        await interrupt(system, stream, after=4)
        with pytest.raises(DeadlineExceeded, match="queue"):
            await system.tokens(a_request(), deadline_s=0.1)
        system.decode.append(SimulatedDecode(fabric=system.fabric, epoch=2))
        await system.add(system.decode[0])
        await stream.end()
        assert stream.tokens == expected_tokens((5, 6, 7), 30)
        await system.idle()


async def test_a_stream_whose_patience_ends_says_why_it_was_interrupted() -> None:
    async with a_system(patience_s=0.3) as system, anyio.create_task_group() as tasks:
        halt_after(system.decode[0], 3)
        stream = Stream(system.serving, a_request(max_tokens=30))
        tasks.start_soon(stream.run)
        await interrupt(system, stream, after=4)
        await stream.end()
        assert isinstance(stream.failure, WorkerLost)
        assert stream.tokens == expected_tokens((5, 6, 7), 4)


async def test_a_request_that_takes_every_rank_down_is_not_carried_on_for_ever() -> None:
    async with a_system(groups=6, patience_s=LONG_S) as system, anyio.create_task_group() as tasks:
        for rank in system.decode:
            halt_after(rank, 1)
        stream = Stream(system.serving, a_request(max_tokens=100))
        tasks.start_soon(stream.run)
        for length in (2, 4, 6, 8):
            await interrupt(system, stream, after=length)
        await stream.end()
        assert isinstance(stream.failure, WorkerLost)
        assert stream.tokens == expected_tokens((5, 6, 7), 8)
        assert len(system.decode) == 2
