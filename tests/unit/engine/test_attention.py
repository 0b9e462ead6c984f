"""Paged attention against dense attention, and the independence of batch-mates, bit for bit."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from engine.attention.gqa import gqa_attention
from engine.attention.mla import mla_attention
from engine.batch import ForwardBatch
from engine.kvcache.storage import KVStorage
from protocol.kv import KVLayout
from tests.support.paged import a_batch, block_tables, dense_attention, gqa_layout, mla_layout

HEADS, KV_HEADS, WIDTH = 9, 3, 64
NOPE, ROPE, LATENT, VALUE = 24, 16, 64, 32
BLOCK = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KINDS = pytest.mark.parametrize("kind", ["gqa", "mla"])


@dataclass
class Case:
    """Tokens of some sequences, whose attention can be asked for in any batches."""

    kind: str
    contexts: list[int]
    dtype: torch.dtype
    device: str = "cpu"

    def __post_init__(self) -> None:
        torch.manual_seed(7)
        name = str(self.dtype).removeprefix("torch.")
        layout: KVLayout = gqa_layout(name) if self.kind == "gqa" else mla_layout(name)
        num_blocks = 2 + sum(layout.blocks_for(context) for context in self.contexts)
        self.storage = KVStorage(layout, num_blocks, device=torch.device(self.device))
        self.cache = self.storage.layer(1)
        self.tables = block_tables(self.contexts, BLOCK, num_blocks)
        make = partial(self._random)
        if self.kind == "gqa":
            shapes: list[tuple[int, ...]] = [(HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, WIDTH)]
        else:
            shapes = [(HEADS, NOPE), (HEADS, ROPE), (LATENT,), (ROPE,)]
        self.inputs = [[make(context, *shape) for shape in shapes] for context in self.contexts]
        self.w_uk, self.w_uv = make(HEADS, NOPE, LATENT) / 8, make(HEADS, VALUE, LATENT) / 8

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(dtype=self.dtype, device=self.device)

    def attend(self, rows: list[int], queries: list[int], contexts: list[int]) -> list[Tensor]:
        """One step of the given sequences; their results, each (L, H, V)."""
        spans = [
            (row, slice(context - length, context))
            for row, length, context in zip(rows, queries, contexts, strict=True)
        ]
        packed = [
            torch.cat([self.inputs[row][part][span] for row, span in spans])
            for part in range(len(self.inputs[0]))
        ]
        batch = a_batch(self.tables[rows], queries, contexts, BLOCK)
        return list(self.run(packed, batch).split(queries))

    def run(self, packed: list[Tensor], batch: ForwardBatch) -> Tensor:
        if self.kind == "gqa":
            return gqa_attention(*packed, cache=self.cache, batch=batch, scale=0.2)
        weights = {"w_uk_HPC": self.w_uk, "w_uv_HVC": self.w_uv}
        return mla_attention(*packed, **weights, cache=self.cache, batch=batch, scale=0.2)

    def expected(self, row: int, length: int, context: int) -> Tensor:
        if self.kind == "gqa":
            q, k, v = self.inputs[row]
            k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
        else:
            q_nope, q_rope, latent, k_rope = (part.double() for part in self.inputs[row])
            q = torch.cat((q_nope, q_rope), -1)
            nope = torch.einsum("sc,hpc->shp", latent, self.w_uk.double())
            k = torch.cat((nope, k_rope[:, None].expand(-1, HEADS, -1)), -1)
            v = torch.einsum("sc,hvc->shv", latent, self.w_uv.double())
        return dense_attention(q[context - length : context], k[:context], v[:context], 0.2)

    def check(self, rows: list[int], queries: list[int], contexts: list[int]) -> None:
        results = self.attend(rows, queries, contexts)
        for row, length, context, got in zip(rows, queries, contexts, results, strict=True):
            difference = (got.double() - self.expected(row, length, context)).abs().max()
            assert difference < TOLERANCE[self.dtype]


@KINDS
@DTYPES
def test_chunks_of_any_length_and_then_single_tokens_give_dense_attention(
    kind: str, dtype: torch.dtype
) -> None:
    case = Case(kind, [150, 67, 303], dtype)
    case.check([0, 1], [100, 1], [100, 1])
    case.check([0, 1, 2], [48, 65, 299], [148, 66, 299])
    case.check([2], [3], [302])
    case.check([0, 1, 2], [1, 1, 1], [149, 67, 303])
    case.check([0], [1], [150])


@KINDS
@DTYPES
def test_decode_gives_the_same_bits_whatever_the_batch_mates(kind: str, dtype: torch.dtype) -> None:
    contexts = [5, 64, 700, 65, 256, 130, 257, 12, 31, 200, 513]
    case = Case(kind, contexts, dtype)
    case.attend(list(range(len(contexts))), contexts, contexts)
    alone = [case.attend([row], [1], [contexts[row]])[0] for row in range(len(contexts))]
    for rows in ([0, 7, 8], [0, 2], [2, 0], [3, 1, 5, 9], [4, 6, 10, 2, 0], list(range(11))):
        together = case.attend(rows, [1] * len(rows), [contexts[row] for row in rows])
        for row, got in zip(rows, together, strict=True):
            assert torch.equal(got, alone[row])


@KINDS
def test_a_sequence_never_reads_the_blocks_of_another(kind: str) -> None:
    case = Case(kind, [40, 700], torch.float32)
    case.attend([0, 1], [40, 700], [40, 700])
    blocks = case.storage.read_blocks(range(case.storage.num_blocks))
    owned = case.tables[0, :3].tolist()
    poisoned = torch.full_like(blocks, 255)  # every float is NaN
    poisoned[:, owned] = blocks[:, owned]
    case.storage.write_blocks(range(case.storage.num_blocks), poisoned)
    case.check([0], [1], [40])
    assert not case.attend([0, 1], [1, 1], [40, 700])[0].isnan().any()


@KINDS
def test_a_step_without_tokens_gives_none(kind: str) -> None:
    case = Case(kind, [3], torch.float32)
    packed = [part[:0] for part in case.inputs[0]]
    out = case.run(packed, a_batch(case.tables[:0], [], [], BLOCK))
    assert out.shape == (0, HEADS, WIDTH if kind == "gqa" else VALUE)


@pytest.mark.gpu
@KINDS
def test_attention_on_a_gpu_is_dense_attention(kind: str) -> None:
    case = Case(kind, [150, 303], torch.bfloat16, device="cuda")
    case.tables = case.tables.cuda()
    case.check([0, 1], [100, 299], [100, 299])
    case.check([0, 1], [1, 1], [101, 300])
