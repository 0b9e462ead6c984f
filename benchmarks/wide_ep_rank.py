"""One rank of the wide-EP benchmark: a real model's steps with a clock at every seam.

Ranks are processes of one machine, so their monotonic clocks are one. The benchmark reaches into
the model to put clocks around attention; the exchange measures itself.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decode.lockstep import RankState, StepRow, decide
from decode.rebalance import ExpertMoves, RebalanceRule
from engine.collectives import ExpertGroup, StepGroup
from engine.experts.exchange import ExchangeChoice, TransportChoice
from engine.experts.meter import ExchangeMeter
from engine.experts.replicas import request_key
from engine.experts.spread import ExpertSpread
from engine.kvcache.storage import KVStorage
from engine.loading import LoadedModel, load
from engine.model_runner import ModelRunner, SequenceStep, batch_from

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
PROMPT_TOKENS = 4
WARM_UP_STEPS = 4
VOCABULARY = 300  # fewer than the tiny model has
COUNTING_ONLY = RebalanceRule(window=10**9, interval=10**9, above=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every rank does; ``rule`` None keeps experts where they are."""

    folder: Path
    batch: int  # sequences of each rank
    steps: int
    redundant: int
    rule: RebalanceRule | None
    transport: TransportChoice = "auto"


@dataclass(slots=True, kw_only=True)
class Step:
    """Seconds; ``arrived`` and ``left`` are when this rank came to and left the row exchange."""

    arrived: float
    left: float
    ended: float
    moving_s: float  # in what all ranks do together to move experts
    parts: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    steps: list[Step]
    sent_bytes: int  # to other ranks, in all steps' MoE layers
    tokens: int
    padded_layers: int
    counted_layers: int
    counts: tuple[tuple[int, ...], ...]  # tokens of this rank by layer and expert
    layers_moved: int
    layers: int  # with experts


@dataclass(slots=True)
class Clock:
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _since: float = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        parts, self.parts = dict(self.parts), defaultdict(float)
        return parts


class TimedAttention:
    def __init__(self, attention: Any, clock: Clock) -> None:
        self._attention = attention
        self._clock = clock

    def __call__(self, *arguments: Any) -> Tensor:
        self._clock.start()
        out: Tensor = self._attention(*arguments)
        self._clock.stop("attention")
        return out


