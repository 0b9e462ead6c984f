"""Kernels of prefill attention on latents against the same attention in PyTorch operations."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from engine.attention.mla import mla_attention
from engine.batch import ForwardBatch
from engine.config import MlaConfig
from engine.cpu import latent_prefill, vectors
from engine.cpu.causal_attention import RUN
from engine.kvcache.storage import KVStorage, LayerCache
from engine.layers.rope import Rotation
from tests.support.paged import a_batch, block_tables, mla_layout

pytestmark = pytest.mark.skipif(
    not vectors.has_bf16_dot(), reason="needs a CPU with AVX512-BF16, whose instruction it is"
)

CPU = torch.device("cpu")
CONFIG = MlaConfig(
    num_heads=5, query_rank=None, latent_width=96, nope_width=64, rope_width=32, value_width=96
)


@dataclass
class Latents:
    """Tokens of some sequences, to be attended to in chunks, in any batches and on any cache."""

    lengths: list[int]

    def __post_init__(self) -> None:
        torch.manual_seed(6)
        latent, roped = CONFIG.latent_width, CONFIG.rope_width
        self.layout = mla_layout("bfloat16", key_width=latent + roped)
        self.num_blocks = 3 + sum(self.layout.blocks_for(length) for length in self.lengths)
        self.tables = block_tables(self.lengths, 16, self.num_blocks)
        heads = CONFIG.num_heads
        width = heads * (CONFIG.nope_width + roped)
        self.q = [torch.randn(length, width).bfloat16() for length in self.lengths]
        self.rows = [torch.randn(length, latent + roped + 8).bfloat16() for length in self.lengths]
        self.w_uk = (torch.randn(heads, CONFIG.nope_width, latent) / 8).bfloat16()
        self.w_uv = (torch.randn(heads, CONFIG.value_width, latent) / 10).bfloat16()
        angles = torch.randn(max(self.lengths), 1, roped // 2)
        cos, sin = angles.cos(), angles.sin()
        self.cos, self.sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def a_cache(self) -> LayerCache:
        return KVStorage(self.layout, self.num_blocks, device=CPU).layer(1)

    def step(
        self, chunks: dict[int, slice]
    ) -> tuple[ForwardBatch, Tensor, Tensor, Tensor, Rotation]:
        """These tokens of these sequences: batch, queries, latents, keys and rotation."""
        spans = list(chunks.values())
        q = torch.cat([self.q[row][span] for row, span in chunks.items()])
        rows = torch.cat([self.rows[row][span] for row, span in chunks.items()])
        cos, sin = (
            torch.cat([table[span] for span in spans]).bfloat16() for table in (self.cos, self.sin)
        )
        lengths, contexts = [span.stop - span.start for span in spans], [s.stop for s in spans]
        batch = a_batch(self.tables[list(chunks)], lengths, contexts, 16)
        latent, width = CONFIG.latent_width, CONFIG.latent_width + CONFIG.rope_width
        return batch, q, rows[:, :latent], rows[:, latent:width], Rotation(cos, sin)

    def by_kernel(self, cache: LayerCache, chunks: dict[int, slice]) -> list[Tensor]:
        batch, q, latent, key, rotation = self.step(chunks)
        out = latent_prefill.latent_prefill(
            q,
            latent,
            key,
            rotation,
            cache,
            batch,
            expansions=latent_prefill.Expansions.of(self.w_uk, self.w_uv),
            scale=0.1,
        )
        return list(out.split(list(batch.query_lens)))

    def by_operations(self, cache: LayerCache, chunks: dict[int, slice]) -> list[Tensor]:
        batch, q, latent, key, rotation = self.step(chunks)
        q_nope, q_rope = q.split(
            [CONFIG.num_heads * CONFIG.nope_width, CONFIG.num_heads * CONFIG.rope_width], dim=1
        )
        out = mla_attention(
            q_nope.view(len(q), CONFIG.num_heads, -1),
            rotation.apply(q_rope.view(len(q), CONFIG.num_heads, -1)),
            latent,
            rotation.apply(key.unsqueeze(1)).squeeze(1),
            w_uk_HPC=self.w_uk,
            w_uv_HVC=self.w_uv,
            cache=cache,
            batch=batch,
            scale=0.1,
        )
        return list(out.split(list(batch.query_lens)))


def test_chunks_of_any_length_agree_with_operations() -> None:
    case = Latents([2 * RUN + 70, 33, 1])
    mine, theirs = case.a_cache(), case.a_cache()
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
    length = RUN + 170
    case = Latents([length, 300])
    (want,) = case.by_kernel(case.a_cache(), {0: slice(0, length)})
    cache, parts = case.a_cache(), []
    for start, end in ((0, 1), (1, 99), (99, RUN + 1), (RUN + 1, length)):
        chunks = {1: slice(0, 20 + start % 200), 0: slice(start, end)}
        parts.append(case.by_kernel(cache, chunks)[1])
    assert torch.equal(torch.cat(parts), want)


@pytest.mark.parametrize("heads_at_a_time", [1, 2])
def test_heads_expanded_in_turn_have_the_bits_of_all_at_once(
    heads_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, chunks = Latents([150, 60]), {0: slice(0, 150), 1: slice(0, 60)}
    want = case.by_kernel(case.a_cache(), chunks)
    monkeypatch.setattr(latent_prefill, "EXPAND_HEAD_TOKENS", 210 * heads_at_a_time)
    got = case.by_kernel(case.a_cache(), chunks)
    assert torch.equal(torch.cat(got), torch.cat(want))


def test_kernels_say_which_heads_they_can_attend_with() -> None:
    weight = torch.empty(0, dtype=torch.bfloat16)
    assert latent_prefill.serves(CONFIG, weight)
    assert not latent_prefill.serves(CONFIG, weight.float())
    assert not latent_prefill.serves(replace(CONFIG, nope_width=48, rope_width=16), weight)
    assert not latent_prefill.serves(replace(CONFIG, rope_width=16), weight)
    assert not latent_prefill.serves(replace(CONFIG, value_width=80), weight)
    assert not latent_prefill.serves(replace(CONFIG, latent_width=98), weight)
