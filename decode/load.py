"""What a decode rank says of its load: its scheduler's books, its pace, its traffic."""

from decode.intake import Intake
from decode.scheduler import DecodeScheduler
from engine.experts.meter import ExchangeMeter
from protocol.workers import WorkerLoad

STEP_SMOOTHING = 0.1


class LoadAccount:
    """``load`` is a new object after each call, so that other threads may read it."""

    def __init__(self, scheduler: DecodeScheduler, intake: Intake, meter: ExchangeMeter) -> None:
        self._scheduler = scheduler
        self._intake = intake
        self._meter = meter
        self._step_seconds = 0.0
        self._generated_tokens = 0
        self.look()  # a rank is announced before its first turn, and given work at once

    def stepped(self, seconds: float, tokens: int) -> None:
        """A step has given ``tokens`` new tokens here."""
        self._step_seconds += STEP_SMOOTHING * (seconds - self._step_seconds)
        self._generated_tokens += tokens
        self.look()

    def look(self) -> None:
        books = self._scheduler.books()
        self.load = WorkerLoad(
            draining=self._intake.draining,
            queued_requests=books.granted_requests + books.waiting_requests,
            running_requests=books.running_requests + books.swapped_requests,
            free_blocks=books.reservable,
            spare_blocks=books.spare,
            holdings=self._scheduler.holdings(),
            total_blocks=books.total,
            cached_blocks=books.cached,
            granted_blocks=books.granted,
            active_blocks=books.active,
            quarantined_blocks=books.quarantined,
            step_seconds=self._step_seconds,
            tokens_per_second=books.running_requests / max(self._step_seconds, 1e-6),
            generated_tokens=self._generated_tokens,
            traffic=self._meter.traffic(),
        )
