"""One request through a gateway and simulated workers, over the real bus."""

from collections.abc import Awaitable, Callable
from functools import partial

import anyio
import msgspec
import pytest

from protocol.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    NoWorkerAvailable,
    Overloaded,
    ServingError,
    TransferTimeout,
    WorkerLost,
)
from protocol.messages import StepTokens
from server.generation import TokenChunk
from server.serving import open_serving
from tests.support.arithmetic import a_request, expected_tokens, first_token
from tests.support.polling import eventually
from tests.support.system import LONG_S, Stream, System, a_system, tokens_of
from tests.support.workers import SimulatedDecode, SimulatedPrefill

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_every_token_arrives_once_and_in_order() -> None:
    async with a_system(ranks=2) as system:
        request = a_request((5, 6, 7), max_tokens=20)
        assert await system.tokens(request) == expected_tokens((5, 6, 7), 20)
        await system.idle()
        assert system.serving.cluster.links.stale_frames == 0


async def test_many_requests_at_once_keep_their_tokens_apart() -> None:
    async with a_system(prefill=2, ranks=2) as system:
        got: dict[int, list[int]] = {}

        async def one(seed: int) -> None:
            got[seed] = await system.tokens(a_request((seed, 2 * seed), max_tokens=12))

        async with anyio.create_task_group() as tasks:
            for seed in range(40):
                tasks.start_soon(one, seed)
        assert got == {seed: expected_tokens((seed, 2 * seed), 12) for seed in range(40)}
        assert all(rank.reservations > 5 for rank in system.decode)
        await system.idle()


async def test_a_request_of_one_token_needs_no_decode_step() -> None:
    async with a_system() as system:
        assert await system.tokens(a_request((9,), max_tokens=1)) == [first_token((9,))]
        await system.idle()


async def test_cancelling_the_task_cancels_the_request_at_both_workers() -> None:
    async with a_system() as system:
        system.decode[0].paused = True
        request = a_request(max_tokens=100)
        stream = Stream(system.serving, request)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.run)
            await stream.has(1)
            tasks.cancel_scope.cancel()
        await eventually(lambda: request.ref in system.prefill[0].cancelled, "a cancel of prefill")
        await eventually(lambda: request.ref in system.decode[0].cancelled, "a cancel of decode")
        await system.idle()


async def test_a_caller_that_has_enough_gets_no_more_and_frees_the_workers() -> None:
    async with a_system() as system:
        for wanted in (1, 3):
            request = a_request(max_tokens=100)
            got: list[int] = []

            def take(chunk: TokenChunk, wanted: int = wanted, got: list[int] = got) -> bool:
                got.extend(chunk.token_ids)
                return len(got) < wanted

            await system.serving.generate(request, take, deadline_s=LONG_S)
            assert got == expected_tokens((5, 6, 7), wanted)
            await system.idle()


async def test_what_the_caller_raises_at_a_token_is_raised_to_it_and_to_nobody_else() -> None:
    async with a_system() as system, anyio.create_task_group() as tasks:
        system.decode[0].paused = True
        other = Stream(system.serving, a_request(max_tokens=5))
        tasks.start_soon(other.run)
        await other.has(1)

        def fail_at_decode(chunk: TokenChunk) -> bool:
            if chunk.times is None:
                raise LookupError("a bug")
            system.decode[0].resume()
            return True

        with pytest.raises(LookupError):
            await system.serving.generate(a_request(), fail_at_decode, deadline_s=LONG_S)
        await other.end()
        assert other.tokens == expected_tokens((5, 6, 7), 5)
        await system.idle()


async def test_cancelling_the_waiting_task_cancels_the_prefill() -> None:
    async with a_system() as system:
        system.prefill[0].silent = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(system.tokens, a_request())
            await eventually(lambda: system.prefill[0].busy == 1, "a prefill")
            tasks.cancel_scope.cancel()
        await system.idle()


