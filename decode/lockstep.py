"""How ranks that share experts agree on every step: one row per rank, one decision for all.

A rank that skips a collective hangs all the others, so no rank decides alone. Before each step
every rank exchanges its ``StepRow`` with all ranks, and each applies ``decide`` to the same rows.
Whatever a rank has to do or to wait for, it makes the same collective calls as the others. How
rows travel and what a step computes is unknown here.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from enum import IntEnum
from typing import Literal

from protocol.errors import ProtocolError

ROW_VERSION = 5
EXPECTING_PACE_S = 0.005
IDLE_PACE_S = 0.05

ExpertStep = Literal["keep", "gather", "share", "commit", "abandon"]


class RankState(IntEnum):
    """``DRAINING`` finishes what it has; ``LEAVING`` has nothing left and waits for the others."""

    SERVING = 0
    DRAINING = 1
    LEAVING = 2


class Rebalancing(IntEnum):
    """How far a rank is with moving experts, one layer at a time.

    ``READY`` has counted a window and can tell what it counted for the next layer. ``PLANNING``
    waits until one rank has found the layer's next placement, and that one is then ``PLANNED``.
    ``STAGING`` reads what the placement brings here, beside its steps. ``STAGED`` could commit
    now; ``FAILED`` could not plan or read.
    """

    OFF = 0
    COUNTING = 1
    READY = 2
    PLANNING = 3
    PLANNED = 4
    STAGING = 5
    STAGED = 6
    FAILED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """What one rank tells the others before a step.

    ``placement`` stands for which experts are in which slots now, as far as this rank knows;
    ``started_with`` for the placement and the settings that it started with.
    """

    seat: int
    epoch: int
    state: RankState
    tokens: int  # that it brings to this step; 0 when it has none to decode
    expecting: bool  # it has granted blocks: tokens may come at any moment
    free_blocks: int
    rebalancing: Rebalancing = Rebalancing.OFF
    placement: int = 0
    started_with: int = 0
    newcomers: bool = False  # somebody waits to join the group
    waited_us: int = 0  # in its last exchange of rows: the last rank to come waits least
    computed_us: int = 0  # in its last step of decoding, waiting for rows of others included
    version: int = ROW_VERSION

    def to_ints(self) -> tuple[int, ...]:
        return tuple(int(value) for value in astuple(self))

    @classmethod
    def from_ints(cls, row: Sequence[int]) -> "StepRow":
        """
        Raises:
            ProtocolError: the row is of another version.
        """
        if len(row) != ROW_WIDTH or row[-1] != ROW_VERSION:
            raise ProtocolError(
                f"a rank sent a step row of another version: {tuple(row)}; all ranks of a decode "
                f"worker must run the same release (row version {ROW_VERSION})"
            )
        seat, epoch, state, tokens, expecting, free_blocks, rebalancing, *rest = row
        placement, started_with, newcomers, waited_us, computed_us, _ = rest
        return cls(
            seat=seat,
            epoch=epoch,
            state=RankState(state),
            tokens=tokens,
            expecting=bool(expecting),
            free_blocks=free_blocks,
            rebalancing=Rebalancing(rebalancing),
            placement=placement,
            started_with=started_with,
            newcomers=bool(newcomers),
            waited_us=waited_us,
            computed_us=computed_us,
        )


ROW_WIDTH = len(fields(StepRow))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What every rank does next.

    ``decode``: all ranks run the model, those without tokens with an empty batch, and
    ``tokens_of_rank`` is what each brings. ``idle``: no rank computes; exchange rows again after
    ``pace_s``, or sooner if work comes. ``stop``: all ranks have left; exchange nothing any more.
    ``restore``: ranks have different placements, because one of them has started again; every rank
    goes back to the placement that it started with, and then rows are exchanged again.
    ``regroup``: the group ends here, and all meet again: with newcomers, and without the seats
    that are ``leaving``, because those who stay have slots for every expert.

    ``experts`` comes before that. ``gather``: all ranks exchange what they counted for the next
    layer, and one of them plans. ``share``: that one tells all ranks its plan, and they begin to
    stage. ``commit``: what is staged takes effect. ``abandon``: it is dropped.
    """

    kind: Literal["decode", "idle", "stop", "restore", "regroup"]
    tokens_of_rank: tuple[int, ...]
    pace_s: float
    draining: bool  # some rank takes no new requests
    free_blocks_of_rank: tuple[int, ...]
    skew_us: int  # between the first and the last rank that came to the last exchange of rows
    leaving: tuple[int, ...]
    computed_us: int  # the slowest rank's last step of decoding
    experts: ExpertStep
    teller: int  # the rank whose placement of experts all take where they differ


