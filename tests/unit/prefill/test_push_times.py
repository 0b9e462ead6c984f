from collections.abc import Callable, Sequence

from kvtransfer.interface import Push
from prefill.push_times import PushTotals, TimedSource
from protocol.errors import TransferError
from protocol.ids import BlockId, Incarnation, WorkerId, WorkerRef
from protocol.kv import Grant
from protocol.workers import LinkReport
from tests.support.transfers import a_grant

RANK = WorkerRef(WorkerId("decode-0"), Incarnation(1))


class Recording:
    """A push and its source; ``finish`` ends as it was told to, at once."""

    def __init__(self, error: TransferError | None) -> None:
        self.calls: list[object] = []
        self._error = error

    def open(self, grant: Grant) -> Push:
        self.calls.append(grant)
        return self

    def links(self) -> tuple[LinkReport, ...]:
        return ()

    def close(self) -> None:
        self.calls.append("close")

    def send(self, layers: range, first_block: int, source_blocks: Sequence[BlockId]) -> None:
        self.calls.append((layers, first_block, tuple(source_blocks)))

    def finish(self, payload: bytes, on_done: Callable[[TransferError | None], None]) -> None:
        self.calls.append(payload)
        on_done(self._error)

    def abort(self, reason: str, on_done: Callable[[], None]) -> None:
        self.calls.append(reason)
        on_done()


def test_a_push_passes_through_and_is_counted_when_it_has_committed() -> None:
    source = Recording(None)
    timed = TimedSource(source)
    grant = a_grant(RANK, [3])
    push = timed.open(grant)
    push.send(range(2), 0, [BlockId(7)])
    push.send(range(2, 4), 0, [BlockId(7)])
    ended: list[TransferError | None] = []
    push.finish(b"done", ended.append)
    timed.close()
    blocks = (BlockId(7),)
    sent = [(range(2), 0, blocks), (range(2, 4), 0, blocks)]
    assert source.calls == [grant, *sent, b"done", "close"]
    assert ended == [None]
    totals = timed.totals()
    assert totals.pushes == 1
    assert totals.hidden_s > 0  # two calls of ``send`` lie between
    assert totals.exposed_s >= 0


def test_what_failed_or_was_aborted_is_not_counted() -> None:
    failure = TransferError("broken")
    timed = TimedSource(Recording(failure))
    ended: list[TransferError | None] = []
    timed.open(a_grant(RANK, [3])).finish(b"", ended.append)
    quiet: list[bool] = []
    timed.open(a_grant(RANK, [3])).abort("cancelled", lambda: quiet.append(True))
    assert (ended, quiet) == ([failure], [True])
    assert timed.totals() == PushTotals()
