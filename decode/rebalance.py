"""Moves experts between the seats' slots while they decode: one seat's part in it.

A window of steps is counted; then, a layer at a time, ranks add up what they counted, one of them
finds a better placement, and each reads what that brings to its slots, all beside their steps.
When all have it, they commit between the same two steps. Every step of this is in the rows
(``decode.lockstep``), so no rank is ever ahead. What ranks tell one another travels beside the step
in which it is sent and is heard after it, so a step waits at most for one layer's copy. Whatever
fails, the old placement stays whole. Replicas hold equal bytes: no token changes.

When seats are lost, those that are left take over their experts before the next step
(``engine.experts.cover``), and experts move among them. When a seat is taken again, whoever takes
it is told where experts are now, and gets some with the next round; where experts do not move, all
go back to where they started.

Everything is called on the engine thread; only planning and reading are beside it.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

from decode.lockstep import ExpertStep, Rebalancing
from engine.collectives import PendingLines, StepGroup
from engine.experts.balancer import Mode, balance_of, leaves_idle, rebalance
from engine.experts.counting import ExpertCounts
from engine.experts.cover import cover, with_absent, without_absent
from engine.experts.placement import ExpertPlacement, Topology
from engine.experts.slot_exchange import SlotExchange, StagedSlots
from engine.experts.spread import digest
from protocol.workers import ExpertReport
from runtime.log import get_log

log = get_log(__name__)

T = TypeVar("T")
# The planner gives way this long after each stretch of work this long: the engine thread gives
# Python's lock up with every operation, and would else wait for it each time.
BREATH_S = 0.002
STRETCH_S = 0.00025


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceRule:
    """When to move experts. ``window`` steps are counted at the end of every ``interval``."""

    window: int
    interval: int
    above: float  # a layer whose busiest rank has no more than this times the mean stays
    moves: bool = True  # False: windows are only counted and reported


class _Beside(Generic[T]):
    """Work on a thread of its own; ``ended`` is set after ``result`` or ``error``.

    Nobody waits for the thread: one that is dropped ends by itself and is never looked at again.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self.result: T | None = None
        self.error: str | None = None
        self.ended = threading.Event()
        self._work = work
        threading.Thread(target=self._run, name="move experts", daemon=True).start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:  # noqa: BLE001  the engine thread tells all ranks
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.ended.set()