async def test_without_workers_the_answer_is_immediate_and_says_when_to_retry() -> None:
    async with open_serving("tcp://127.0.0.1:0") as serving:
        with pytest.raises(NoWorkerAvailable, match="no prefill worker") as raised:
            await tokens_of(serving, a_request())
        assert raised.value.retry_after_s is not None
        assert serving.models() == []


@pytest.mark.parametrize(
    "error", [Overloaded("full"), TransferTimeout("slow"), WorkerLost("gone")], ids=lambda e: e.code
)
async def test_a_failure_before_the_first_token_is_retried_on_another_worker(
    error: ServingError,
) -> None:
    async with a_system(prefill=2) as system:
        before = [worker.prompts for worker in system.prefill]
        for worker in system.prefill:
            worker.errors = [error]
        assert await system.tokens(a_request(max_tokens=4)) == expected_tokens((5, 6, 7), 4)
        asked = [w.prompts - n for w, n in zip(system.prefill, before, strict=True)]
        assert sorted(asked) == [1, 2]
        await system.idle()


async def test_the_third_failure_is_the_clients() -> None:
    async with a_system() as system:
        before = system.prefill[0].prompts
        system.prefill[0].errors = [TransferTimeout(f"try {n}") for n in (1, 2, 3)]
        with pytest.raises(TransferTimeout, match="try 3"):
            await system.tokens(a_request())
        assert system.prefill[0].prompts == before + 3
        await system.idle()


async def test_a_request_that_is_wrong_is_not_tried_again() -> None:
    async with a_system() as system:
        before = system.prefill[0].prompts
        system.prefill[0].errors = [InvalidRequest("no")]
        with pytest.raises(InvalidRequest):
            await system.tokens(a_request())
        assert system.prefill[0].prompts == before + 1
        await system.idle()


async def test_a_prompt_larger_than_any_rank_is_refused_at_once() -> None:
    async with a_system(num_blocks=4) as system:
        with pytest.raises(ContextLengthExceeded, match="3 more KV blocks"):
            await system.tokens(a_request(range(100)))


async def test_a_rank_that_rejects_costs_no_attempt() -> None:
    async with a_system(ranks=2) as system:
        full, roomy = system.decode
        full.full = True
        for _ in range(4):
            assert await system.tokens(a_request(max_tokens=3)) == expected_tokens((5, 6, 7), 3)
        assert roomy.reservations >= 4
        await system.idle()


async def test_when_every_rank_is_full_requests_wait_and_are_served_in_order() -> None:
    async with a_system(num_blocks=1) as system:
        system.decode[0].paused = True
        served: list[int] = []

        async def one(number: int) -> None:
            assert len(await system.tokens(a_request((number,), max_tokens=3))) == 3
            served.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(one, number)
                await eventually(partial(are_waiting, system, number), f"{number} waiting")
            system.decode[0].resume()
        assert served == [0, 1, 2, 3, 4]
        await system.idle()


def are_waiting(system: System, number: int) -> bool:
    return system.serving.cluster.waiting_requests == number and system.decode[0].busy == 1


async def test_a_rejected_request_does_not_press_the_rank_again_and_again() -> None:
    async with a_system() as system:
        rank = system.decode[0]
        rank.reject_all = True  # while it reports room
        before = rank.reservations
        with pytest.raises(DeadlineExceeded):
            await system.tokens(a_request(), deadline_s=0.5)
        # One try at first, then one for each report of load, which come every 50 ms here.
        assert 1 <= rank.reservations - before <= 25
        await system.idle()


async def test_a_full_line_turns_requests_away() -> None:
    async with a_system(max_waiting=2) as system:
        system.decode[0].full = True
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(system.tokens, a_request())
            await eventually(lambda: system.serving.cluster.waiting_requests == 2, "two waiting")
            with pytest.raises(Overloaded, match="2 requests are waiting"):
                await system.tokens(a_request())
            system.decode[0].full = False
        await system.idle()


