"""How long a rank stands still between two groups, and why.

An interruption begins with the last turn that passed before a group ended, so noticing a loss is
part of it, and lasts until a turn has passed again, however many groups form and break in between.
It is written to the log and counted; nothing is decided here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.collectives import StepGroup
from engine.experts.meter import ExchangeMeter
from protocol.errors import WorkerLost
from runtime.log import get_log

log = get_log(__name__)


@dataclass(slots=True, kw_only=True)
class _Since:
    reason: str
    members: frozenset[int]  # of the group that ended
    began_at: float
    ended_at: float  # when the group had ended
    met_at: float  # when the ranks met last
    meetings: int = 0


class Interruption:
    """Used by the engine thread."""

    def __init__(
        self, meter: ExchangeMeter, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._meter = meter
        self._clock = clock
        self._since: _Since | None = None
        self._passed_at: float | None = None  # the last turn of the group; None before its first

    def broken(self, group: StepGroup, error: WorkerLost) -> None:
        """``group`` has lost a rank."""
        log.warning("the group has broken", reason=str(error), epoch=group.epoch)
        self._begin(group, str(error))

    def parted(self, group: StepGroup) -> None:
        """``group`` has ended as planned, to meet again with other members."""
        self._begin(group, "ranks come or leave")

    def met(self, group: StepGroup) -> None:
        """The ranks are together again, or for the first time."""
        self._meter.add_group()
        log.info("ranks serve together", epoch=group.epoch, members=group.members, rows=group.rows)
        self._passed_at = None
        if self._since is not None:
            self._since.met_at = self._clock()
            self._since.meetings += 1

    def passed(self, group: StepGroup, what: str) -> None:
        """A turn of ``group`` has passed, in which its ranks did ``what`` was planned."""
        if what == "restore":  # then experts are read, and requests still wait
            return
        now, members = self._clock(), frozenset(group.members)
        self._passed_at = now
        since, self._since = self._since, None
        if since is None:
            return
        self._meter.add_interruption(now - since.began_at)
        log.info(
            "decoding goes on",
            epoch=group.epoch,
            stood_still_s=round(now - since.began_at, 3),
            noticing_s=round(since.ended_at - since.began_at, 3),
            meeting_s=round(since.met_at - since.ended_at, 3),
            meetings=since.meetings,
            without=sorted(since.members - members),
            newly_with=sorted(members - since.members),
            reason=since.reason,
        )

    def _begin(self, group: StepGroup, reason: str) -> None:
        if self._since is None:
            now = self._clock()
            self._since = _Since(
                reason=reason,
                members=frozenset(group.members),
                began_at=now if self._passed_at is None else self._passed_at,
                ended_at=now,
                met_at=now,
            )
