"""Kernels of prefill attention against the same attention in PyTorch operations."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.attention.gqa import gqa_attention
from engine.batch import ForwardBatch
from engine.cpu import vectors
from engine.cpu.causal_attention import RUN, Shape
from engine.cpu.grouped_attention import HeadNorms
from engine.cpu.grouped_prefill import grouped_prefill, serves
from engine.kvcache.storage import KVStorage, LayerCache
from engine.layers.norm import rms_norm
from engine.layers.rope import Rotation
from tests.support.paged import a_batch, block_tables, gqa_layout

pytestmark = pytest.mark.skipif(
    not vectors.has_bf16_dot(), reason="needs a CPU with AVX512-BF16, whose instruction it is"
)

CPU = torch.device("cpu")
SHAPES = [(9, 3, 64, False), (8, 8, 32, False), (32, 4, 128, True), (14, 2, 64, True)]


@dataclass
class Prompts:
    """Tokens of some sequences, to be attended to in chunks, in any batches and on any cache."""

    lengths: list[int]
    heads: int = 9
    kv_heads: int = 3
    width: int = 64
    normed: bool = False
    block_tokens: int = 16

    def __post_init__(self) -> None:
        torch.manual_seed(5)
        self.layout = gqa_layout(
            "bfloat16",
            block_tokens=self.block_tokens,
            kv_heads=self.kv_heads,
            key_width=self.width,
        )
        self.num_blocks = 3 + sum(self.layout.blocks_for(length) for length in self.lengths)
        self.tables = block_tables(self.lengths, self.block_tokens, self.num_blocks)
        rows = self.heads + 2 * self.kv_heads
        self.qkv = [torch.randn(length, rows, self.width).bfloat16() for length in self.lengths]
        angles = torch.randn(max(self.lengths), 1, self.width // 2)
        cos, sin = angles.cos(), angles.sin()
        self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        query, key = torch.rand(2, self.width).bfloat16()
        self.norms = HeadNorms(query, key, 1e-6) if self.normed else None

    def a_cache(self) -> LayerCache:
        return KVStorage(self.layout, self.num_blocks, device=CPU).layer(1)

    def step(self, chunks: dict[int, slice]) -> tuple[ForwardBatch, Tensor, Rotation]:
        """These tokens of these sequences: the batch, its rows and their rotation."""
        spans = list(chunks.values())
        rows = torch.cat([self.qkv[row][span] for row, span in chunks.items()])
        cos, sin = (
            torch.cat([table[span] for span in spans]).bfloat16() for table in (self.cos, self.sin)
        )
        lengths = [span.stop - span.start for span in spans]
        contexts = [span.stop for span in spans]
        batch = a_batch(self.tables[list(chunks)], lengths, contexts, self.block_tokens)
        return batch, rows, Rotation(cos, sin)

    def by_kernel(self, cache: LayerCache, chunks: dict[int, slice]) -> list[Tensor]:
        """Each sequence's result."""
        batch, qkv, rotation = self.step(chunks)
        out = grouped_prefill(qkv, rotation, cache, batch, scale=0.2, norms=self.norms)
        return list(out.split(list(batch.query_lens)))

    def by_operations(self, cache: LayerCache, chunks: dict[int, slice]) -> list[Tensor]:
        batch, qkv, rotation = self.step(chunks)
        keys = self.heads + self.kv_heads
        q, k, v = qkv[:, : self.heads], qkv[:, self.heads : keys], qkv[:, keys:]
        if self.norms:
            q = rms_norm(q, self.norms.query_W, self.norms.epsilon)
            k = rms_norm(k, self.norms.key_W, self.norms.epsilon)
        q, k = rotation.apply(q), rotation.apply(k)
        out = gqa_attention(q, k, v, cache=cache, batch=batch, scale=0.2)
        return list(out.split(list(batch.query_lens)))


@pytest.mark.parametrize(("heads", "kv_heads", "width", "normed"), SHAPES)
@pytest.mark.parametrize("block_tokens", [16, 24])
def test_chunks_of_any_length_agree_with_operations(
    heads: int, kv_heads: int, width: int, normed: bool, block_tokens: int
) -> None:
    case = Prompts([2 * RUN + 70, 33, 1], heads, kv_heads, width, normed, block_tokens)
    mine, theirs = case.a_cache(), case.a_cache()
    assert serves(mine)
    for chunks in (
        {0: slice(0, RUN - 3), 2: slice(0, 1)},
        {1: slice(0, 31), 0: slice(RUN - 3, RUN + 40)},
        {0: slice(RUN + 40, 2 * RUN + 70), 1: slice(31, 33)},
    ):
        for got, want in zip(
            case.by_kernel(mine, chunks), case.by_operations(theirs, chunks), strict=True
        ):
            torch.testing.assert_close(got, want, atol=4e-2, rtol=1e-5)
    torch.testing.assert_close(mine.token_rows, theirs.token_rows, atol=4e-2, rtol=1e-5)


