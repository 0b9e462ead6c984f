"""Experts move between real processes while they decode, and no token changes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from decode.lockstep import RankState, StepPlan, StepRow, decide
from decode.rebalance import ExpertMoves, RebalanceRule
from engine.collectives import ExpertGroup, StepGroup
from engine.experts.placement import ExpertPlacement
from engine.experts.replicas import request_key
from engine.experts.spread import ExpertSpread
from engine.kvcache.storage import KVStorage
from engine.loading import DtypeChoice, LoadedModel, load
from engine.model_runner import ModelRunner, SequenceStep, batch_from
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
TOKENS = 300  # fewer than any tiny vocabulary
STEPS = 24
BUSY_RANKS = (0, 3, 5)  # by rank; the others are idle throughout
EVERY_3_STEPS = RebalanceRule(window=3, interval=3, above=1.0)
pytestmark = pytest.mark.multirank


@dataclass(frozen=True, kw_only=True)
class Outcome:
    tokens: list[list[int]]
    layers_moved: int
    experts_come: int
    layers_at_once: int
    addresses_kept: bool
    unequal_shares: bool  # of some expert's replicas, at some moment
    as_read: bool  # every slot holds its expert's bytes at the end


def prompts_of(rank: int) -> list[list[int]]:
    if rank not in BUSY_RANKS:
        return []
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randint(TOKENS, (length,), generator=generator).tolist()
        for length in (3, 11)[: 1 + rank % 2]
    ]


def loaded_on(
    folder: Path, group: ExpertGroup, *, movable: bool, dtype: DtypeChoice = "float32"
) -> LoadedModel:
    return load(
        folder,
        device=CPU,
        dtype=dtype,
        numerics="exact",
        group=group,
        spread=ExpertSpread(redundant=6, movable=movable, counted=True),
    )


def moves_of(loaded: LoadedModel, group: ExpertGroup, rule: RebalanceRule) -> ExpertMoves:
    return ExpertMoves(
        exchanges=loaded.model.slot_exchanges,
        placements=dict(enumerate(loaded.placements)),
        counts=loaded.counts,
        seat=group.seat,
        topology=ExpertSpread().topology(group.num_seats),
        mode="global",
        rule=rule,
    )


class Rank:
    """A rank's turns as ``decode.loop`` takes them, with a batch that never changes."""

    def __init__(self, step_group: StepGroup, folder: Path, dtype: DtypeChoice = "float32") -> None:
        self.group = step_group
        loaded = loaded_on(folder, step_group.expert_group, movable=True, dtype=dtype)
        self.runner = ModelRunner(loaded.model, KVStorage(loaded.layout, 8, device=CPU))
        self.exchanges = loaded.model.slot_exchanges
        self.experts = moves_of(loaded, step_group.expert_group, EVERY_3_STEPS)
        self.experts.enter_group(step_group.members)
        self.texts = prompts_of(step_group.rank)
        self.done = [0] * len(self.texts)

    def turn(self, new_tokens: int) -> StepPlan:
        rebalancing, placement, started_with = self.experts.row()
        row = StepRow(
            seat=self.group.expert_group.seat,
            epoch=self.group.epoch,
            state=RankState.SERVING,
            tokens=new_tokens,
            expecting=False,
            free_blocks=0,
            rebalancing=rebalancing,
            placement=placement,
            started_with=started_with,
        )
        rows = [StepRow.from_ints(ints) for ints in self.group.exchange(row.to_ints())]
        plan = decide(rows, least_ranks=self.group.world_size)
        self.experts.follow(plan.experts, self.group)
        if plan.kind == "decode":
            self.group.expert_group.begin_step(plan.tokens_of_rank)
            self.decode()
            self.experts.after_step()
        elif plan.kind == "restore":
            self.experts.restore(self.group, plan.teller)
        return plan

    def decode(self) -> None:
        steps = [
            SequenceStep(
                token_ids=text[start:],
                start=start,
                block_table=[3 * which + i for i in range(3)],
                key=request_key(f"{self.group.rank}/{which}"),
            )
            for which, (text, start) in enumerate(zip(self.texts, self.done, strict=True))
        ]
        logits = self.runner.run(batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU))
        self.done = [len(text) for text in self.texts]
        for text, token in zip(self.texts, logits.argmax(-1).tolist(), strict=True):
            text.append(token)

    @property
    def new_tokens(self) -> int:
        return sum(map(len, self.texts)) - sum(self.done)

    def busy_beside(self) -> bool:
        """Whether a rank still plans or reads, so that a turn now would change nothing."""
        beside = self.experts._staging or self.experts._planning
        busy = beside is not None and not beside.ended.is_set()
        return any(busy for (busy,) in self.group.exchange([busy]))

    def decode_all(self) -> Outcome:
        addresses = self.addresses()
        layers_at_once, unequal_shares = 0, False
        for _ in range(STEPS):
            before = self.placements()
            self.turn(self.new_tokens)
            after = self.placements()
            changed = sum(after[layer] != before[layer] for layer in after)
            layers_at_once = max(layers_at_once, changed)
            unequal_shares |= any(map(has_unequal_shares, after.values()))
            while self.busy_beside():
                pass  # so that what is begun is known to be committed within the test
        assert self.experts.report is not None
        return Outcome(
            tokens=self.texts,
            layers_moved=self.experts.report.placement_epoch,
            experts_come=self.experts.report.migrations,
            layers_at_once=layers_at_once,
            addresses_kept=self.addresses() == addresses,
            unequal_shares=unequal_shares,
            as_read=self.slots_are_right(),
        )

    def placements(self) -> dict[int, ExpertPlacement]:
        return {layer: exchange.placement for layer, exchange in self.exchanges.items()}

    def addresses(self) -> list[int]:
        weights = [exchange.weights for exchange in self.exchanges.values()]
        return [tensor.data_ptr() for of in weights for tensor in (of.gate_up, of.down)]

    def slots_are_right(self) -> bool:
        rank = self.group.rank
        return all(
            torch.equal(exchange.weights.gate_up[slot], gate_up)
            and torch.equal(exchange.weights.down[slot], down)
            for exchange in self.exchanges.values()
            for slot, expert in enumerate(exchange.placement.slots_of(rank))
            if expert >= 0
            for gate_up, down in [exchange.read(expert)]
        )


