"""A whole gateway behind its HTTP surface, with simulated workers, on one event loop."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from protocol.errors import ServingError
from protocol.requests import GenerateRequest
from server.generation import TokenChunk
from server.serving import Serving, open_serving
from server.step_writer import StepWriter
from tests.support.polling import eventually
from tests.support.workers import Fabric, Pace, SimulatedDecode, SimulatedPrefill, serve_workers

LONG_S = 30.0


async def tokens_of(
    serving: Serving, request: GenerateRequest, *, deadline_s: float = LONG_S
) -> list[int]:
    tokens: list[int] = []

    def deliver(chunk: TokenChunk) -> bool:
        tokens.extend(chunk.token_ids)
        return True

    await serving.generate(request, deliver, deadline_s=deadline_s)
    return tokens


class Stream:
    """One request's tokens as they come, while a test does something else."""

    def __init__(self, serving: Serving, request: GenerateRequest) -> None:
        self._serving = serving
        self._request = request
        self.tokens: list[int] = []
        self.ended = False
        self.failure: ServingError | None = None

    async def run(self) -> None:
        try:
            await self._serving.generate(self._request, self._take, deadline_s=LONG_S)
        except ServingError as error:
            self.failure = error
        finally:
            self.ended = True

    def _take(self, chunk: TokenChunk) -> bool:
        self.tokens.extend(chunk.token_ids)
        return True

    async def has(self, count: int) -> None:
        await eventually(lambda: len(self.tokens) >= count, f"{count} tokens")

    async def end(self) -> None:
        await eventually(lambda: self.ended, "the stream's end")


@dataclass
class System:
    serving: Serving
    fabric: Fabric
    prefill: list[SimulatedPrefill]
    decode: list[SimulatedDecode]
    add: Callable[[SimulatedPrefill | SimulatedDecode], Awaitable[None]]

    async def tokens(self, request: GenerateRequest, *, deadline_s: float = LONG_S) -> list[int]:
        return await tokens_of(self.serving, request, deadline_s=deadline_s)

    async def ready(self, pairs: int) -> None:
        cluster = self.serving.cluster
        await eventually(lambda: len(cluster.view.pairs()) == pairs, f"{pairs} pairs")
        await eventually(lambda: self.serving.readiness().ready, "a canary")
        await self.idle()

    async def idle(self) -> None:
        """Nothing of any request is left anywhere, and every block is free."""
        await eventually(lambda: not self.serving.cluster.attempts.by_request, "no attempts")
        workers: list[SimulatedPrefill | SimulatedDecode] = [*self.prefill, *self.decode]
        for worker in workers:
            await eventually(partial(_is_idle, worker), f"idle {worker.ref.worker_id}")
        for rank in self.decode:
            assert rank.free_blocks == rank.info.num_blocks


def _is_idle(worker: SimulatedPrefill | SimulatedDecode) -> bool:
    return worker.busy == 0


@asynccontextmanager
async def a_system(
    *,
    prefill: int = 1,
    groups: int = 1,
    ranks: int = 1,
    num_blocks: int = 1000,
    max_waiting: int = 8,
    patience_s: float = 0.0,
    pace: Pace | None = None,
    writer: StepWriter | None = None,
) -> AsyncGenerator[System]:
    fabric = Fabric()
    pace = pace or Pace()
    prefills = [SimulatedPrefill(f"prefill-{i}", fabric=fabric, pace=pace) for i in range(prefill)]
    decodes = [
        SimulatedDecode(
            f"decode-{group}/{rank}",
            fabric=fabric,
            rank=rank,
            world_size=ranks,
            group_id=f"decode-{group}",
            num_blocks=num_blocks,
            pace=pace,
        )
        for group in range(groups)
        for rank in range(ranks)
    ]
    async with (
        open_serving(
            "tcp://127.0.0.1:0",
            max_waiting=max_waiting,
            patience_s=patience_s,
            heartbeat_s=0.05,
            lease_s=LONG_S,
            writer=writer,
        ) as serving,
        serve_workers(serving.scheduler_address, [*prefills, *decodes]) as add,
    ):
        system = System(serving, fabric, prefills, decodes, add)
        await system.ready(pairs=prefill * groups)
        yield system
