"""Kernels of decode attention against the same attention in PyTorch operations."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.attention.gqa import gqa_attention
from engine.attention.mla import mla_attention
from engine.batch import ForwardBatch
from engine.cpu.grouped_attention import HeadNorms, grouped_decode
from engine.cpu.latent_attention import latent_decode
from engine.cpu.paged_attention import RUN, serves
from engine.kvcache.storage import KVStorage, LayerCache
from engine.layers.norm import rms_norm
from engine.layers.rope import Rotation
from engine.model_runner import SequenceStep, batch_from
from protocol.kv import KVLayout

CPU = torch.device("cpu")
BLOCK = 16
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
CONTEXTS = [1, BLOCK, BLOCK + 1, RUN - 1, RUN, RUN + 1, 2 * RUN + 5]


def a_cache(layout: KVLayout, num_blocks: int) -> LayerCache:
    """With something in every block, as a cache has that has been used."""
    cache = KVStorage(layout, num_blocks, device=CPU).layer(0)
    cache.token_rows.copy_(torch.randn(cache.token_rows.shape))
    return cache


def a_batch(contexts: list[int]) -> tuple[ForwardBatch, int]:
    """One new token each, blocks in no order; and how many blocks there are."""
    counts = [-(-context // BLOCK) for context in contexts]
    free = torch.randperm(sum(counts)).tolist()
    tables = [[free.pop() for _ in range(count)] for count in counts]
    steps = [
        SequenceStep(token_ids=[1], start=context - 1, block_table=table)
        for context, table in zip(contexts, tables, strict=True)
    ]
    return batch_from(steps, block_tokens=BLOCK, device=CPU), sum(counts)


def a_rotation(count: int, width: int, dtype: torch.dtype) -> Rotation:
    angle = torch.randn(count, 1, width // 2)
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))


@dataclass
class Grouped:
    """Sequences whose decode step can be computed both ways, each on a cache of its own."""

    contexts: list[int]
    dtype: torch.dtype
    heads: int = 6
    kv_heads: int = 2
    width: int = 32
    normed: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(3)
        self.batch, num_blocks = a_batch(self.contexts)
        name = str(self.dtype).removeprefix("torch.")
        self.layout = KVLayout(
            kind="gqa",
            dtype=name,
            num_layers=1,
            block_tokens=BLOCK,
            kv_heads=self.kv_heads,
            key_width=self.width,
            value_width=self.width,
        )
        self.cache = a_cache(self.layout, num_blocks)
        rows = self.heads + 2 * self.kv_heads
        self.qkv = torch.randn(len(self.contexts), rows, self.width).to(self.dtype)
        self.rotation = a_rotation(len(self.contexts), self.width, self.dtype)
        query, key = torch.rand(2, self.width).to(self.dtype)
        self.norms = HeadNorms(query, key, 1e-6) if self.normed else None

    def a_copy_of_the_cache(self) -> LayerCache:
        copy = KVStorage(self.layout, len(self.cache.block_rows) // (2 * self.kv_heads), device=CPU)
        copy.layer(0).token_rows.copy_(self.cache.token_rows)
        return copy.layer(0)

    def by_kernel(self, cache: LayerCache) -> Tensor:
        return grouped_decode(
            self.qkv.clone(), self.rotation, cache, self.batch, scale=0.2, norms=self.norms
        )

    def by_operations(self, cache: LayerCache) -> Tensor:
        keys = self.heads + self.kv_heads
        q, k, v = self.qkv[:, : self.heads], self.qkv[:, self.heads : keys], self.qkv[:, keys:]
        if self.norms:
            q = rms_norm(q, self.norms.query_W, self.norms.epsilon)
            k = rms_norm(k, self.norms.key_W, self.norms.epsilon)
        q, k = self.rotation.apply(q), self.rotation.apply(k)
        return gqa_attention(q, k, v, cache=cache, batch=self.batch, scale=0.2)


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "normed"),
    [(9, 3, 64, False), (8, 8, 32, False), (32, 4, 128, True), (14, 2, 64, False)],
)
def test_grouped_attention_agrees_with_operations(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, normed: bool
) -> None:
    case = Grouped(CONTEXTS, dtype, heads, kv_heads, width, normed)
    mine, theirs = case.a_copy_of_the_cache(), case.a_copy_of_the_cache()
    assert serves(mine)
    got, want = case.by_kernel(mine), case.by_operations(theirs)
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=1e-5)
    torch.testing.assert_close(mine.token_rows, theirs.token_rows, atol=TOLERANCE[dtype], rtol=1e-5)


@DTYPES
def test_a_sequence_has_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    together = Grouped(CONTEXTS, dtype)
    got = together.by_kernel(together.a_copy_of_the_cache())
    for row, context in enumerate(CONTEXTS):
        alone = Grouped(CONTEXTS, dtype)
        table = together.batch.block_tables[row, : -(-context // BLOCK)].tolist()
        alone.batch = batch_from(
            [SequenceStep(token_ids=[1], start=context - 1, block_table=table)],
            block_tokens=BLOCK,
            device=CPU,
        )
        alone.qkv = together.qkv[row : row + 1]
        alone.rotation = Rotation(
            together.rotation.cos_N1W[row : row + 1], together.rotation.sin_N1W[row : row + 1]
        )
        assert torch.equal(alone.by_kernel(together.a_copy_of_the_cache())[0], got[row])


@DTYPES
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    case = Grouped([700] * 8, dtype, heads=9, kv_heads=3, width=64)  # enough to be shared out
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            case.batch, _ = a_batch_again(case.batch)
            results.append(case.by_kernel(case.a_copy_of_the_cache()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def a_batch_again(batch: ForwardBatch) -> tuple[ForwardBatch, int]:
    """An equal batch that is another step, so that nothing of the last one is kept for it."""
    steps = [
        SequenceStep(token_ids=[1], start=context - 1, block_table=table.tolist())
        for context, table in zip(batch.context_lens, batch.block_tables, strict=True)
    ]
    return batch_from(steps, block_tokens=BLOCK, device=CPU), 0


@DTYPES
@pytest.mark.parametrize("heads", [4, 17, 32])
def test_latent_attention_agrees_with_operations(dtype: torch.dtype, heads: int) -> None:
    torch.manual_seed(4)
    nope, roped, latent, value = 64, 32, 128, 96
    batch, num_blocks = a_batch(CONTEXTS)
    layout = KVLayout(
        kind="mla",
        dtype=str(dtype).removeprefix("torch."),
        num_layers=1,
        block_tokens=BLOCK,
        kv_heads=1,
        key_width=latent + roped,
        value_width=0,
    )
    mine = a_cache(layout, num_blocks)
    theirs = KVStorage(layout, num_blocks, device=CPU).layer(0)
    theirs.token_rows.copy_(mine.token_rows)
    count = len(CONTEXTS)
    q_NX = torch.randn(count, heads * (nope + roped)).to(dtype)
    projected = torch.randn(count, latent + roped + 8).to(dtype)  # its rows are farther apart
    latent_NC, key_NR = projected[:, :latent], projected[:, latent : latent + roped]
    w_uk_HPC = (torch.randn(heads, nope, latent) / nope**0.5).to(dtype)
    w_uv_HVC = (torch.randn(heads, value, latent) / latent**0.5).to(dtype)
    rotation = a_rotation(count, roped, dtype)
    got = latent_decode(
        q_NX,
        latent_NC,
        key_NR,
        rotation,
        mine,
        batch,
        w_uk_HCP=w_uk_HPC.transpose(1, 2).contiguous(),
        w_uv_HVC=w_uv_HVC,
        scale=0.1,
    )
    want = mla_attention(
        q_NX[:, : heads * nope].view(count, heads, nope),
        rotation.apply(q_NX[:, heads * nope :].view(count, heads, roped)),
        latent_NC,
        rotation.apply(key_NR.unsqueeze(1)).squeeze(1),
        w_uk_HPC=w_uk_HPC,
        w_uv_HVC=w_uv_HVC,
        cache=theirs,
        batch=batch,
        scale=0.1,
    )
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=1e-5)
    torch.testing.assert_close(mine.token_rows, theirs.token_rows, atol=TOLERANCE[dtype], rtol=1e-5)


@pytest.mark.parametrize(
    ("width", "block_tokens", "served"), [(64, 16, True), (48, 16, False), (64, 8, False)]
)
def test_kernels_say_which_caches_they_can_read(
    width: int, block_tokens: int, served: bool
) -> None:
    layout = KVLayout(
        kind="gqa",
        dtype="float32",
        num_layers=1,
        block_tokens=block_tokens,
        kv_heads=1,
        key_width=width,
        value_width=width,
    )
    assert serves(KVStorage(layout, 1, device=CPU).layer(0)) is served


@DTYPES
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_damaged_key_spoils_its_sequence_and_no_other(dtype: torch.dtype, damage: float) -> None:
    case = Grouped([40, 70], dtype)
    sound, damaged = case.a_copy_of_the_cache(), case.a_copy_of_the_cache()
    block = int(case.batch.block_tables[0, 1])
    keys = damaged.block_rows.view(-1, 2, case.kv_heads, BLOCK, case.width)[block, 0]
    keys[:, 3] = damage
    want, got = case.by_kernel(sound), case.by_kernel(damaged)
    assert not got[0].isfinite().any()
    assert torch.equal(got[1], want[1])
