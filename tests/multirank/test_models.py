"""Whole models over real processes: logits on any number of ranks are the bits of one rank."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.collectives import ExpertGroup, StepGroup
from engine.kvcache.storage import KVStorage
from engine.loading import load
from engine.model_runner import ModelRunner, SequenceStep, batch_from
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
PROMPT_LENS = ((19, 3), (), (34,))  # by rank; the second rank is idle throughout
DECODE_STEPS = 3
TOKENS = 300  # fewer than any tiny vocabulary; ranks must not import transformers to know it
pytestmark = pytest.mark.multirank


def prompts_of(rank: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randint(TOKENS, (length,), generator=generator).tolist()
        for length in PROMPT_LENS[rank]
    ]


def greedy_logits(
    folder: Path, split: int, group: ExpertGroup, prompts: list[list[int]], counts: list[list[int]]
) -> list[Tensor]:
    """Logits of the prefill and of greedy decode steps. ``counts``: all ranks' tokens, by step."""
    loaded = load(
        folder,
        device=CPU,
        dtype="float32",
        numerics="exact",
        group=group,
        split_dense_experts=split,
    )
    runner = ModelRunner(loaded.model, KVStorage(loaded.layout, 16, device=CPU))
    texts, done, logits = [list(prompt) for prompt in prompts], [0] * len(prompts), []
    for step_counts in counts:
        group.begin_step(step_counts)
        steps = [
            SequenceStep(
                token_ids=text[start:], start=start, block_table=[4 * which + i for i in range(4)]
            )
            for which, (text, start) in enumerate(zip(texts, done, strict=True))
        ]
        logits.append(runner.run(batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU)))
        done = [len(text) for text in texts]
        for text, token in zip(texts, logits[-1].argmax(-1).tolist(), strict=True):
            text.append(token)
    return logits


def on_one_of_several(step_group: StepGroup, folder: Path, split: int) -> list[Tensor]:
    lens = PROMPT_LENS[: step_group.world_size]
    counts = [[sum(own) for own in lens], *[[len(own) for own in lens]] * DECODE_STEPS]
    group = step_group.expert_group
    return greedy_logits(folder, split, group, prompts_of(group.rank), counts)


def one_alone(step_group: StepGroup, folder: Path, split: int) -> list[list[Tensor]]:
    """What each rank would have computed by itself, by rank."""
    found = []
    for rank, own in enumerate(PROMPT_LENS):
        counts = [[sum(own)], *[[len(own)]] * DECODE_STEPS]
        group = step_group.expert_group
        found.append(greedy_logits(folder, split, group, prompts_of(rank), counts))
    return found


@pytest.mark.parametrize(
    ("kind", "split"),
    [("mixtral", 0), ("deepseek_v3", 0), ("qwen3_moe", 0), ("llama", 8)],
    ids=["mixtral", "deepseek_v3", "qwen3_moe", "llama as 8 experts"],
)
def test_three_ranks_give_the_logits_of_one(
    kind: str, split: int, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tiny_checkpoint(kind)
    together = run_ranks(on_one_of_several, 3, folder, split)
    (alone,) = run_ranks(one_alone, 1, folder, split)
    for steps, steps_alone in zip(together, alone, strict=True):
        for got_RV, wanted_RV in zip(steps, steps_alone, strict=True):
            assert torch.equal(got_RV, wanted_RV)