class Rank:
    def __init__(self, step_group: StepGroup, work: Work) -> None:
        self._step_group = step_group
        self._group = step_group.expert_group
        spread = ExpertSpread(redundant=work.redundant, movable=work.rule is not None, counted=True)
        loaded = load(
            work.folder,
            device=CPU,
            dtype="float32",
            numerics="exact",
            group=self._group,
            spread=spread,
            exchange=ExchangeChoice(
                transport=work.transport, max_tokens_per_rank=work.batch * PROMPT_TOKENS
            ),
        )
        self._clock = Clock()
        self._put_clocks(loaded)
        self._meter = loaded.meter
        self._exchanges = 0
        self._count_exchanges(self._group)
        blocks = -(-(PROMPT_TOKENS + work.steps + WARM_UP_STEPS + 1) // BLOCK_TOKENS)
        storage = KVStorage(loaded.layout, blocks * work.batch, device=CPU)
        self._runner = ModelRunner(loaded.model, storage)
        self._tables = [range(blocks * i, blocks * (i + 1)) for i in range(work.batch)]
        generator = torch.Generator().manual_seed(step_group.rank)
        self._texts = torch.randint(
            VOCABULARY, (work.batch, PROMPT_TOKENS), generator=generator
        ).tolist()
        self._done = [0] * work.batch
        self._moves = _moves(loaded, self._group, work.rule or COUNTING_ONLY)
        self._moves.enter_group(step_group.members)
        self._loaded = loaded

    def run(self, steps: int) -> Outcome:
        for _ in range(WARM_UP_STEPS):
            self._turn()
        counts = self._loaded.counts
        assert counts is not None
        self._exchanges = 0
        before = _bytes_of(self._meter)
        taken = [self._turn() for _ in range(steps)]
        layers = len(counts.layers)
        # An exchange of counts comes before the rows where they are not padded.
        counted = self._exchanges - 2 * layers * steps if self._group.world_size > 1 else 0
        report = self._moves.report
        return Outcome(
            steps=taken,
            sent_bytes=_bytes_of(self._meter) - before,
            tokens=steps * len(self._texts),
            padded_layers=layers * steps - counted,
            counted_layers=counted,
            counts=counts.take(),
            layers_moved=0 if report is None else report.placement_epoch,
            layers=layers,
        )

    def _turn(self) -> Step:
        tokens = sum(len(text) for text in self._texts) - sum(self._done)
        rebalancing, placement, started_with = self._moves.row()
        row = StepRow(
            seat=self._step_group.expert_group.seat,
            epoch=self._step_group.epoch,
            state=RankState.SERVING,
            tokens=tokens,
            expecting=False,
            free_blocks=0,
            rebalancing=rebalancing,
            placement=placement,
            started_with=started_with,
        )
        arrived = time.perf_counter()
        rows = self._step_group.exchange(row.to_ints())
        left = time.perf_counter()
        plan = decide(
            [StepRow.from_ints(ints) for ints in rows], least_ranks=self._step_group.world_size
        )
        began = time.perf_counter()
        self._moves.follow(plan.experts, self._step_group)
        moving_s = time.perf_counter() - began
        self._group.begin_step(plan.tokens_of_rank)
        before = _seconds_of(self._meter)
        self._compute()
        self._moves.after_step()
        ended = time.perf_counter()
        parts = {part: now - before[part] for part, now in _seconds_of(self._meter).items()}
        return Step(
            arrived=arrived,
            left=left,
            ended=ended,
            moving_s=moving_s,
            parts=parts | self._clock.take(),
        )

    def _compute(self) -> None:
        steps = [
            SequenceStep(
                token_ids=text[start:], start=start, block_table=table, key=request_key(str(which))
            )
            for which, (text, start, table) in enumerate(
                zip(self._texts, self._done, self._tables, strict=True)
            )
        ]
        logits = self._runner.run(batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU))
        self._done = [len(text) for text in self._texts]
        for text, token in zip(self._texts, logits.argmax(-1).tolist(), strict=True):
            text.append(token)

    def _put_clocks(self, loaded: LoadedModel) -> None:
        model: Any = loaded.model
        model._layers = {
            index: replace(layer, attention=TimedAttention(layer.attention, self._clock))
            for index, layer in model._layers.items()
        }

    def _count_exchanges(self, group: Any) -> None:
        exchange = group.exchange_rows

        def counted(*arguments: Any) -> Any:
            self._exchanges += 1
            return exchange(*arguments)

        group.exchange_rows = counted


def _seconds_of(meter: ExchangeMeter) -> dict[str, float]:
    traffic = meter.traffic()
    return {
        "dispatch": traffic.dispatch_s,
        "experts": traffic.compute_s,
        "combine": traffic.combine_s,
    }


def _bytes_of(meter: ExchangeMeter) -> int:
    traffic = meter.traffic()
    return traffic.dispatch_bytes + traffic.combine_bytes


def run_rank(step_group: StepGroup, work: Work) -> Outcome:
    return Rank(step_group, work).run(work.steps)


def _moves(loaded: LoadedModel, group: ExpertGroup, rule: RebalanceRule) -> ExpertMoves:
    return ExpertMoves(
        exchanges=loaded.model.slot_exchanges,
        placements=dict(enumerate(loaded.placements)),
        counts=loaded.counts,
        seat=group.seat,
        topology=ExpertSpread().topology(group.num_seats),
        mode="global",
        rule=rule,
    )
