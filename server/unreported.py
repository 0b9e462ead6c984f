"""How each worker's load has changed since its last report, as far as this gateway caused it.

A report is up to a heartbeat old when it is used; without this ledger, everything that arrives in
between would be placed on the same worker. Pure; it knows nothing of other gateways.
"""

from collections.abc import Mapping

from protocol.ids import WorkerRef
from server.policies import NO_WORK, Work


class UnreportedWork:
    def __init__(self) -> None:
        self._since_report: dict[WorkerRef, Work] = {}

    @property
    def since_report(self) -> Mapping[WorkerRef, Work]:
        """By worker; negative where more has ended than begun."""
        return self._since_report

    def begun(self, worker: WorkerRef, work: Work) -> None:
        self._shift(worker, work, +1)

    def ended(self, worker: WorkerRef, work: Work) -> None:
        """``work`` was refused or is over. Call it once for each ``begun``."""
        self._shift(worker, work, -1)

    def reported(self, worker: WorkerRef) -> None:
        """A load of ``worker`` has arrived: it speaks for everything before, as well as it can."""
        self._since_report.pop(worker, None)

    def _shift(self, worker: WorkerRef, work: Work, sign: int) -> None:
        before = self._since_report.get(worker, NO_WORK)
        self._since_report[worker] = Work(
            requests=before.requests + sign * work.requests,
            tokens=before.tokens + sign * work.tokens,
            blocks=before.blocks + sign * work.blocks,
        )
