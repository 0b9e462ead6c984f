"""A prefill scheduler on a small pool, one step at a time."""

from engine.kvcache.block_pool import BlockPool
from engine.kvcache.prefix_index import PrefixIndex
from prefill.scheduler import PrefillLimits, PrefillScheduler, PrefillStep

BLOCK_TOKENS = 4


def a_scheduler(
    num_blocks: int = 64,
    *,
    max_batch_tokens: int = 16,
    max_batch_sequences: int = 8,
    max_queued_requests: int = 100,
) -> PrefillScheduler:
    pool = BlockPool(num_blocks)
    return PrefillScheduler(
        pool,
        PrefixIndex(pool),
        block_tokens=BLOCK_TOKENS,
        fingerprint="f",
        limits=PrefillLimits(
            max_batch_tokens=max_batch_tokens,
            max_batch_sequences=max_batch_sequences,
            max_queued_requests=max_queued_requests,
        ),
    )


def ranges(step: PrefillStep) -> list[tuple[str, int, int]]:
    return [(chunk.ref.request_id, chunk.start, chunk.stop) for chunk in step.chunks]


def run(scheduler: PrefillScheduler) -> list[tuple[str, int, int]]:
    step = scheduler.schedule()
    scheduler.complete(step)
    scheduler.check()
    return ranges(step)
