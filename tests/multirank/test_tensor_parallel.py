"""Ranks that share heads, hidden units and experts of each layer give transformers' logits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.collectives import StepGroup
from engine.kvcache.storage import KVStorage
from engine.layers.linear import Numerics
from engine.loading import load
from engine.model_runner import ModelRunner, SequenceStep, batch_from
from engine.tensor_parallel import TensorGroup
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
BLOCK_TOKENS = 16
LENGTHS = (53, 7, 30)
CHUNK = 32
VOCABULARY = 384  # of the tiny checkpoints; ranks must not import transformers to know it
RTOL, ATOL = 1e-4, 2e-4
pytestmark = pytest.mark.multirank

KINDS = ("llama", "mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v3_direct_queries")
QUICK = (("llama", 4), ("qwen3_moe", 2), ("deepseek_v3", 2))
CASES = [
    pytest.param(kind, ranks, marks=[] if (kind, ranks) in QUICK else [pytest.mark.slow])
    for kind in KINDS
    for ranks in (2, 4)
]


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def chunked_logits(group: StepGroup, folder: Path, numerics: Numerics) -> tuple[int, list[Tensor]]:
    """The width of a rank's cache in heads, and the logits of every token, by sequence."""
    loaded = load(
        folder,
        device=CPU,
        dtype="float32",
        numerics=numerics,
        group=group.expert_group,
        tensor_parallel=True,
        block_tokens=BLOCK_TOKENS,
    )
    runner = ModelRunner(loaded.model, KVStorage(loaded.held, 16, device=CPU))
    texts, found = sequences(), [[] for _ in LENGTHS]  # type: list[list[int]], list[list[Tensor]]
    for start in range(0, max(LENGTHS), CHUNK):
        taking = [which for which, text in enumerate(texts) if start < len(text)]
        steps = [
            SequenceStep(
                token_ids=texts[which][start : start + CHUNK],
                start=start,
                block_table=[4 * which + block for block in range(4)],
                wants_every_row=which != 1,  # the last token's alone: other rows leave early
            )
            for which in taking
        ]
        logits_RV = runner.run(batch_from(steps, block_tokens=BLOCK_TOKENS, device=CPU))
        rows = [
            1 if which == 1 else len(step.token_ids)
            for which, step in zip(taking, steps, strict=True)
        ]
        for which, part_RV in zip(taking, logits_RV.split(rows), strict=True):
            found[which].append(part_RV)
    return loaded.held.kv_heads, [torch.cat(parts) for parts in found]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], list[Tensor]]:
    from transformers import AutoModelForCausalLM

    known: dict[str, list[Tensor]] = {}

    def logits(kind: str) -> list[Tensor]:
        if kind not in known:
            folder = tiny_checkpoint(kind)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            with torch.inference_mode():
                whole = [model(torch.tensor([text])).logits[0] for text in sequences()]
            known[kind] = [whole[0], whole[1][-1:], whole[2]]
        return known[kind]

    return logits


@pytest.mark.parametrize(("kind", "num_ranks"), CASES)
def test_ranks_that_share_the_layers_give_the_reference_logits(
    kind: str,
    num_ranks: int,
    tiny_checkpoint: Callable[[str], Path],
    reference: Callable[[str], list[Tensor]],
) -> None:
    numerics: Numerics = "fast" if num_ranks == 4 and kind != "llama" else "exact"
    found = run_ranks(chunked_logits, num_ranks, tiny_checkpoint(kind), numerics)
    wanted = reference(kind)
    for _, logits in found:
        for got_NV, wanted_NV in zip(logits, wanted, strict=True):
            torch.testing.assert_close(got_NV, wanted_NV, rtol=RTOL, atol=ATOL)
    heads = {held for held, _ in found}
    assert heads == {1}, "tiny models have two KV heads at most"
    for _, logits in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(logits, found[0][1], strict=True))


def sums(group: StepGroup, exact: bool) -> list[Tensor]:
    ranks = TensorGroup(group.expert_group, exact=exact)
    generator = torch.Generator().manual_seed(ranks.rank)
    return [
        ranks.sum(torch.randn(tokens, 24, generator=generator).to(dtype))
        for tokens in (0, 1, 2, 3, 7, 12)
        for dtype in (torch.float32, torch.bfloat16)
    ]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_sum_over_ranks_has_the_same_bits_on_all_of_them(num_ranks: int, exact: bool) -> None:
    first, *others = run_ranks(sums, num_ranks, exact)
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    generators = [torch.Generator().manual_seed(rank) for rank in range(num_ranks)]
    at = 0
    for tokens in (0, 1, 2, 3, 7, 12):
        for dtype in (torch.float32, torch.bfloat16):
            given = [torch.randn(tokens, 24, generator=g).to(dtype) for g in generators]
            wanted = torch.stack(given).double().sum(dim=0)
            loose = 1e-6 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(first[at].double(), wanted, rtol=loose, atol=loose)
            at += 1
