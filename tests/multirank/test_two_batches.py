"""A step as two batches: the same bits, with one half computing while the other's rows travel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.collectives import ExpertGroup, StepGroup
from engine.experts.exchange import ExchangeChoice, TransportChoice
from engine.experts.spread import ExpertSpread
from engine.experts.transport import Arrived, Returned
from engine.kvcache.storage import KVStorage
from engine.loading import LoadedModel, load
from engine.model_runner import ModelRunner, SequenceStep, batch_from
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
SEQUENCES = (5, 0, 1, 2)  # by rank
STEPS = 6
TOKENS = 300  # fewer than any tiny vocabulary
pytestmark = pytest.mark.multirank


def loaded_on(folder: Path, group: ExpertGroup, transport: TransportChoice) -> LoadedModel:
    return load(
        folder,
        device=CPU,
        dtype="float32",
        numerics="exact",
        group=group,
        spread=ExpertSpread(redundant=4),
        exchange=ExchangeChoice(transport=transport, max_tokens_per_rank=8),
    )


def decode(
    runner: ModelRunner, group: ExpertGroup, texts: list[list[int]], in_two: Sequence[bool]
) -> list[Tensor]:
    """Logits of each step; texts of one token each grow greedily."""
    logits = []
    for step, halved in enumerate(in_two):
        group.begin_step(SEQUENCES)
        steps = [
            SequenceStep(token_ids=text[-1:], start=step, block_table=[which], key=which)
            for which, text in enumerate(texts)
        ]
        batch = batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU)
        logits.append(runner.run(batch, in_two=halved))
        assert group.tokens_of_rank == SEQUENCES
        for text, token in zip(texts, logits[-1].argmax(-1).tolist(), strict=True):
            text.append(token)
    return logits


def each_way(
    step_group: StepGroup, folder: Path, transport: TransportChoice
) -> list[tuple[list[list[int]], list[Tensor]]]:
    """As one batch, as two, and now one and now two."""
    group = step_group.expert_group
    found = []
    for in_two in ([False] * STEPS, [True] * STEPS, [True, False, False, True, True, False]):
        loaded = loaded_on(folder, group, transport)
        assert loaded.allows_two_batches
        runner = ModelRunner(loaded.model, KVStorage(loaded.layout, 8, device=CPU))
        generator = torch.Generator().manual_seed(group.rank)
        texts = torch.randint(TOKENS, (SEQUENCES[group.rank], 1), generator=generator).tolist()
        found.append((texts, decode(runner, group, texts, in_two)))
    return found


@pytest.mark.parametrize("transport", ["all_to_all", "padded", "all_gather"])
@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_moe"])
def test_two_batches_change_no_bit(
    kind: str, transport: TransportChoice, tiny_checkpoint: Callable[[str], Path]
) -> None:
    for ways in run_ranks(each_way, len(SEQUENCES), tiny_checkpoint(kind), transport):
        (texts, logits), *others = ways
        for other_texts, other_logits in others:
            assert other_texts == texts
            assert all(map(torch.equal, other_logits, logits))


# -- the order of calls ---------------------------------------------------------------------------


@dataclass
class Diary:
    lines: list[str] = field(default_factory=list)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            self.lines.append(name)
            return call(*arguments)

        return noted


@dataclass
class Noted:
    """A transport, and its dispatches, that write down when they are called."""

    inner: Any
    diary: Diary
    exchange: int = 0

    def send(self, payloads: Sequence[Tensor], slot_TK: Tensor) -> "Noted":
        self.exchange += 1
        self.diary.lines.append(f"send {self.exchange}")
        return Noted(self.inner.send(payloads, slot_TK), self.diary, self.exchange)

    @property
    def sent_bytes(self) -> int:
        sent: int = self.inner.sent_bytes
        return sent

    def receive(self) -> Arrived:
        self.diary.lines.append(f"receive {self.exchange}")
        arrived: Arrived = self.inner.receive()
        return arrived

    def return_each(self, rows_RW: Tensor, place_BK: Tensor) -> None:
        self.diary.lines.append(f"return {self.exchange}")
        self.inner.return_each(rows_RW, place_BK)

    def collect(self) -> Returned:
        self.diary.lines.append(f"collect {self.exchange}")
        returned: Returned = self.inner.collect()
        return returned


def calls_of_a_step(step_group: StepGroup, folder: Path, in_two: bool) -> list[str]:
    group, diary = step_group.expert_group, Diary()
    loaded = loaded_on(folder, group, "padded")
    model: Any = loaded.model
    transport: Noted | None = None
    for layer in model._layers.values():
        experts = getattr(layer.feed_forward, "_experts", None)
        if experts is not None:
            transport = transport or Noted(experts._transport, diary)
            experts._transport = transport
            shared = layer.feed_forward._shared
            shared.partial = diary.around("shared", shared.partial)
    for layer in model._layers.values():
        object.__setattr__(layer, "attention", diary.around("attention", layer.attention))
    runner = ModelRunner(model, KVStorage(loaded.layout, 8, device=CPU))
    decode(runner, group, [[7 + which] for which in range(SEQUENCES[group.rank])], [in_two])
    first = diary.lines.index("send 1")
    return diary.lines[first:]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("deepseek_v3")


def test_the_shared_expert_computes_while_tokens_travel(checkpoint: Path) -> None:
    for lines in run_ranks(calls_of_a_step, len(SEQUENCES), checkpoint, False):
        assert lines[:5] == ["send 1", "shared", "receive 1", "return 1", "collect 1"]


def test_one_half_attends_and_computes_while_the_others_rows_travel(checkpoint: Path) -> None:
    for lines in run_ranks(calls_of_a_step, len(SEQUENCES), checkpoint, True):
        assert lines[:9] == [
            "send 1",
            "shared",
            "attention",
            "send 2",
            "shared",
            "receive 1",
            "return 1",
            "receive 2",
            "return 2",
        ]
        assert lines[9:12] == ["collect 1", "attention", "send 3"]
