"""The prefix cache's changes, on their way from the engine thread to the scheduler's heartbeat."""

import threading
from collections.abc import Iterable

from protocol.workers import PrefixEvents


class PrefixFeed:
    """Collects changes from one thread and reports them from another, in numbered batches."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[bytes] = set()
        self._stored: set[bytes] = set()
        self._removed: set[bytes] = set()
        self._sequence = 0

    def publish(self, stored: Iterable[bytes], removed: Iterable[bytes]) -> None:
        with self._lock:
            for hint in stored:
                self._known.add(hint)
                self._stored.add(hint)
                self._removed.discard(hint)
            for hint in removed:
                self._known.discard(hint)
                self._removed.add(hint)
                self._stored.discard(hint)

    def take(self, snapshot: bool) -> PrefixEvents | None:
        """What changed since the last report, or all that is cached; None when nothing changed."""
        with self._lock:
            if not snapshot and not self._stored and not self._removed:
                return None
            stored = tuple(self._known if snapshot else self._stored)
            removed = () if snapshot else tuple(self._removed)
            self._stored.clear()
            self._removed.clear()
            self._sequence += 1
            return PrefixEvents(
                sequence=self._sequence, stored=stored, removed=removed, snapshot=snapshot
            )