async def _full(system: System) -> None:
    system.decode[0].full = True


async def _deaf_decode(system: System) -> None:
    system.decode[0].silent = True


async def _deaf_prefill(system: System) -> None:
    system.prefill[0].silent = True


async def _halted(system: System) -> None:
    system.decode[0].paused = True


async def _halts_after_a_step(system: System) -> None:
    rank = system.decode[0]

    def halt(frame: StepTokens) -> list[StepTokens]:
        rank.paused = True
        return [frame]

    rank.frame_hook = halt


@pytest.mark.parametrize(
    ("stage", "stall"),
    [
        ("queue", _full),
        ("reserve", _deaf_decode),
        ("prefill", _deaf_prefill),
        ("transfer", _halted),
        ("decode", _halts_after_a_step),
    ],
    ids=["queue", "reserve", "prefill", "transfer", "decode"],
)
async def test_the_deadline_names_the_stage_that_used_it_up(
    stage: str, stall: Callable[[System], Awaitable[None]]
) -> None:
    async with a_system() as system:
        await stall(system)
        with pytest.raises(DeadlineExceeded, match=stage) as raised:
            await system.tokens(a_request(), deadline_s=0.2)
        assert raised.value.stage == stage
        await system.idle()


async def test_a_prefill_worker_that_dies_is_replaced_by_another() -> None:
    async with a_system(prefill=2) as system:
        for worker in system.prefill:
            worker.silent = True
        async with anyio.create_task_group() as tasks:
            got: list[int] = []

            async def run() -> None:
                got.extend(await system.tokens(a_request(max_tokens=5)))

            tasks.start_soon(run)
            await eventually(lambda: any(w.busy for w in system.prefill), "a prefill")
            dead = next(w for w in system.prefill if w.busy)
            (alive,) = [w for w in system.prefill if w is not dead]
            alive.silent = False
            dead.crash()
        assert got == expected_tokens((5, 6, 7), 5)


async def test_a_decode_rank_that_dies_takes_its_group_out_and_another_group_serves() -> None:
    async with a_system(groups=2, ranks=2) as system:
        for rank in system.decode:
            rank.silent = True
        async with anyio.create_task_group() as tasks:
            got: list[int] = []

            async def run() -> None:
                got.extend(await system.tokens(a_request(max_tokens=5)))

            before = [rank.reservations for rank in system.decode]
            tasks.start_soon(run)
            await eventually(
                lambda: [rank.reservations for rank in system.decode] != before, "a reservation"
            )
            asked = next(
                r for r, n in zip(system.decode, before, strict=True) if r.reservations > n
            )
            for rank in system.decode:
                rank.silent = rank.info.group_id == asked.info.group_id
            asked.crash()
        assert got == expected_tokens((5, 6, 7), 5)
        assert len(system.serving.cluster.view.decode) == 2


async def test_a_decode_rank_that_dies_after_the_first_token_ends_the_stream_as_lost() -> None:
    async with a_system() as system, anyio.create_task_group() as tasks:
        system.decode[0].paused = True
        stream = Stream(system.serving, a_request(max_tokens=50))
        tasks.start_soon(stream.run)
        await stream.has(1)
        assert stream.tokens == [first_token((5, 6, 7))]
        system.decode[0].crash()
        await stream.end()
        assert isinstance(stream.failure, WorkerLost)
        assert "decode-0/0" in str(stream.failure)
        with pytest.raises(NoWorkerAvailable):
            await system.tokens(a_request())


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_new_requests_wait_for_workers_that_were_there_just_now(role: str) -> None:
    async with a_system(patience_s=LONG_S) as system, anyio.create_task_group() as tasks:
        if role == "prefill":
            system.prefill.pop().crash()
        else:
            system.decode.pop().crash()
        await eventually(lambda: not system.serving.readiness().ready, "not ready")
        streams = [Stream(system.serving, a_request()) for _ in range(3)]
        for stream in streams:
            tasks.start_soon(stream.run)
        cluster = system.serving.cluster
        await eventually(lambda: cluster.waiting_requests == 3, "three that wait")
        with anyio.move_on_after(0.05):  # a client that hangs up
            await system.tokens(a_request())
        assert cluster.waiting_requests == 3
        if role == "prefill":
            system.prefill.append(SimulatedPrefill("prefill-1", fabric=system.fabric))
            await system.add(system.prefill[0])
        else:
            system.decode.append(SimulatedDecode(fabric=system.fabric, epoch=2))
            await system.add(system.decode[0])
        for stream in streams:
            await stream.end()
            assert stream.tokens == expected_tokens((5, 6, 7), 8)
        await system.idle()


