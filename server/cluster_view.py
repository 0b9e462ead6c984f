"""Who can serve: the members of the cluster, seen as prefill workers and whole decode groups.

Pure, and a hint: whoever acts on a view that is out of date is corrected by the worker itself. A
decode group counts only when all of its ranks are members and agree on the epoch, because a
rank cannot step alone. Ranks that the group itself goes on without are not waited for, and while
so few are missing that it will go on without them, the others take requests.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from protocol.ids import WorkerRef
from protocol.workers import WorkerState


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """The ranks of one decode worker that are members now, in rank order."""

    group_id: str
    epoch: int
    world_size: int
    absent: tuple[int, ...]
    spare_ranks: int
    ranks: tuple[WorkerState, ...]

    @property
    def complete(self) -> bool:
        return not self.missing

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that the group needs and that are not members."""
        there = {state.info.rank for state in self.ranks}
        return tuple(sorted(set(range(self.world_size)) - set(self.absent) - there))

    @property
    def taking(self) -> tuple[WorkerState, ...]:
        """Ranks that take requests; none where too few are, or will be, left of the group."""
        staying = tuple(state for state in self.ranks if not state.load.draining)
        enough = len(staying) >= self.world_size - self.spare_ranks
        return staying if enough or (self.complete and len(staying) == len(self.ranks)) else ()

    @property
    def serving(self) -> bool:
        """It takes requests, or will as soon as its ranks have met."""
        return bool(self.taking)

    @property
    def refs(self) -> tuple[WorkerRef, ...]:
        return tuple(state.info.ref for state in self.ranks)

    @property
    def model(self) -> str:
        return self.ranks[0].info.model


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A prefill worker and the ranks of a decode group that could serve a request together."""

    model: str
    prefill: WorkerRef
    decode: tuple[WorkerRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """``prefill`` and ``decode`` take new work; ``groups`` are all decode groups, whole or not."""

    prefill: tuple[WorkerState, ...] = ()
    decode: tuple[WorkerState, ...] = ()
    groups: tuple[DecodeGroup, ...] = ()

    def models(self) -> list[str]:
        """Names of all models that some member is there for, whether or not it can be served."""
        models = {state.info.model for state in self.prefill}
        return sorted(models | {group.model for group in self.groups})

    def pairs(self) -> list[Pair]:
        return [
            Pair(model=group.model, prefill=worker.info.ref, decode=group.refs)
            for worker in self.prefill
            for group in self.groups
            if group.serving and group.model == worker.info.model
        ]

    def lack(self, model: str) -> str | None:
        """Why nothing can be served for ``model``, in words for an operator; None if it can."""
        if not any(state.info.model == model for state in self.prefill):
            return "no prefill worker"
        groups = [group for group in self.groups if group.model == model]
        if any(group.serving for group in groups):
            return None
        if not groups:
            return "no decode worker"
        if any(group.complete for group in groups):
            return "no decode worker: draining"
        nearest = max(groups, key=lambda group: len(group.ranks) / group.world_size)
        missing = len(nearest.missing)
        return (
            f"no decode worker: waiting for {missing} of {nearest.world_size} ranks"
            f" of {nearest.group_id}"
        )


def view_of(workers: Iterable[WorkerState]) -> ClusterView:
    """The view of a membership. Who is in a group, its ranks of the latest epoch say."""
    prefill: list[WorkerState] = []
    ranks: dict[str, list[WorkerState]] = {}
    for state in workers:
        info = state.info
        if info.role == "prefill":
            if not state.load.draining:
                prefill.append(state)
        else:
            ranks.setdefault(info.group_id, []).append(state)
    groups = tuple(_group(group_id, members) for group_id, members in sorted(ranks.items()))
    return ClusterView(
        prefill=tuple(prefill),
        decode=tuple(rank for group in groups for rank in group.taking),
        groups=groups,
    )


def _group(group_id: str, members: Iterable[WorkerState]) -> DecodeGroup:
    ranks = list(members)
    latest = max((state.info for state in ranks), key=lambda info: info.epoch)
    return DecodeGroup(
        group_id=group_id,
        epoch=latest.epoch,
        world_size=latest.world_size,
        absent=latest.absent,
        spare_ranks=latest.spare_ranks,
        # Those of an earlier epoch are in it too, and about to say so.
        ranks=tuple(
            sorted(
                (state for state in ranks if state.info.rank not in latest.absent),
                key=lambda state: state.info.rank,
            )
        ),
    )


def keep_missing(
    known: Iterable[WorkerState], reported: Iterable[WorkerState]
) -> tuple[WorkerState, ...]:
    """``reported``, and whoever of ``known`` it lacks.

    A scheduler that has just started knows nobody yet, which does not mean that nobody is there.
    """
    told = tuple(reported)
    ids = {state.info.ref.worker_id for state in told}
    return (*told, *(state for state in known if state.info.ref.worker_id not in ids))
