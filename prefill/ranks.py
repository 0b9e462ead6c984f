"""The other ranks of a prefill worker, seen from the one that leads.

``LeadRank`` keeps them in step: before every step of the engine loop it tells them what it has
opened, ended and scheduled, and hears what they have to report. A prefill worker is one unit of
failure: a rank that is lost ends the group's life, and with it every request that is held, and then
all ranks meet again.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from typing import Final, Protocol

from engine.collectives import StepGroup
from engine.meeting.joining import Meeting
from prefill.joint_push import JointSource
from prefill.lockstep import LinkNews, Orders, Part, Row, Say
from protocol.errors import Cancelled, DeadlineExceeded, WorkerLost
from runtime.log import get_log
from runtime.worker_process import Beat

log = get_log(__name__)

IDLE_PACE_S: Final = 0.5  # a rank that dies without work is noticed so soon
AWAITING_PACE_S: Final = 0.01
LINKS_S: Final = 1.0  # how often the others are asked how their KV travels


class Ranks(Protocol):
    @property
    def together(self) -> bool:
        """All ranks are connected."""
        ...

    @property
    def drain_asked(self) -> bool:
        """Another rank has been told to drain, and so this worker has."""
        ...

    @property
    def pace_s(self) -> float:
        """How long to wait for work at most before the next step."""
        ...

    def meet(self, given_up: Callable[[], bool]) -> bool:
        """Wait for the other ranks; ``given_up`` is asked about once a second. False: they have
        not come, or it was given up.
        """
        ...

    def begin_step(self, parts: Sequence[Part]) -> None:
        """Tell the others what is to be computed, which may be nothing.

        Raises:
            WorkerLost: a rank is gone; call ``lose``.
        """
        ...

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Around what all ranks compute together.

        Raises:
            WorkerLost: it failed, here or elsewhere: the others wait inside, so ``lose`` them.
        """
        ...

    def lose(self) -> None:
        """End this life of the group; harmless where there is none."""
        ...

    def leave(self) -> None:
        """The last request has ended: all ranks end too."""
        ...

    def close(self) -> None: ...


class OneRank:
    """A prefill worker of one process."""

    together = True
    drain_asked = False
    pace_s = IDLE_PACE_S

    def meet(self, given_up: Callable[[], bool]) -> bool:
        return True

    def begin_step(self, parts: Sequence[Part]) -> None:
        pass

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def lose(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def close(self) -> None:
        pass


class LeadRank:
    """Several ranks, of which this is rank 0. ``source`` is the one that the engine loop uses."""

    def __init__(
        self, meeting: Meeting, source: JointSource, *, on_membership: Callable[[], object]
    ) -> None:
        """``on_membership`` is called when ``together`` has changed."""
        self._meeting = meeting
        self._source = source
        self._on_membership = on_membership
        self._group: StepGroup | None = None
        self._links_due = Beat(LINKS_S)
        self.drain_asked = False

    @property
    def together(self) -> bool:
        return self._group is not None

    @property
    def pace_s(self) -> float:
        return AWAITING_PACE_S if self._source.awaits_others else IDLE_PACE_S

    def meet(self, given_up: Callable[[], bool]) -> bool:
        if self._group is not None:
            return True
        try:
            self._group = self._meeting.form(given_up, (), briefly=False)
        except (WorkerLost, DeadlineExceeded, Cancelled) as error:
            log.warning("the prefill ranks are not together", reason=str(error))
            return False
        self._source.enter_group()
        log.info("prefill ranks serve together", epoch=self._group.epoch, rows=self._group.rows)
        self._on_membership()
        return True

    def begin_step(self, parts: Sequence[Part]) -> None:
        group = self._group
        if group is None or self._meeting.newcomers:
            raise WorkerLost("a rank of this prefill worker has been replaced", stage="prefill")
        opened, ended = self._source.take_orders()
        orders = Orders(opened=opened, ended=ended, parts=tuple(parts))
        words = orders.to_words() if orders else []
        with self.computing():
            ask_links = self._source.others_send and self._links_due.due(time.monotonic())
            self._exchange(group, Row(order_words=len(words), ask_links=ask_links))
            if ask_links:
                _, *others = group.begin_gather(LinkNews().to_words(), root=0).wait()
                for told in others:
                    self._source.hear_links(LinkNews.from_words(told))
            if words:
                group.begin_broadcast(words, root=0).wait()

    @contextlib.contextmanager
    def computing(self) -> Generator[None]:
        try:
            yield
        except WorkerLost as error:
            raise WorkerLost(
                f"a rank of the prefill worker is lost: {error}", stage="prefill"
            ) from error
        except Exception as error:
            log.exception("prefill step failed")
            raise WorkerLost(
                f"computing failed: {type(error).__name__}", stage="prefill"
            ) from error

    def lose(self) -> None:
        if self._group is None:
            return
        self._group.close()
        self._group = None
        self._source.leave_group()
        self._on_membership()

    def leave(self) -> None:
        if self._group is None:
            return
        with contextlib.suppress(WorkerLost):
            self._exchange(self._group, Row(say=Say.LEAVING))
        self.lose()

    def close(self) -> None:
        self.lose()
        self._meeting.close()

    def _exchange(self, group: StepGroup, row: Row) -> None:
        rows = group.exchange(row.to_ints())
        for rank, numbers in enumerate(rows[1:], start=1):
            told = Row.from_ints(numbers)
            self.drain_asked = self.drain_asked or told.say == Say.LEAVING
            for report in told.reports:
                self._source.hear(rank, report)
