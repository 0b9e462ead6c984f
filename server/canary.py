"""Whether a request would be served now: a small one is sent through each pair of workers.

A pair is a prefill worker and a decode group, each in one life. It is proven when a canary has
crossed prefill, transfer and decode, and stays so until a later canary fails or either of the two
is gone. A gateway is ready while it has a proven pair.
"""

from typing import NoReturn

import anyio

from protocol.errors import ProtocolError, ServingError
from protocol.ids import RequestId, new_request_id
from protocol.requests import GenerateRequest, SamplingParams, StopConditions
from runtime.log import get_log
from server.cluster import Cluster
from server.cluster_view import Pair
from server.generation import Readiness, TokenChunk
from server.request_flow import run_request

log = get_log(__name__)

NAMESPACE = "canary"
PROMPT = (1, 2, 3, 4)  # ids that every vocabulary has; shorter than a block, so never cached
TOKENS = 2  # the first is prefill's, the second proves the transfer and decode
DEADLINE_S = 30.0
EVERY_S = 15.0
RETRY_S = 1.0


class Canary:
    def __init__(
        self, cluster: Cluster, *, deadline_s: float = DEADLINE_S, every_s: float = EVERY_S
    ) -> None:
        self._cluster = cluster
        self._deadline_s = deadline_s
        self._every_s = every_s
        self._proven: dict[Pair, float] = {}  # when it was last tried with success
        self._failures: dict[Pair, str] = {}
        self._running: set[Pair] = set()

    def readiness(self) -> Readiness:
        """From memory. The reason names what is missing, or the last failure."""
        pairs = self._cluster.view.pairs()
        proven = [pair for pair in pairs if pair in self._proven]
        if proven:
            return Readiness(ready=True, reason=f"{len(proven)} of {len(pairs)} pairs proven")
        for pair in pairs:
            if pair in self._failures:
                return Readiness(ready=False, reason=f"canary failed: {self._failures[pair]}")
        if pairs:
            return Readiness(
                ready=False, reason="waiting for the first canary through these workers"
            )
        models = self._cluster.view.models()
        lacks = [f"{model}: {self._cluster.view.lack(model)}" for model in models]
        return Readiness(ready=False, reason="; ".join(lacks) or "no worker has joined")

    async def run(self) -> NoReturn:
        """Try what has changed at once, what has failed soon, and the rest every so often."""
        async with anyio.create_task_group() as tasks:
            while True:
                changed = self._cluster.topology_changed
                pairs = self._cluster.view.pairs()
                self._proven = {p: at for p, at in self._proven.items() if p in pairs}
                self._failures = {p: why for p, why in self._failures.items() if p in pairs}
                for pair in pairs:
                    if self._due(pair):
                        self._running.add(pair)
                        tasks.start_soon(self._try, pair)
                await self._pause(changed)
        raise AssertionError("only cancelling ends the canaries")

    def _due(self, pair: Pair) -> bool:
        if pair in self._running:
            return False
        tried = self._proven.get(pair)
        return tried is None or self._cluster.clock.now() >= tried + self._every_s

    async def _pause(self, changed: anyio.Event) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_cancel_when, changed, tasks.cancel_scope)
            await self._cluster.clock.sleep(RETRY_S)
            tasks.cancel_scope.cancel()

    async def _try(self, pair: Pair) -> None:
        clock = self._cluster.clock
        request = a_canary(pair.model)
        deadline = clock.now() + self._deadline_s
        received = 0

        def count(chunk: TokenChunk) -> bool:
            nonlocal received
            received += len(chunk.token_ids)
            return True

        try:
            await run_request(request, self._cluster, count, deadline=deadline, within=pair)
            if received != TOKENS:
                raise ProtocolError(f"{received} tokens came instead of {TOKENS}", stage="decode")
        except ServingError as error:
            if error.stage != "queue":  # busy is not broken
                self._proven.pop(pair, None)
                self._failures[pair] = f"{error} ({error.stage or error.code})"
                log.warning("canary failed", prefill=pair.prefill.worker_id, error=str(error))
                self._cluster.records.note("cluster", "error", f"canary failed: {error}")
        else:
            self._failures.pop(pair, None)
            self._proven[pair] = clock.now()
        finally:
            self._running.discard(pair)


def a_canary(model: str) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(f"canary-{new_request_id()}"),
        attempt=1,
        model=model,
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(temperature=0.0),
        stop=StopConditions(max_tokens=TOKENS),
        namespace=NAMESPACE,
    )


async def _cancel_when(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
