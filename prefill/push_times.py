"""How long KV was on its way, and how much of that was hidden behind the prompt's computing.

Wraps a source, whose pushes work as before. Hidden is from a push's first blocks to the end of the
computing; exposed is from there until the decode rank has committed. Only whole pushes count.
"""

import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import NamedTuple

from kvtransfer.interface import KVSource, Push
from protocol.errors import TransferError
from protocol.ids import BlockId
from protocol.kv import Grant


class PushTotals(NamedTuple):
    """Of all pushes since the start, in seconds."""

    pushes: int = 0
    hidden_s: float = 0.0
    exposed_s: float = 0.0


class TimedSource:
    def __init__(self, source: KVSource) -> None:
        self._source = source
        self._lock = Lock()  # pushes end in transport threads
        self._totals = PushTotals()

    def open(self, grant: Grant) -> Push:
        """See ``KVSource.open``."""
        return _TimedPush(self._source.open(grant), self._count)

    def close(self) -> None:
        self._source.close()

    def totals(self) -> PushTotals:
        with self._lock:
            return self._totals

    def _count(self, hidden_s: float, exposed_s: float) -> None:
        with self._lock:
            before = self._totals
            self._totals = PushTotals(
                pushes=before.pushes + 1,
                hidden_s=before.hidden_s + hidden_s,
                exposed_s=before.exposed_s + exposed_s,
            )


class _TimedPush:
    def __init__(self, push: Push, count: Callable[[float, float], None]) -> None:
        self._push = push
        self._count = count
        self._begun: float | None = None

    def send(self, layers: range, first_block: int, source_blocks: Sequence[BlockId]) -> None:
        if self._begun is None:
            self._begun = time.monotonic()
        self._push.send(layers, first_block, source_blocks)

    def finish(self, payload: bytes, on_done: Callable[[TransferError | None], None]) -> None:
        computed = time.monotonic()
        begun = computed if self._begun is None else self._begun

        def done(error: TransferError | None) -> None:
            if error is None:
                self._count(computed - begun, time.monotonic() - computed)
            on_done(error)

        self._push.finish(payload, done)

    def abort(self, reason: str, on_done: Callable[[], None]) -> None:
        self._push.abort(reason, on_done)
