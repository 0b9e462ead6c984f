"""Ready means that a request has just gone all the way."""

import anyio
import pytest

from protocol.errors import TransferTimeout
from server.serving import open_serving
from tests.support.arithmetic import a_request, expected_tokens
from tests.support.polling import eventually
from tests.support.system import a_system
from tests.support.workers import Fabric, SimulatedDecode, SimulatedPrefill, serve_workers

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_the_reason_says_what_is_missing() -> None:
    fabric = Fabric()
    async with open_serving("tcp://127.0.0.1:0", heartbeat_s=0.05) as serving:
        assert serving.readiness().reason == "no worker has joined"
        async with serve_workers(serving.scheduler_address, []) as add:
            await add(SimulatedPrefill(fabric=fabric))
            await add(SimulatedDecode("decode-0/1", fabric=fabric, rank=1, world_size=2))
            reason = "arithmetic: no decode worker: waiting for 1 of 2 ranks of decode-0"
            await eventually(lambda: serving.readiness().reason == reason, reason)
            assert not serving.readiness().ready
            await add(SimulatedDecode("decode-0/0", fabric=fabric, rank=0, world_size=2))
            await eventually(lambda: serving.readiness().ready, "ready")


async def test_a_cluster_that_only_looks_complete_is_not_ready() -> None:
    fabric = Fabric()
    decode = SimulatedDecode(fabric=fabric)
    decode.paused = True  # takes reservations and KV, and never steps
    async with (
        open_serving("tcp://127.0.0.1:0", heartbeat_s=0.05) as serving,
        serve_workers(serving.scheduler_address, [SimulatedPrefill(fabric=fabric), decode]),
    ):
        await eventually(lambda: decode.busy == 1, "a canary at decode")
        assert not serving.readiness().ready
        assert serving.readiness().reason == "waiting for the first canary through these workers"
        decode.resume()
        await eventually(lambda: serving.readiness().ready, "ready")


async def test_a_failed_canary_is_shown_and_tried_again() -> None:
    fabric = Fabric()
    prefill = SimulatedPrefill(fabric=fabric)
    prefill.errors = [TransferTimeout("the pages never arrived") for _ in range(3)]
    async with (
        open_serving("tcp://127.0.0.1:0", heartbeat_s=0.05) as serving,
        serve_workers(serving.scheduler_address, [prefill, SimulatedDecode(fabric=fabric)]),
    ):
        reason = "canary failed: the pages never arrived (prefill)"
        await eventually(lambda: serving.readiness().reason == reason, reason)
        await eventually(lambda: serving.readiness().ready, "ready")


async def test_losing_one_of_two_decode_groups_leaves_the_gateway_ready() -> None:
    async with a_system(groups=2) as system:
        reason = "1 of 1 pairs proven"
        system.decode.pop().crash()
        await eventually(lambda: system.serving.readiness().reason == reason, reason)
        assert system.serving.readiness().ready


async def test_losing_the_only_decode_group_is_noticed_at_once() -> None:
    async with a_system() as system:
        system.decode.pop().crash()
        await eventually(lambda: not system.serving.readiness().ready, "not ready")
        reason = system.serving.readiness().reason
        assert reason == "arithmetic: no decode worker"


async def test_a_full_decode_rank_is_busy_and_not_broken() -> None:
    async with a_system() as system:
        system.decode[0].full = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(system.tokens, a_request())
            await eventually(lambda: system.serving.cluster.waiting_requests == 1, "one waiting")
            assert system.serving.readiness().ready
            system.decode[0].full = False


async def test_canaries_do_not_disturb_requests_or_leave_anything_behind() -> None:
    async with a_system(prefill=2, groups=2) as system:
        assert await system.tokens(a_request()) == expected_tokens((5, 6, 7), 8)
        await system.idle()
