"""Pushes that all ranks of a prefill worker fill together, as the rank that leads has them.

Each rank sends the heads that it holds, into the same grant. To the engine loop it is one push: it
fails where any rank's share fails, and its blocks are free only when no rank reads them any more,
for a block's number is the same on all ranks. What followers have to do is noted as orders.
"""

import threading
from collections.abc import Callable, Collection, Sequence

from kvtransfer.interface import KVSource, Push
from prefill.lockstep import EndPush, LinkNews, PushOutcome, PushReport
from protocol.errors import TransferError, WorkerLost
from protocol.ids import BlockId, WorkerId
from protocol.kv import Grant
from protocol.workers import LinkReport

OnEnded = Callable[[TransferError | None], None]


class JointSource:
    """A ``KVSource``. ``senders`` are the other ranks that have a share of their own."""

    def __init__(self, source: KVSource, *, senders: Collection[int]) -> None:
        self._source = source
        self._senders = frozenset(senders)
        self._open: dict[int, _JointPush] = {}
        self._next = 0
        self.connected = False
        self._opened: list[Grant] = []
        self._ended: list[EndPush] = []
        self._links_of_others: dict[tuple[WorkerId, WorkerId], LinkReport] = {}

    def open(self, grant: Grant) -> Push:
        """As ``KVSource.open``.

        Raises:
            WorkerLost: the ranks are not connected.
        """
        if not self.connected:
            raise WorkerLost("the ranks of this prefill worker are not together", stage="prefill")
        own = self._source.open(grant)
        if not self._senders:
            return own  # latents, which this rank sends alone
        push = _JointPush(own, self._next, self._senders, self._end)
        self._open[self._next] = push
        self._next += 1
        self._opened.append(grant)
        return push

    def links(self) -> tuple[LinkReport, ...]:
        """This rank's, and those of the others as they were told last. Thread-safe."""
        return (*self._source.links(), *self._links_of_others.values())

    def close(self) -> None:
        self._source.close()

    @property
    def others_send(self) -> bool:
        return bool(self._senders)

    @property
    def awaits_others(self) -> bool:
        """Whether a push waits for another rank to end its share."""
        return any(push.awaits_others for push in self._open.values())

    def take_orders(self) -> tuple[tuple[Grant, ...], tuple[EndPush, ...]]:
        """What followers have to open and to end since the last call."""
        orders = tuple(self._opened), tuple(self._ended)
        self._opened.clear()
        self._ended.clear()
        return orders

    def hear(self, rank: int, report: PushReport) -> None:
        push = self._open.get(report.push)
        if push is None:
            return
        push.hear(rank, report.outcome)
        if push.is_over:
            del self._open[report.push]

    def hear_links(self, news: LinkNews) -> None:
        # Replaced and not changed, since another thread may be reading it.
        told = {(link.prefill, link.decode): link for link in news.links}
        self._links_of_others = self._links_of_others | told

    def enter_group(self) -> None:
        """The ranks have met: followers count pushes anew."""
        self._next = 0
        self.connected = True

    def leave_group(self) -> None:
        """The other ranks' shares are lost; they close their connections by themselves."""
        self.connected = False
        self._links_of_others = {}
        self.take_orders()
        for push in self._open.values():
            push.lose_others()
        self._open.clear()

    def _end(self, push: "_JointPush", abort: str | None) -> None:
        if self._open.get(push.number) is push:
            self._ended.append(EndPush(push.number, abort))


class _JointPush:
    def __init__(
        self,
        own: Push,
        number: int,
        senders: frozenset[int],
        end: Callable[["_JointPush", str | None], None],
    ) -> None:
        self.number = number
        self._own = own
        self._end = end
        self._lock = threading.Lock()  # this rank's own share ends in a transport thread
        self._awaited = set(senders)
        self._error: TransferError | None = None
        self._waiting: list[tuple[OnEnded, TransferError | None]] = []  # own share's outcomes
        self._ending = False

    @property
    def awaits_others(self) -> bool:
        return self._ending and bool(self._awaited)

    @property
    def is_over(self) -> bool:
        return self._ending and not self._awaited

    def send(self, layers: range, first_block: int, source_blocks: Sequence[BlockId]) -> None:
        if self._error is not None:
            raise self._error
        self._own.send(layers, first_block, source_blocks)

    def finish(self, payload: bytes, on_done: OnEnded) -> None:
        self._ending = True
        self._end(self, None)
        self._own.finish(payload, lambda error: self._own_ended(on_done, error))

    def abort(self, reason: str, on_done: Callable[[], None]) -> None:
        self._ending = True
        self._end(self, reason)
        self._own.abort(reason, lambda: self._own_ended(lambda _: on_done(), None))

    def hear(self, rank: int, outcome: PushOutcome) -> None:
        """What a follower reports; on the engine thread, like all but ``_own_ended``."""
        if outcome == PushOutcome.FAILED:
            self._fail(f"rank {rank} could not push its heads' KV; its log says why")
        else:
            self._let_go({rank})

    def lose_others(self) -> None:
        self._fail("a rank of the prefill worker was lost before its heads' KV had arrived")
        self._let_go(frozenset(self._awaited))

    def _fail(self, problem: str) -> None:
        """Only for what is still to be sent: an own share that has ended well says that the decode
        rank has everything.
        """
        self._error = self._error or TransferError(problem, stage="transfer")

    def _let_go(self, ranks: Collection[int]) -> None:
        with self._lock:
            self._awaited -= set(ranks)
            due = [] if self._awaited else self._waiting
            self._waiting = [] if due else self._waiting
        for on_ended, error in due:
            on_ended(error)

    def _own_ended(self, on_ended: OnEnded, error: TransferError | None) -> None:
        with self._lock:
            if self._awaited:
                self._waiting.append((on_ended, error))
                return
        on_ended(error)