def test_a_prompt_has_the_same_bits_in_any_chunks_and_among_others() -> None:
    length = 2 * RUN + 70
    case = Prompts([length, 300, 45])
    whole = case.a_cache()
    (want,) = case.by_kernel(whole, {0: slice(0, length)})
    for borders in ([0, 1, 2, length], [0, 97, RUN, RUN + 1, length], [*range(0, length, 150)]):
        cache, parts = case.a_cache(), []
        for start, end in zip(borders, [*borders[1:], length], strict=True):
            if start < end:
                others = {1: slice(0, 1 + start % 300), 2: slice(0, 45)}
                parts.append(case.by_kernel(cache, {**others, 0: slice(start, end)})[2])
        assert torch.equal(torch.cat(parts), want)
        owned = case.tables[0].repeat_interleave(2 * case.kv_heads) * 2 * case.kv_heads
        owned += torch.arange(2 * case.kv_heads).repeat(case.tables.shape[1])
        assert torch.equal(cache.block_rows[owned], whole.block_rows[owned])


def test_heads_apart_on_ranks_have_the_bits_of_heads_together() -> None:
    case = Prompts([RUN + 9])
    (want,) = case.by_kernel(case.a_cache(), {0: slice(0, RUN + 9)})
    alone = Prompts([RUN + 9], heads=3, kv_heads=1)
    alone.cos, alone.sin = case.cos, case.sin
    for head in range(3):
        rows = [*range(3 * head, 3 * head + 3), 9 + head, 12 + head]
        alone.qkv = [case.qkv[0][:, rows]]
        (got,) = alone.by_kernel(alone.a_cache(), {0: slice(0, RUN + 9)})
        assert torch.equal(got, want[:, rows[:3]])


def test_threads_do_not_change_bits() -> None:
    case, results = Prompts([500, 40]), []
    chunks, before = {0: slice(0, 500), 1: slice(0, 40)}, torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            results.append(torch.cat(case.by_kernel(case.a_cache(), chunks)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_the_context_is_read_from_the_cache_and_from_no_block_of_another() -> None:
    case = Prompts([100, 60])
    cache = case.a_cache()
    case.by_kernel(cache, {0: slice(0, 70)})
    (want,) = case.by_kernel(cache, {0: slice(70, 100)})
    others = torch.ones(len(cache.block_rows), dtype=torch.bool).view(-1, 2 * case.kv_heads)
    others[case.tables[0]] = False
    cache.block_rows[others.flatten()] = torch.nan
    (got,) = case.by_kernel(cache, {0: slice(70, 100)})
    assert torch.equal(got, want)
    cache.block_rows.view(-1, 2, case.kv_heads, 16, case.width)[case.tables[0, 0], 1, :, 3] += 1
    (moved,) = case.by_kernel(cache, {0: slice(70, 100)})
    assert not torch.equal(moved, want)


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [0, 1], ids=["key", "value"])
def test_damage_in_the_cache_spoils_its_sequence_and_no_other(damage: float, kind: int) -> None:
    case = Prompts([90, 80])
    cache = case.a_cache()
    case.by_kernel(cache, {0: slice(0, 40), 1: slice(0, 40)})
    chunks = {0: slice(40, 90), 1: slice(40, 80)}
    want = case.by_kernel(cache, chunks)
    blocks = cache.block_rows.view(-1, 2, case.kv_heads, 16, case.width)
    blocks[case.tables[0, 1], kind, :, 5] = damage
    got = case.by_kernel(cache, chunks)
    assert not got[0].isfinite().any()
    assert torch.equal(got[1], want[1])


def test_large_scores_give_the_weight_to_the_largest() -> None:
    case = Prompts([300])
    case.qkv[0][:, :12] *= 40  # scores of some hundred thousand
    (got,) = case.by_kernel(case.a_cache(), {0: slice(0, 300)})
    (want,) = case.by_operations(case.a_cache(), {0: slice(0, 300)})
    close = (got.float() - want.float()).abs().amax(-1) < 4e-2
    assert got.isfinite().all()
    assert close.float().mean() > 0.95  # operations round scores to bf16: near ones may tie there


def test_an_item_has_a_token_even_where_very_many_heads_share_a_key() -> None:
    assert Shape(queries=128, key_width=64, shared_width=0, value_width=64).tokens == 1
    case = Prompts([40], heads=128, kv_heads=1, width=32)
    (got,) = case.by_kernel(case.a_cache(), {0: slice(0, 40)})
    (want,) = case.by_operations(case.a_cache(), {0: slice(0, 40)})
    torch.testing.assert_close(got, want, atol=4e-2, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "width", "served"),
    [("bfloat16", 64, True), ("bfloat16", 48, False), ("float32", 64, False)],
)
def test_kernels_say_which_caches_they_can_read(dtype: str, width: int, served: bool) -> None:
    layout = gqa_layout(dtype, key_width=width)
    assert serves(KVStorage(layout, 1, device=CPU).layer(0)) is served
