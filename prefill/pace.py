"""How fast a prefill worker computes, and what it tells the scheduler of its load."""

from engine.kvcache.block_pool import BlockPool
from prefill.push_times import PushTotals
from prefill.scheduler import PrefillBooks
from protocol.workers import WorkerLoad

STEP_SMOOTHING = 0.2


class Pace:
    """Smoothed over the last steps."""

    def __init__(self) -> None:
        self._step_seconds = 0.0
        self._tokens_per_second = 0.0

    def stepped(self, num_tokens: int, seconds: float) -> None:
        self._step_seconds += STEP_SMOOTHING * (seconds - self._step_seconds)
        self._tokens_per_second += STEP_SMOOTHING * (num_tokens / seconds - self._tokens_per_second)

    def load(
        self, books: PrefillBooks, pool: BlockPool, pushed: PushTotals, *, draining: bool
    ) -> WorkerLoad:
        return WorkerLoad(
            draining=draining,
            queued_requests=books.waiting,
            running_requests=books.computing,
            queued_tokens=books.queued_tokens,
            free_blocks=pool.num_available,
            total_blocks=pool.num_blocks,
            cached_blocks=pool.num_cached,
            active_blocks=pool.num_held,
            step_seconds=self._step_seconds,
            tokens_per_second=self._tokens_per_second,
            prefix_hit_tokens=books.prefix_hit_tokens,
            prompt_tokens=books.prompt_tokens,
            pushes=pushed.pushes,
            push_hidden_s=pushed.hidden_s,
            push_exposed_s=pushed.exposed_s,
        )
