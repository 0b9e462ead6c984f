"""The engine loop of a prefill rank that does not lead: it computes and pushes what it is told.

It has a cache of its own heads, in which block numbers mean what they mean at the leader, and no
requests, no pool and no bus. Whatever fails here is told in the next row or ends the group's life;
then the leader fails what it holds, and all ranks meet again. It never waits for longer than the
leader may keep it waiting.
"""

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from engine.collectives import StepGroup
from engine.meeting.joining import Meeting
from kvtransfer.interface import KVSource, Push
from prefill.forward import Forward
from prefill.link_teller import LinkTeller
from prefill.lockstep import (
    REPORTS_PER_ROW,
    EndPush,
    LinkNews,
    Orders,
    Part,
    PushOutcome,
    PushReport,
    Row,
    Say,
)
from protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    ProtocolError,
    TransferAborted,
    TransferError,
    WorkerLost,
)
from protocol.ids import AttemptRef
from protocol.kv import Grant
from runtime.log import get_log

log = get_log(__name__)

MakeSource = Callable[[], KVSource]


class FollowerLoop:
    def __init__(
        self,
        forward: Forward,
        meeting: Meeting,
        *,
        make_source: MakeSource | None,
        on_serving: Callable[[], None],
    ) -> None:
        """``make_source`` is called in each life of the group; None where other ranks send all that
        this one has. ``on_serving`` is called when the ranks have first met.
        """
        self._forward = forward
        self._meeting = meeting
        self._make_source = make_source
        self._on_serving = on_serving
        self._served = False
        self._draining = threading.Event()
        self._stopped = threading.Event()

    # From any thread -----------------------------------------------------------------------------

    def drain(self) -> None:
        """Ask the leader to drain, and end when it ends."""
        self._draining.set()

    def stop(self) -> None:
        self._stopped.set()

    # On the engine thread ------------------------------------------------------------------------

    def run(self) -> None:
        """
        Raises:
            ConfigError: this rank does not fit in with the others.
        """
        try:
            while not self._given_up() and not self._serve_one_life():
                pass
        finally:
            self._meeting.close()

    def _given_up(self) -> bool:
        """Without a leader there is nothing to finish."""
        return self._stopped.is_set() or self._draining.is_set()

    def _serve_one_life(self) -> bool:
        """From a meeting to the loss of a rank; True: the leader has said goodbye."""
        try:
            group = self._meeting.form(self._given_up, (), briefly=False)
        except (WorkerLost, DeadlineExceeded, Cancelled) as error:
            log.warning("the prefill ranks are not together", reason=str(error))
            return False
        log.info("prefill ranks serve together", epoch=group.epoch, rows=group.rows)
        if not self._served:
            self._served = True
            self._on_serving()
        shares = Shares(None if self._make_source is None else self._make_source())
        try:
            return self._follow(group, shares)
        except (WorkerLost, ProtocolError) as error:
            log.warning("the prefill ranks have parted", reason=str(error), epoch=group.epoch)
            return self._stopped.is_set()
        finally:
            group.close()
            shares.close()
            self._forward.forget()

    def _follow(self, group: StepGroup, shares: "Shares") -> bool:
        while not self._stopped.is_set():
            say = Say.LEAVING if self._draining.is_set() else Say.SERVING
            row = Row(say=say, reports=shares.take_reports())
            lead = Row.from_ints(group.exchange(row.to_ints())[0])
            if lead.say == Say.LEAVING:
                return True
            if lead.ask_links:
                group.begin_gather(shares.take_links().to_words(), root=0).wait()
            orders = Orders()
            if lead.order_words:
                (words,) = group.begin_broadcast([0] * lead.order_words, root=0).wait()
                orders = Orders.from_words(words)
            self._obey(orders, shares)
        return True

    def _obey(self, orders: Orders, shares: "Shares") -> None:
        for grant in orders.opened:
            shares.open(grant)
        for end in orders.ended:
            shares.end(end)
        if not (orders.parts or self._forward.busy):
            return
        try:
            self._forward.advance(orders.parts, shares.send)
        except WorkerLost:
            raise
        except Exception as error:
            # The other ranks wait for this one inside the layers: only a new group helps.
            log.exception("prefill step failed", requests=len(orders.parts))
            raise WorkerLost(
                f"computing failed: {type(error).__name__}", stage="prefill"
            ) from error


class Shares:
    """This rank's share of each push in one life of the group."""

    def __init__(self, source: KVSource | None) -> None:
        """``source`` None: other ranks send what this one holds too."""
        self._source = source
        self._reports: deque[PushReport] = deque()  # appended to by transport threads too
        self._numbers: dict[AttemptRef, int] = {}
        self._pushes: dict[int, Push] = {}
        self._failed: set[int] = set()
        self._next = 0
        self._links = LinkTeller()

    def open(self, grant: Grant) -> None:
        number, self._next = self._next, self._next + 1
        if self._source is None:
            return
        self._numbers[grant.ref] = number
        try:
            self._pushes[number] = self._source.open(grant)
        except TransferError as error:
            self._fail(number, error)

    def send(self, part: Part, layers: range) -> None:
        number = self._numbers.get(part.ref)
        push = None if number is None else self._pushes.get(number)
        if number is None or push is None or number in self._failed or not part.final_blocks:
            return  # it may have been aborted while the part was on its way through the stages
        try:
            push.send(layers, part.first_block, part.final_blocks)
        except TransferError as error:
            self._fail(number, error)

    def end(self, end: EndPush) -> None:
        """Finish a share, or abort it where the leader says so or it has failed."""
        if self._source is None:
            return
        ended = partial(self._report, end.push, PushOutcome.ENDED)
        push = self._pushes.pop(end.push, None)
        if push is None:
            ended()
        elif end.abort is not None or end.push in self._failed:
            push.abort(end.abort or "a rank's share has failed", ended)
        else:
            push.finish(b"", partial(self._finished, end.push))

    def take_reports(self) -> tuple[PushReport, ...]:
        count = min(len(self._reports), REPORTS_PER_ROW)
        reports = tuple(self._reports.popleft() for _ in range(count))
        for report in reports:
            if report.outcome == PushOutcome.ENDED:
                self._forget(report.push)
        return reports

    def take_links(self) -> LinkNews:
        return LinkNews() if self._source is None else self._links.take(self._source.links())

    def close(self) -> None:
        """Abort whatever is open; nothing of this rank's blocks is read afterwards."""
        if self._source is not None:
            self._source.close()

    def _finished(self, number: int, error: TransferError | None) -> None:
        if error is not None:
            self._report(number, PushOutcome.FAILED)
        self._report(number, PushOutcome.ENDED)

    def _fail(self, number: int, error: TransferError) -> None:
        if isinstance(error, TransferAborted):
            log.info("a push was given up", reason=str(error))
        else:
            log.warning("a share of a push failed", reason=str(error))
        self._failed.add(number)
        self._report(number, PushOutcome.FAILED)

    def _report(self, number: int, outcome: PushOutcome) -> None:
        self._reports.append(PushReport(number, outcome))

    def _forget(self, number: int) -> None:
        self._failed.discard(number)
        for ref, known in list(self._numbers.items()):
            if known == number:
                del self._numbers[ref]
