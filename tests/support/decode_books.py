"""A decode rank's scheduler over a small pool, and steps of it whose tokens say nothing."""

from decode.scheduler import DecodeScheduler, DecodeStep
from engine.kvcache.block_pool import BlockPool
from protocol.ids import AttemptRef, RequestId

BLOCK_TOKENS = 4
TOKEN = 7


def a_scheduler(
    num_blocks: int = 32, *, max_batch: int = 8, headroom_blocks: int = 0
) -> DecodeScheduler:
    return DecodeScheduler(
        BlockPool(num_blocks),
        block_tokens=BLOCK_TOKENS,
        max_batch=max_batch,
        headroom_blocks=headroom_blocks,
    )


def a_ref(name: str) -> AttemptRef:
    return AttemptRef(RequestId(name), 0)


def step(scheduler: DecodeScheduler) -> DecodeStep:
    """One whole step, after which the books add up."""
    plan = scheduler.schedule()
    scheduler.advance(plan, [TOKEN] * len(plan.refs))
    scheduler.books()
    return plan


def running(plan: DecodeStep) -> list[str]:
    return [ref.request_id for ref in plan.refs]
