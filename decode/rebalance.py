"""Moves experts between the ranks' slots while they decode: one rank's part in it.

A window of steps is counted; then, a layer at a time, ranks add up what they counted, compute the
same placement from it, and each reads what that brings to its slots beside its steps. When all
have it, they commit between the same two steps. Every step of this is in the rows
(``decode.lockstep``), so no rank is ever ahead, and a step waits at most for one layer's copy.
Whatever fails, the old placement stays whole. Replicas hold equal bytes: no token changes.

Everything is called on the engine thread; only reading and balancing are beside it.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from decode.lockstep import Rebalancing
from engine.collectives import StepGroup
from engine.experts.balancer import Mode, balance_of, rebalance
from engine.experts.counting import ExpertCounts
from engine.experts.placement import ExpertPlacement, Topology, moves
from engine.experts.slot_exchange import SlotExchange, StagedSlots
from engine.experts.spread import digest
from protocol.workers import ExpertReport
from runtime.log import get_log

log = get_log(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceRule:
    """When to move experts. ``window`` steps are counted at the end of every ``interval``."""

    window: int
    interval: int
    above: float  # a layer whose busiest rank has no more than this times the mean stays


class _Staging:
    """One layer being balanced and read on a thread of its own; ``ended`` is set after the rest.

    Nobody waits for the thread: one that is dropped ends by itself and is never looked at again.
    """

    def __init__(self, layer: int, work: Callable[[], StagedSlots | None]) -> None:
        self.layer = layer
        self.staged: StagedSlots | None = None  # None: the layer stays as it is
        self.error: str | None = None
        self.ended = threading.Event()
        self._work = work
        threading.Thread(target=self._run, name="stage experts", daemon=True).start()

    def _run(self) -> None:
        try:
            self.staged = self._work()
        except Exception as error:  # noqa: BLE001  the engine thread tells all ranks
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.ended.set()


class ExpertMoves:
    """``exchanges`` is empty where experts stay: then windows are only counted and reported."""

    def __init__(
        self,
        *,
        exchanges: Mapping[int, SlotExchange],
        placements: Mapping[int, ExpertPlacement],
        counts: ExpertCounts | None,
        rank: int,
        topology: Topology,
        mode: Mode,
        rule: RebalanceRule,
    ) -> None:
        """``placements`` are those at the start, by layer. ``counts`` is None without routing."""
        self._exchanges = exchanges if counts is not None else {}
        self._initial = dict(placements)
        self._counts = counts
        self._rank = rank
        self._topology = topology
        self._mode: Mode = mode
        self._rule = rule
        self._started_with = digest(self._initial, topology, rule, bool(self._exchanges))
        self._placement = self._started_with
        self._steps = 0  # since the last window ended
        self._counted: int | None = None  # steps of the window so far; None between windows
        self._window: Mapping[int, tuple[int, ...]] = {}
        self._pending: list[int] = []  # layers of this round that are still to be looked at
        self._staging: _Staging | None = None
        self._epoch = 0
        self._migrations = 0
        self._totals: dict[int, list[int]] = {}
        self.report: ExpertReport | None = None  # a new object after each window and each commit
        self._begin_window()

    @property
    def placements(self) -> Mapping[int, ExpertPlacement]:
        moved = {layer: exchange.placement for layer, exchange in self._exchanges.items()}
        return {**self._initial, **moved}

    def row(self) -> tuple[Rebalancing, int, int]:
        """``rebalancing``, ``placement`` and ``started_with`` of this rank's next row."""
        self._settle()
        return self._stage(), self._placement, self._started_with

    def follow(
        self, plan: Literal["keep", "gather", "commit", "abandon"], group: StepGroup
    ) -> None:
        """Do what all ranks do now.

        Raises:
            WorkerLost: a rank failed during the exchange of counts.
        """
        if plan == "gather":
            self._gather(group)
        elif plan == "commit":
            self._commit()
        elif plan == "abandon":
            self._abandon()

    def after_step(self) -> None:
        """All ranks have computed a step."""
        self._steps += 1
        if self._counted is not None:
            self._counted += 1
            if self._counted == self._rule.window:
                self._window = self._take()
                self._steps, self._counted = 0, None
                self._pending = list(self._exchanges)
                self._publish()
        self._begin_window()

    def enter_group(self) -> None:
        """The ranks have met anew: whatever was under way with others is dropped."""
        self._abandon()

    def restore(self) -> None:
        """Go back to the placement of the start; takes as long as reading what has moved.

        Raises:
            ConfigError: an expert cannot be read any more.
        """
        self._abandon()
        for layer, exchange in self._exchanges.items():
            if exchange.placement != self._initial[layer]:
                exchange.commit(exchange.stage(self._initial[layer]))
        self._placement = self._started_with
        log.info("experts are back where they started")

    def _stage(self) -> Rebalancing:
        if not self._exchanges:
            return Rebalancing.OFF
        if self._staging is None:
            return Rebalancing.READY if self._pending else Rebalancing.COUNTING
        if not self._staging.ended.is_set():
            return Rebalancing.STAGING
        return Rebalancing.FAILED if self._staging.error is not None else Rebalancing.STAGED

    def _settle(self) -> None:
        """Go on to the next layer when this one stays as it is: every rank finds the same."""
        staging = self._staging
        if staging is not None and staging.ended.is_set():
            if staging.error is not None:
                log.error("experts could not be read", layer=staging.layer, error=staging.error)
            elif staging.staged is None:
                self._staging = None
                self._pending.pop(0)

    def _gather(self, group: StepGroup) -> None:
        layer = self._pending[0]
        counts = group.exchange(self._window[layer])
        load = [float(sum(tokens)) for tokens in zip(*counts, strict=True)]
        self._staging = _Staging(layer, lambda: self._plan(layer, load))

    def _plan(self, layer: int, load: list[float]) -> StagedSlots | None:
        """Beside the engine thread: what to commit, None if the layer should stay."""
        exchange = self._exchanges[layer]
        current = exchange.placement
        if balance_of(load, current).max_over_mean <= self._rule.above:
            return None
        wanted = rebalance(load, current, self._topology, mode=self._mode)
        return None if moves(current, wanted) == 0 else exchange.stage(wanted)

    def _commit(self) -> None:
        assert self._staging is not None
        assert self._staging.staged is not None
        layer, staged = self._staging.layer, self._staging.staged
        self._exchanges[layer].commit(staged)
        self._placement = digest(self._placement, layer, staged.placement)
        self._epoch += 1
        self._migrations += len(staged.slots)
        self._staging = None
        self._pending.pop(0)
        self._publish()
        log.debug("experts moved", layer=layer, here=len(staged.slots))

    def _abandon(self) -> None:
        self._staging = None
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
            window_tokens=tuple(self._window[layer] for layer in self._totals),
            held=tuple(placements[layer].slots_of(self._rank) for layer in self._totals),
            placement_epoch=self._epoch,
            migrations=self._migrations,
        )
