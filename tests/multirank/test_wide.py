"""Many experts on many processes, requests that come and go: the bits of one rank."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from engine.collectives import StepGroup
from engine.experts.exchange import ExchangeChoice, TransportChoice
from engine.experts.replicas import request_key
from engine.experts.spread import ExpertSpread
from engine.kvcache.storage import KVStorage
from engine.loading import load
from engine.model_runner import ModelRunner, SequenceStep, batch_from
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
TOKENS = 300  # fewer than any tiny vocabulary
MOST_BLOCKS = 6  # of a request
MOST_TOKENS = 40  # of a rank in a step: three prompts
WIDE_S = 800.0  # 72 processes on two busy cores
pytestmark = pytest.mark.multirank


@dataclass
class Request:
    """Prompts are computed before the first step, as prefill does; then it waits to ``arrive``."""

    name: str
    arrives: int
    text: list[int]
    num_output: int
    done: int = 0
    logits: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def __post_init__(self) -> None:
        self.end = len(self.text) + self.num_output

    def here(self, step: int) -> bool:
        return step == 0 or (step >= self.arrives and len(self.text) < self.end)

    @property
    def answer(self) -> tuple[str, list[int], str]:
        return self.name, self.text, self.logits.hexdigest()


def requests_of(rank: int, num_output: int) -> list[Request]:
    """Every third rank has none, ever; the others one to three of different lengths and times."""
    if rank % 3 == 1:
        return []
    generator = torch.Generator().manual_seed(rank)
    return [
        Request(
            name=f"{rank}/{which}",
            arrives=1 + (rank + 5 * which) % 11,
            text=torch.randint(
                TOKENS, (2 + (7 * rank + which) % 13,), generator=generator
            ).tolist(),
            num_output=num_output,
        )
        for which in range(1 + rank % 3)
    ]


def decode(
    step_group: StepGroup,
    folder: Path,
    requests: Sequence[Request],
    redundant: int,
    transport: TransportChoice,
) -> list[tuple[str, list[int], str]]:
    group = step_group.expert_group
    loaded = load(
        folder,
        device=CPU,
        dtype="float32",
        numerics="exact",
        group=group,
        spread=ExpertSpread(redundant=redundant, ranks_per_tray=4),
        exchange=ExchangeChoice(transport=transport, max_tokens_per_rank=MOST_TOKENS),
    )
    storage = KVStorage(loaded.layout, max(1, MOST_BLOCKS * len(requests)), device=CPU)
    runner = ModelRunner(loaded.model, storage)
    for step in range(10_000):
        present = [(which, request) for which, request in enumerate(requests) if request.here(step)]
        new_tokens = sum(len(request.text) - request.done for _, request in present)
        waiting = any(request.arrives > step for request in requests)
        rows = step_group.exchange([new_tokens, waiting])
        if any(tokens for tokens, _ in rows):
            group.begin_step([tokens for tokens, _ in rows])
            _step(runner, present)
        elif not any(waits for _, waits in rows):
            return [request.answer for request in requests]
    raise AssertionError("the requests do not end")


def _step(runner: ModelRunner, present: Sequence[tuple[int, Request]]) -> None:
    steps = [
        SequenceStep(
            token_ids=request.text[request.done :],
            start=request.done,
            block_table=range(MOST_BLOCKS * which, MOST_BLOCKS * (which + 1)),
            key=request_key(request.name),
        )
        for which, request in present
    ]
    logits_RV = runner.run(batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU))
    for (_, request), row_V in zip(present, logits_RV, strict=True):
        request.logits.update(row_V.numpy().tobytes())
        request.done = len(request.text)
        request.text.append(int(row_V.argmax()))


def on_one_of_many(
    step_group: StepGroup,
    folder: Path,
    num_output: int,
    redundant: int,
    transport: TransportChoice,
) -> list[tuple[str, list[int], str]]:
    requests = requests_of(step_group.rank, num_output)
    return decode(step_group, folder, requests, redundant, transport)


def on_one_rank(
    step_group: StepGroup, folder: Path, num_output: int, ranks: int
) -> list[tuple[str, list[int], str]]:
    requests = [request for rank in range(ranks) for request in requests_of(rank, num_output)]
    return decode(step_group, folder, requests, 0, "auto")


def check(
    folder: Path, ranks: int, num_output: int, redundant: int, transport: TransportChoice
) -> None:
    # First, for it leaves compiled kernels behind that 72 processes would each compile.
    (alone,) = run_ranks(on_one_rank, 1, folder, num_output, ranks)
    of_many = (folder, num_output, redundant, transport)
    together = run_ranks(on_one_of_many, ranks, *of_many, timeout_s=WIDE_S)
    assert [answer for of_rank in together for answer in of_rank] == alone
    assert len({digest for *_, digest in alone}) == len(alone)  # no two requests are alike


@pytest.mark.parametrize(
    ("kind", "redundant", "transport"),
    [
        ("deepseek_v3_256_experts", 32, "all_to_all"),
        ("deepseek_v3_256_experts", 32, "padded"),
        ("qwen3_moe_128_experts", 0, "all_to_all"),
        ("qwen3_moe_128_experts", 0, "all_gather"),
    ],
)
def test_eight_ranks_give_the_bits_of_one(
    kind: str,
    redundant: int,
    transport: TransportChoice,
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    folder = tiny_checkpoint(kind)
    check(folder, ranks=8, num_output=12, redundant=redundant, transport=transport)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["deepseek_v3_256_experts", "qwen3_moe_128_experts"])
def test_72_ranks_give_the_bits_of_one(kind: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint(kind)
    check(folder, ranks=72, num_output=64, redundant=32, transport="all_to_all")
