"""Which workers belong to the cluster, and until when: the scheduler's book. Pure.

A worker is a member from its announcement until its lease runs out, it withdraws, or a new life of
it takes its place. All members of one model agree on every part of its fingerprint and on its KV
layout; whoever differs is refused with the differences.
"""

from dataclasses import dataclass
from enum import Enum

import msgspec

from protocol.ids import WorkerId, WorkerRef
from protocol.workers import FingerprintDifference, WorkerInfo, WorkerLoad, WorkerState


class Beat(Enum):
    """What a heartbeat was worth."""

    RENEWED = "renewed"
    UNKNOWN = "unknown"  # the worker must announce itself again
    STALE = "stale"  # from a life of the worker that has been replaced


@dataclass(slots=True)
class _Member:
    info: WorkerInfo
    load: WorkerLoad
    lease_ends: float


class Membership:
    def __init__(self, *, lease_s: float) -> None:
        self._lease_s = lease_s
        self._members: dict[WorkerId, _Member] = {}

    def announce(
        self, info: WorkerInfo, load: WorkerLoad, now: float
    ) -> tuple[FingerprintDifference, ...]:
        """Admit the worker, in place of any earlier life of it, and return nothing; or return
        why not, and change nothing.
        """
        differences = self._differences(info)
        if not differences:
            self._members[info.ref.worker_id] = _Member(info, load, now + self._lease_s)
        return differences

    def heartbeat(self, worker: WorkerRef, load: WorkerLoad, now: float) -> Beat:
        member = self._members.get(worker.worker_id)
        if member is None:
            return Beat.UNKNOWN
        if member.info.ref != worker:
            return Beat.STALE
        member.load = load
        member.lease_ends = now + self._lease_s
        return Beat.RENEWED

    def withdraw(self, worker: WorkerRef) -> bool:
        """Remove the worker; False if this life of it is not a member."""
        member = self._members.get(worker.worker_id)
        if member is None or member.info.ref != worker:
            return False
        del self._members[worker.worker_id]
        return True

    def leave_behind(self, info: WorkerInfo) -> list[WorkerRef]:
        """Remove and return the ranks that the group of ``info`` has gone on without."""
        gone = [
            member.info.ref
            for member in self._members.values()
            if member.info.group_id == info.group_id
            and member.info.rank in info.absent
            and member.info.epoch < info.epoch
        ]
        for ref in gone:
            del self._members[ref.worker_id]
        return gone

    def expire(self, now: float) -> list[WorkerRef]:
        """Remove and return the members whose lease has run out."""
        gone = [m.info.ref for m in self._members.values() if m.lease_ends <= now]
        for ref in gone:
            del self._members[ref.worker_id]
        return gone

    def states(self) -> tuple[WorkerState, ...]:
        return tuple(WorkerState(info=m.info, load=m.load) for m in self._members.values())

    def _differences(self, info: WorkerInfo) -> tuple[FingerprintDifference, ...]:
        """From the longest-standing member of the same model that is not the worker itself."""
        for member in self._members.values():
            other = member.info
            if other.model == info.model and other.ref.worker_id != info.ref.worker_id:
                return _compare(info, other)
        return ()


def _compare(yours: WorkerInfo, ours: WorkerInfo) -> tuple[FingerprintDifference, ...]:
    left, right = _parts(yours), _parts(ours)
    return tuple(
        FingerprintDifference(
            part, left.get(part, "absent"), right.get(part, "absent"), ours.ref.worker_id
        )
        for part in sorted(left.keys() | right.keys())
        if left.get(part) != right.get(part)
    )


def _parts(info: WorkerInfo) -> dict[str, str]:
    layout = msgspec.structs.asdict(info.layout)
    return {**info.fingerprint, **{f"layout.{name}": str(value) for name, value in layout.items()}}