def decide(rows: Sequence[StepRow], *, least_ranks: int) -> StepPlan:
    """The plan that follows from the rows, the same on every rank. ``rows`` are in rank order;
    ``least_ranks`` have slots for every expert.

    Raises:
        ProtocolError: the ranks are not of one epoch or did not start alike, or a row contradicts
            itself. Every rank raises it, for they all see the same rows.
    """
    epochs = sorted({row.epoch for row in rows})
    if len(epochs) != 1:
        raise ProtocolError(f"ranks of different epochs met: {epochs}")
    for row in rows:
        if row.tokens < 0 or (row.tokens and row.state is RankState.LEAVING):
            raise ProtocolError(f"seat {row.seat} is {row.state.name} with {row.tokens} tokens")
    _check_start(rows)
    leaving = _who_may_leave(rows, least_ranks)
    kind: Literal["decode", "idle", "stop", "restore", "regroup"]
    if leaving or any(row.newcomers for row in rows):
        kind, pace_s = "regroup", 0.0
    elif len({row.placement for row in rows}) != 1:
        kind, pace_s = "restore", 0.0
    elif any(row.tokens for row in rows):
        kind, pace_s = "decode", 0.0
    elif all(row.state is RankState.LEAVING for row in rows):
        kind, pace_s = "stop", 0.0
    else:
        expecting = any(row.expecting for row in rows)
        kind, pace_s = "idle", EXPECTING_PACE_S if expecting else IDLE_PACE_S
    return StepPlan(
        kind=kind,
        tokens_of_rank=tuple(row.tokens for row in rows),
        pace_s=pace_s,
        draining=any(row.state is not RankState.SERVING for row in rows),
        free_blocks_of_rank=tuple(row.free_blocks for row in rows),
        computed_us=max(row.computed_us for row in rows),
        skew_us=max(row.waited_us for row in rows) - min(row.waited_us for row in rows),
        leaving=leaving,
        teller=_teller(rows),
        experts="keep" if kind in ("stop", "restore", "regroup") else _with_experts(rows),
    )


def _who_may_leave(rows: Sequence[StepRow], least_ranks: int) -> tuple[int, ...]:
    """Seats that have nothing left to do, where those that serve are enough without them."""
    staying = sum(row.state is RankState.SERVING for row in rows)
    if staying < least_ranks:
        return ()
    return tuple(row.seat for row in rows if row.state is RankState.LEAVING)


def _teller(rows: Sequence[StepRow]) -> int:
    """The first of those whose placement most ranks have."""
    placements = [row.placement for row in rows]
    return placements.index(max(placements, key=placements.count))


def _with_experts(rows: Sequence[StepRow]) -> ExpertStep:
    stages = {row.rebalancing for row in rows}
    if Rebalancing.FAILED in stages:
        return "abandon"
    if stages == {Rebalancing.READY}:
        return "gather"
    if Rebalancing.PLANNED in stages:
        return "share"
    if stages == {Rebalancing.STAGED}:
        return "commit"
    return "keep"


def _check_start(rows: Sequence[StepRow]) -> None:
    starts = [row.started_with for row in rows]
    odd = [row.seat for row in rows if row.started_with != starts[0]]
    if odd:
        raise ProtocolError(
            f"ranks {odd} started with another expert placement than rank {rows[0].seat}, or with "
            "another exchange: decode.experts, decode.max_batch and the recorded load must be the "
            "same on all ranks"
        )
