"""Where a request should go: pure functions of what a gateway knows when it asks.

They only order candidates; the worker that is asked decides. Everything they read may be stale,
which costs a rejection and never correctness. Ties are broken by a hash of the request, so that
several gateways with the same view do not all choose the same worker.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from protocol.errors import ContextLengthExceeded
from protocol.holdings import room_from_others, room_kept
from protocol.ids import RequestId, WorkerId, WorkerRef
from protocol.workers import WorkerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What placement needs to know of a request. ``hit_tokens`` is by prefill worker, a hint."""

    request_id: RequestId
    model: str
    prompt_tokens: int
    caller: str = ""
    priority: int = 0
    hit_tokens: Mapping[WorkerRef, int] = field(default_factory=dict[WorkerRef, int])


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Load that a request puts on a worker, or a difference of such loads."""

    requests: int = 0
    tokens: int = 0  # prompt tokens to be computed
    blocks: int = 0


NO_WORK = Work()


def prefill_order(
    workers: Iterable[WorkerState],
    demand: Demand,
    *,
    unreported: Mapping[WorkerRef, Work],
    avoid: Collection[WorkerId] = (),
) -> list[WorkerState]:
    """Prefill workers for ``demand``, the one that can start decoding soonest first.

    The cost of a worker is in tokens to compute: those that are queued, and those of this prompt
    that its prefix cache does not seem to have. So a hit attracts, and never more than it saves.
    """

    def cost(state: WorkerState) -> tuple[int, bytes]:
        queued = state.load.queued_tokens + unreported.get(state.info.ref, NO_WORK).tokens
        return queued + uncached_tokens(state.info.ref, demand), _tie(demand, state)

    return sorted(_eligible(workers, demand, avoid), key=cost)


def decode_order(
    ranks: Iterable[WorkerState],
    demand: Demand,
    *,
    unreported: Mapping[WorkerRef, Work],
    avoid: Collection[WorkerId] = (),
    behind: bool = False,
) -> list[WorkerState]:
    """Decode ranks that seem to have room for the prompt, the best first; where none has, those
    where other callers would have to give way for it. None if all are full for this caller. With
    ``behind`` others wait before the request: what is free is theirs.

    Ranks step together, so the busiest sets the pace of its whole group: fewest requests come
    first, and among equals the one with most free blocks.

    Raises:
        ContextLengthExceeded: no rank is large enough, however long the request waited.
    """
    eligible = _eligible(ranks, demand, avoid)
    largest = max((_spare_when_empty(state, demand) for state in eligible), default=0)
    if largest < 0:
        raise ContextLengthExceeded(
            f"the prompt of {demand.prompt_tokens} tokens needs {-largest} more KV blocks than"
            f" any decode rank has; shorten it, or start the ranks with more blocks"
        )

    def begun(state: WorkerState) -> int:
        return unreported.get(state.info.ref, NO_WORK).blocks

    def free_blocks(state: WorkerState) -> int:
        return state.load.free_blocks - begun(state)

    def cost(state: WorkerState) -> tuple[int, int, bytes]:
        load = state.load
        requests = load.running_requests + load.queued_requests
        requests += unreported.get(state.info.ref, NO_WORK).requests
        return requests, -free_blocks(state), _tie(demand, state)

    able = eligible if not behind else []
    able = [state for state in able if free_blocks(state) >= blocks_needed(state, demand)]
    if not able:
        able = [
            state
            for state in eligible
            if state.load.holdings
            and _room_by_turn(state, demand, behind=behind) - begun(state)
            >= blocks_needed(state, demand)
        ]
    return sorted(able, key=cost)


def _room_by_turn(rank: WorkerState, demand: Demand, *, behind: bool) -> int:
    """Blocks that the caller might have, because others must give way or are not before it."""
    load, caller, priority = rank.load, demand.caller, demand.priority
    room = room_from_others(
        load.holdings, caller=caller, priority=priority, total_blocks=load.total_blocks
    )
    if behind:
        return room
    kept = room_kept(
        load.holdings, caller=caller, priority=priority, spare_blocks=load.spare_blocks
    )
    return room + kept


def uncached_tokens(worker: WorkerRef, demand: Demand) -> int:
    """Prompt tokens that ``worker`` would have to compute; the last one always is."""
    return demand.prompt_tokens - min(
        demand.hit_tokens.get(worker, 0), max(demand.prompt_tokens - 1, 0)
    )


def blocks_needed(rank: WorkerState, demand: Demand) -> int:
    """Blocks that a reservation takes: the prompt's."""
    return rank.info.layout.blocks_for(demand.prompt_tokens)


def _spare_when_empty(rank: WorkerState, demand: Demand) -> int:
    return rank.info.num_blocks - blocks_needed(rank, demand)


def _eligible(
    workers: Iterable[WorkerState], demand: Demand, avoid: Collection[WorkerId]
) -> list[WorkerState]:
    """Workers of the model that take new work, without those to avoid unless only they are left."""
    able = [w for w in workers if w.info.model == demand.model and not w.load.draining]
    return [w for w in able if w.info.ref.worker_id not in avoid] or able


def _tie(demand: Demand, state: WorkerState) -> bytes:
    name = f"{demand.request_id}\0{state.info.ref.worker_id}".encode()
    return hashlib.blake2b(name, digest_size=8).digest()