def has_unequal_shares(placement: ExpertPlacement) -> bool:
    evenly = ExpertPlacement(placement.num_experts, placement.slots)
    return placement.shares != evenly.shares


def decode_moving(step_group: StepGroup, folder: Path, dtype: DtypeChoice) -> Outcome:
    return Rank(step_group, folder, dtype).decode_all()


def decode_alone(
    step_group: StepGroup, folder: Path, ranks: int, dtype: DtypeChoice
) -> list[list[list[int]]]:
    """What each rank would have generated by itself, without replicas."""
    found = []
    for rank in range(ranks):
        group = step_group.expert_group
        loaded = loaded_on(folder, group, movable=False, dtype=dtype)
        runner = ModelRunner(loaded.model, KVStorage(loaded.layout, 8, device=CPU))
        texts = prompts_of(rank)
        done = [0] * len(texts)
        for _ in range(STEPS if texts else 0):
            steps = [
                SequenceStep(
                    token_ids=text[start:], start=start, block_table=[3 * i, 3 * i + 1, 3 * i + 2]
                )
                for i, (text, start) in enumerate(zip(texts, done, strict=True))
            ]
            logits = runner.run(batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU))
            done = [len(text) for text in texts]
            for text, token in zip(texts, logits.argmax(-1).tolist(), strict=True):
                text.append(token)
        found.append(texts)
    return found


@pytest.mark.parametrize(("world_size", "dtype"), [(4, "bfloat16"), (8, "float32")])
def test_rebalancing_every_three_steps_changes_no_token(
    world_size: int, dtype: DtypeChoice, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tiny_checkpoint("deepseek_v3")

    outcomes: list[Outcome] = run_ranks(decode_moving, world_size, folder, dtype)

    (alone,) = run_ranks(decode_alone, 1, folder, world_size, dtype)
    assert [outcome.tokens for outcome in outcomes] == alone
    assert all(outcome.addresses_kept and outcome.as_read for outcome in outcomes)
    assert all(outcome.unequal_shares for outcome in outcomes)
    assert {outcome.layers_moved for outcome in outcomes} == {outcomes[0].layers_moved}
    assert outcomes[0].layers_moved >= 4
    assert max(outcome.layers_at_once for outcome in outcomes) == 1
    assert sum(outcome.experts_come for outcome in outcomes) >= outcomes[0].layers_moved


def break_and_restore(step_group: StepGroup, folder: Path) -> tuple[str, list[bool]]:
    """Rank 1 starts again when experts have moved; it knows nothing of that."""
    rank = Rank(step_group, folder)
    initial = rank.placements()
    while rank.placements() == initial:
        room = all(len(text) < 40 for text in rank.texts)
        rank.turn(rank.new_tokens if room else 0)
    moved = rank.placements()
    if step_group.rank == 1:
        rank = Rank(step_group, folder)
    rank.experts.enter_group(step_group.members)
    kind = rank.turn(0).kind
    return kind, [rank.placements() == moved, rank.slots_are_right(), rank.turn(0).kind == "idle"]


def test_a_rank_that_started_again_is_told_where_experts_are(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    found = run_ranks(break_and_restore, 3, tiny_checkpoint("deepseek_v3"))
    assert found == [("restore", [True, True, True])] * 3


def start_differently(step_group: StepGroup, folder: Path) -> str:
    rank = Rank(step_group, folder)
    if step_group.rank == 1:
        loaded = loaded_on(folder, step_group.expert_group, movable=True)
        other = RebalanceRule(window=2, interval=3, above=1.0)
        rank.experts = moves_of(loaded, step_group.expert_group, other)
    try:
        rank.turn(0)
    except Exception as error:  # noqa: BLE001  its text is the result
        return str(error)
    return "agreed"


def test_ranks_with_other_settings_are_told_on_every_rank(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    found = run_ranks(start_differently, 3, tiny_checkpoint("deepseek_v3"))
    assert all("ranks [1] started with another expert placement" in text for text in found), found
