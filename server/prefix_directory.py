"""What each prefill worker seems to have in its prefix cache: 8-byte hints of block hashes.

A hint is good enough to place by and never trusted for a hit. Reports of a worker are numbered;
after a gap its entries are worth nothing and are dropped until its next snapshot.
"""

from collections.abc import Sequence

from protocol.ids import WorkerRef
from protocol.workers import PrefixEvents


class _Cache:
    __slots__ = ("hints", "sequence")

    def __init__(self) -> None:
        self.sequence = 0
        self.hints: set[bytes] = set()


class PrefixDirectory:
    def __init__(self) -> None:
        self._caches: dict[WorkerRef, _Cache] = {}

    def apply(self, worker: WorkerRef, events: PrefixEvents) -> bool:
        """Take in a report; False when one before it is missing, and a snapshot is needed."""
        cache = self._caches.get(worker)
        if events.snapshot:
            cache = self._caches[worker] = _Cache()
        elif cache is None or events.sequence != cache.sequence + 1:
            self._caches.pop(worker, None)
            return False
        cache.sequence = events.sequence
        cache.hints.difference_update(events.removed)
        cache.hints.update(events.stored)
        return True

    def snapshot(self, worker: WorkerRef) -> PrefixEvents | None:
        """All that is known of ``worker``, as a report that a newcomer can start from."""
        cache = self._caches.get(worker)
        if cache is None:
            return None
        return PrefixEvents(sequence=cache.sequence, stored=tuple(cache.hints), snapshot=True)

    def hit_blocks(self, worker: WorkerRef, hints: Sequence[bytes]) -> int:
        """How many leading blocks of a prompt ``worker`` seems to have."""
        cache = self._caches.get(worker)
        if cache is None:
            return 0
        for count, hint in enumerate(hints):
            if hint not in cache.hints:
                return count
        return len(hints)

    def workers(self) -> list[WorkerRef]:
        return list(self._caches)

    def forget(self, worker: WorkerRef) -> None:
        self._caches.pop(worker, None)
