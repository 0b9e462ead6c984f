"""What has changed between two looks at the cluster, in sentences for an operator. Pure.

A worker that has no link yet is not spoken of until it has one, so a start tells each worker once.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from protocol.ids import Incarnation, WorkerId, WorkerRef
from protocol.workers import WorkerState
from server.cluster_view import DecodeGroup, view_of
from server.page.records import Severity

Condition = Literal["linked", "draining", "no link"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Conditions of the members, the lives they are in, and the decode groups' standing."""

    conditions: dict[WorkerId, Condition] = field(default_factory=dict)
    lives: dict[WorkerId, Incarnation] = field(default_factory=dict)
    groups: dict[str, tuple[bool, str]] = field(default_factory=dict)  # serves, in words


def condition_of(state: WorkerState, is_up: Callable[[WorkerRef], bool]) -> Condition:
    if not is_up(state.info.ref):
        return "no link"
    return "draining" if state.load.draining else "linked"


def seen(members: Iterable[WorkerState], is_up: Callable[[WorkerRef], bool]) -> Seen:
    """One look. Of two lives of one worker the later in the list counts."""
    members = tuple(members)
    linked = [state for state in members if is_up(state.info.ref)]
    return Seen(
        conditions={s.info.ref.worker_id: condition_of(s, is_up) for s in members},
        lives={s.info.ref.worker_id: s.info.ref.incarnation for s in members},
        groups={group.group_id: _standing(group) for group in view_of(linked).groups},
    )


def changes(before: Seen, after: Seen) -> Iterator[tuple[Severity, str]]:
    for worker, condition in after.conditions.items():
        known = before.conditions.get(worker)
        if known is not None and before.lives[worker] != after.lives[worker]:
            yield "warning", f"{worker} has been started again"
            known = None
        if condition == "draining" and known != "draining":
            yield "info", f"{worker} drains"
        elif condition == "linked" and known in (None, "no link"):
            yield "info", f"{worker} is there"
        elif condition == "no link" and known in ("linked", "draining"):
            yield "error", f"{worker}: the link to it is lost"
    for worker in before.conditions.keys() - after.conditions.keys():
        drained = before.conditions[worker] == "draining"
        yield ("info" if drained else "warning"), f"{worker} has left"
    for group, (serves, words) in after.groups.items():
        if before.groups.get(group, (False, "")) != (serves, words):
            yield ("info" if serves else "warning"), f"{group} {words}"
    for group in before.groups.keys() - after.groups.keys():
        if before.groups[group][0]:
            yield "error", f"{group} does not serve: none of its ranks is there"


def _standing(group: DecodeGroup) -> tuple[bool, str]:
    if group.serving:
        there = len(group.ranks)
        of_all = f"{there} of {group.world_size}" if group.absent else f"{there}"
        return True, f"serves with {of_all} ranks, epoch {group.epoch}"
    missing = len(group.missing)
    return False, f"does not serve: {missing} of {group.world_size} ranks missing"