async def test_new_requests_do_not_wait_longer_than_patience() -> None:
    async with a_system(patience_s=0.3) as system, anyio.create_task_group() as tasks:
        system.prefill.pop().crash()
        await eventually(lambda: not system.serving.readiness().ready, "not ready")
        streams = [Stream(system.serving, a_request()) for _ in range(2)]
        for stream in streams:
            tasks.start_soon(stream.run)
        for stream in streams:
            await stream.end()
            assert isinstance(stream.failure, NoWorkerAvailable)
            assert stream.failure.retry_after_s
        with pytest.raises(NoWorkerAvailable, match="no prefill worker"), anyio.fail_after(0.1):
            await system.tokens(a_request())
        await system.idle()


async def test_a_restarted_decode_rank_serves_the_next_request() -> None:
    async with a_system() as system:
        system.decode.pop().crash()
        await eventually(lambda: not system.serving.readiness().ready, "not ready")
        successor = SimulatedDecode(fabric=system.fabric)
        system.decode.append(successor)
        await system.add(successor)
        await system.ready(pairs=1)
        assert await system.tokens(a_request()) == expected_tokens((5, 6, 7), 8)
        await system.idle()


async def test_repeated_and_foreign_frames_change_nothing_and_are_counted() -> None:
    def twice_and_from_elsewhere(frame: StepTokens) -> list[StepTokens]:
        other_life = msgspec.structs.replace(frame.worker, incarnation=1)
        foreign = msgspec.structs.replace(frame, worker=other_life)
        old = tuple(
            msgspec.structs.replace(d, ref=msgspec.structs.replace(d.ref, attempt=7))
            for d in frame.deltas
        )
        return [foreign, msgspec.structs.replace(frame, deltas=old), frame, frame]

    async with a_system() as system:
        links = system.serving.cluster.links
        before = links.stale_frames
        system.decode[0].frame_hook = twice_and_from_elsewhere
        assert await system.tokens(a_request(max_tokens=6)) == expected_tokens((5, 6, 7), 6)
        await eventually(lambda: links.stale_frames == before + 15, "5 steps, 3 stale frames each")


async def test_tokens_that_went_missing_end_the_stream() -> None:
    async with a_system() as system:
        system.decode[0].frame_hook = lambda frame: [frame] if frame.deltas[0].offset != 3 else []
        stream = Stream(system.serving, a_request(max_tokens=9))
        await stream.run()
        assert isinstance(stream.failure, WorkerLost)
        assert "tokens were lost" in str(stream.failure)
        assert stream.tokens == expected_tokens((5, 6, 7), 3)


async def test_a_failure_at_decode_after_the_first_token_is_the_clients() -> None:
    async with a_system() as system, anyio.create_task_group() as tasks:
        system.decode[0].paused = True
        request = a_request()
        stream = Stream(system.serving, request)
        tasks.start_soon(stream.run)
        await stream.has(1)
        await system.decode[0].fail(request.ref, Cancelled("withdrawn"))
        await stream.end()
        assert isinstance(stream.failure, Cancelled)
        await system.idle()