class ExpertMoves:
    """``exchanges`` is empty where experts stay for ever."""

    def __init__(
        self,
        *,
        exchanges: Mapping[int, SlotExchange],
        placements: Mapping[int, ExpertPlacement],
        counts: ExpertCounts | None,
        seat: int,
        topology: Topology,
        mode: Mode,
        rule: RebalanceRule,
        alike: object = None,
    ) -> None:
        """``placements`` are those at the start, by layer. ``counts`` is None without routing.
        ``alike``: what else all ranks must have started with, a plain value or a dataclass.
        """
        self._exchanges = exchanges
        self._initial = dict(placements)
        self._counts = counts
        self._seat = seat
        self._members = tuple(range(topology.num_ranks))
        self._topology = topology
        self._mode: Mode = mode
        self._rule = rule
        self._moves = rule.moves and counts is not None and bool(exchanges)
        self._started_with = digest(self._initial, topology, rule, bool(exchanges), alike)
        self._placement = digest(self.placements)
        self._steps = 0  # since the last window ended
        self._counted: int | None = None  # steps of the window so far; None between windows
        self._window: Mapping[int, tuple[int, ...]] = {}
        self._pending: list[int] = []  # layers of this round that are still to be looked at
        self._waiting_for_plan = False
        self._counts_coming: PendingLines | None = None
        self._plan_coming: PendingLines | None = None
        self._planning: _Beside[ExpertPlacement] | None = None  # on one rank
        self._staging: _Beside[StagedSlots] | None = None
        self._epoch = 0
        self._migrations = 0
        self._totals: dict[int, list[int]] = {}
        self.report: ExpertReport | None = None  # a new object after each window and each commit
        self._begin_window()

    @property
    def placements(self) -> Mapping[int, ExpertPlacement]:
        moved = {layer: exchange.placement for layer, exchange in self._exchanges.items()}
        return {**self._initial, **moved}

    @property
    def started_with(self) -> int:
        """Stands for the first placement and the rule."""
        return self._started_with

    def row(self) -> tuple[Rebalancing, int, int]:
        """``rebalancing``, ``placement`` and ``started_with`` of this rank's next row."""
        return self._stage(), self._placement, self._started_with

    def follow(self, plan: ExpertStep, group: StepGroup) -> None:
        """Do what all ranks do now.

        Raises:
            WorkerLost: a rank failed during the exchange of counts or of the plan.
        """
        self._hear()
        if plan == "gather":
            self._gather(group)
        elif plan == "share":
            self._share(group)
        elif plan == "commit":
            self._commit()
        elif plan == "abandon":
            log.error("experts stay: a rank could not plan or read", reason=self._failure())
            self._abandon()

    def after_step(self) -> None:
        """All ranks have computed a step.

        Raises:
            WorkerLost: as ``follow``.
        """
        self._hear()
        self._steps += 1
        if self._counted is not None:
            self._counted += 1
            if self._counted == self._rule.window:
                self._window = self._take()
                self._steps, self._counted = 0, None
                if self._moves:
                    self._pending = list(self._exchanges)
                self._publish()
        self._begin_window()

    def enter_group(self, members: Sequence[int]) -> None:
        """The ranks have met anew: whatever was under way with others is dropped, and ``members``
        take over what absent seats held. Takes as long as reading that.

        Raises:
            ConfigError: an expert cannot be read any more.
        """
        self._abandon()
        self._members = tuple(members)
        self._take_over(self.placements)

    def restore(self, group: StepGroup, teller: int) -> None:
        """Ranks' placements differ: take the one that rank ``teller`` has, or that of the start
        where experts do not move. Takes as long as reading what that brings here.

        Raises:
            ConfigError: an expert cannot be read any more.
            WorkerLost: a rank failed.
        """
        self._abandon()
        if not self._moves:
            self._take_over(self._initial)
            log.info("experts are back where they started")
            return
        mine = chain.from_iterable(_line_of(each.placement) for each in self._exchanges.values())
        (told,) = group.begin_broadcast(tuple(mine), root=teller).wait()
        width = len(told) // len(self._exchanges)
        placements = {
            layer: _placement_of(told[index * width : (index + 1) * width], exchange.placement)
            for index, (layer, exchange) in enumerate(self._exchanges.items())
        }
        self._take_over(placements)
        log.info("experts are where another rank says", rank=teller)

    def _take_over(self, placements: Mapping[int, ExpertPlacement]) -> None:
        """Hold what follows from ``placements`` for the members that are there."""
        began, read, before = time.monotonic(), 0, self._placement
        for layer, exchange in self._exchanges.items():
            staged = exchange.stage(cover(placements[layer], self._members))
            exchange.commit(staged)
            read += len(staged.slots)
        self._placement = digest(self.placements)
        if any(
            leaves_idle(self._among_members(each.placement)) for each in self._exchanges.values()
        ):
            self._steps = self._rule.interval  # whoever holds nothing need not wait for long
            self._begin_window()
        if self._placement != before:
            self._epoch += 1
            self._migrations += read
            self._publish()
        if read:
            seconds = round(time.monotonic() - began, 3)
            log.info("experts were taken over", experts=read, members=self._members, s=seconds)

    def _among_members(self, placement: ExpertPlacement) -> ExpertPlacement:
        return without_absent(placement, self._members)

    def _stage(self) -> Rebalancing:
        if not self._moves:
            return Rebalancing.OFF
        if self._staging is not None:
            return _stage_of(self._staging, Rebalancing.STAGING, Rebalancing.STAGED)
        if self._planning is not None:
            return _stage_of(self._planning, Rebalancing.PLANNING, Rebalancing.PLANNED)
        if self._waiting_for_plan:
            return Rebalancing.PLANNING
        return Rebalancing.READY if self._pending else Rebalancing.COUNTING

    def _gather(self, group: StepGroup) -> None:
        layer = self._pending[0]
        self._counts_coming = group.begin_gather(self._window[layer], root=self._planner(layer))
        self._waiting_for_plan = True

    def _hear(self) -> None:
        """What ranks told one another while they computed the last step."""
        if self._counts_coming is not None:
            counts, self._counts_coming = self._counts_coming.wait(), None
            layer = self._pending[0]
            if self._members[self._planner(layer)] == self._seat:
                load = [float(sum(tokens)) for tokens in zip(*counts, strict=True)]
                current = self._exchanges[layer].placement
                self._planning = _Beside(lambda: self._plan(load, current))
        if self._plan_coming is not None:
            (told,), self._plan_coming = self._plan_coming.wait(), None
            self._begin_staging(told)

    def _plan(self, load: list[float], current: ExpertPlacement) -> ExpertPlacement:
        """Among the members: a group that meets anew drops what is being planned."""
        members = self._members
        here = without_absent(current, members)
        even = balance_of(load, here).max_over_mean <= self._rule.above
        if even and not leaves_idle(here):
            return current
        topology = self._topology.among(members)
        wanted = rebalance(load, here, topology, mode=self._mode, pause=_breathing())
        return with_absent(wanted, members, current.num_ranks)

    def _planner(self, layer: int) -> int:
        """The rank that plans it: not always the same one."""
        return list(self._exchanges).index(layer) % len(self._members)

    def _share(self, group: StepGroup) -> None:
        layer, planning = self._pending[0], self._planning
        current = self._exchanges[layer].placement
        mine = current if planning is None or planning.result is None else planning.result
        self._plan_coming = group.begin_broadcast(_line_of(mine), root=self._planner(layer))
        self._planning = None

    def _begin_staging(self, told: Sequence[int]) -> None:
        exchange = self._exchanges[self._pending[0]]
        current = exchange.placement
        wanted = _placement_of(told, current)
        self._waiting_for_plan = False
        if wanted == current:
            self._pending.pop(0)
        elif wanted.slots == current.slots:
            # All ranks hear it between the same two steps, and only shares change: nobody reads.
            self._put(exchange.stage(wanted))
        else:
            self._staging = _Beside(lambda: exchange.stage(wanted))

    def _commit(self) -> None:
        assert self._staging is not None
        assert self._staging.result is not None
        self._put(self._staging.result)
        self._staging = None

    def _put(self, staged: StagedSlots) -> None:
        layer = self._pending.pop(0)
        self._exchanges[layer].commit(staged)
        self._placement = digest(self._placement, layer, staged.placement)
        self._epoch += 1
        self._migrations += len(staged.slots)
        self._publish()
        log.debug("experts moved", layer=layer, here=len(staged.slots))

    def _failure(self) -> str:
        for beside in (self._planning, self._staging):
            if beside is not None and beside.error is not None:
                return beside.error
        return "another rank's"

    def _abandon(self) -> None:
        self._waiting_for_plan, self._planning, self._staging = False, None, None
        self._counts_coming, self._plan_coming = None, None
        self._pending = []
        self._steps, self._counted = 0, None
        self._begin_window()

    def _begin_window(self) -> None:
        due = self._steps >= self._rule.interval - self._rule.window
        if due and self._counts is not None and self._counted is None and not self._pending:
            self._take()  # what came before the window is not part of it
            self._counted = 0

    def _take(self) -> Mapping[int, tuple[int, ...]]:
        assert self._counts is not None
        taken = dict(zip(self._counts.layers, self._counts.take(), strict=True))
        for layer, tokens in taken.items():
            known = self._totals.get(layer, [0] * len(tokens))
            self._totals[layer] = [old + new for old, new in zip(known, tokens, strict=True)]
        return taken

    def _publish(self) -> None:
        placements = self.placements
        self.report = ExpertReport(
            layers=tuple(self._totals),
            tokens=tuple(map(tuple, self._totals.values())),
            window_tokens=tuple(
                self._window.get(layer, (0,) * len(tokens))
                for layer, tokens in self._totals.items()
            ),
            held=tuple(placements[layer].slots_of(self._seat) for layer in self._totals),
            shares=tuple(placements[layer].shares_of(self._seat) for layer in self._totals),
            placement_epoch=self._epoch,
            migrations=self._migrations,
        )


def _line_of(placement: ExpertPlacement) -> tuple[int, ...]:
    return tuple(chain(*placement.slots, *placement.shares))


def _placement_of(line: Sequence[int], like: ExpertPlacement) -> ExpertPlacement:
    """What ``_line_of`` made of a placement of the same shape."""
    per_rank = like.slots_per_rank
    rows = [tuple(line[first : first + per_rank]) for first in range(0, len(line), per_rank)]
    return ExpertPlacement(
        like.num_experts, tuple(rows[: like.num_ranks]), tuple(rows[like.num_ranks :])
    )


def _breathing() -> Callable[[], None]:
    rested = time.monotonic()

    def pause() -> None:
        nonlocal rested
        if time.monotonic() - rested > STRETCH_S:
            time.sleep(BREATH_S)
            rested = time.monotonic()

    return pause


def _stage_of(beside: _Beside[T], running: Rebalancing, ended: Rebalancing) -> Rebalancing:
    if not beside.ended.is_set():
        return running
    return ended if beside.error is None else Rebalancing.FAILED
