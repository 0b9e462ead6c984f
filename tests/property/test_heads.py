"""Heads that ranks split differently arrive once each, in the right place."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.gather import gather, scatter_strips
from kvtransfer.heads import HeadRange, heads_of_rank, senders, strips
from kvtransfer.plan import Chunk
from protocol.errors import LayoutMismatch
from protocol.ids import BlockId
from protocol.kv import KVLayout

TOKENS, WIDTH, LAYERS = 4, 2, 2
SPLITS = [(1, 8), (2, 8), (4, 8), (8, 8), (16, 8), (32, 8), (4, 4), (2, 1), (3, 3), (6, 3)]


def a_layout(num_heads: int, kind: str = "gqa") -> KVLayout:
    return KVLayout(
        kind=kind,  # type: ignore[arg-type]
        dtype="float32",
        num_layers=LAYERS,
        block_tokens=TOKENS,
        kv_heads=num_heads,
        key_width=WIDTH,
        value_width=WIDTH if kind == "gqa" else 0,
    )


def model_kv(total: int, num_blocks: int) -> torch.Tensor:
    """(layers, blocks, keys and values, heads, tokens, width), every element another number."""
    shape = (LAYERS, num_blocks, 2, total, TOKENS, WIDTH)
    return torch.arange(int(np.prod(shape)), dtype=torch.float32).view(shape)


def pages_of(kv: torch.Tensor, heads: HeadRange) -> torch.Tensor:
    held = kv[:, :, :, heads.first : heads.first + heads.num_heads].contiguous()
    return held.view(torch.uint8).view(LAYERS, kv.shape[1], -1)


@given(split=st.sampled_from(SPLITS), target_split=st.sampled_from(SPLITS), dice=st.randoms())
def test_a_decode_rank_gets_every_head_once_from_prefill_ranks_of_any_number(
    split: tuple[int, int], target_split: tuple[int, int], dice: np.random.RandomState
) -> None:
    num_ranks, total = split
    wanted = heads_of_rank(0, target_split[0], total) if target_split[1] == total else None
    wanted = wanted or HeadRange(0, total, total)
    kv = model_kv(total, num_blocks=3)
    target = torch.full((LAYERS, 5, a_layout(wanted.num_heads).layer_block_bytes), 255).byte()
    blocks = [BlockId(block) for block in dice.sample(range(5), 3)]  # type: ignore[attr-defined]
    chunk = Chunk(0, LAYERS, 0, 3)
    for rank, part in senders(num_ranks, wanted):
        held = heads_of_rank(rank, num_ranks, total)
        layout = a_layout(held.num_heads)
        row = torch.empty(LAYERS * 3 * layout.layer_block_bytes, dtype=torch.uint8)
        gather(pages_of(kv, held), chunk, [BlockId(0), BlockId(1), BlockId(2)], row)
        moved = strips(layout, held, a_layout(wanted.num_heads), wanted)
        assert sum(strip.length for strip in moved) >= part.num_heads * 2 * TOKENS * WIDTH * 4
        scatter_strips(
            row, target, chunk, blocks, source_unit=layout.layer_block_bytes, strips=moved
        )
    assert torch.equal(target[:, blocks], pages_of(kv, wanted))
    rest = [block for block in range(5) if block not in blocks]
    assert (target[:, rest] == 255).all()


@given(split=st.sampled_from(SPLITS))
def test_senders_share_the_heads_out_without_overlap(split: tuple[int, int]) -> None:
    num_ranks, total = split
    parts = [part for _, part in senders(num_ranks, HeadRange(0, total, total))]
    heads = [head for part in parts for head in range(part.first, part.first + part.num_heads)]
    assert heads == list(range(total))


def test_equal_heads_are_one_strip_and_latents_always_are() -> None:
    whole = HeadRange(0, 4, 4)
    (strip,) = strips(a_layout(4), whole, a_layout(4), whole)
    assert strip == (0, 0, a_layout(4).layer_block_bytes)
    latent, one = a_layout(1, "mla"), HeadRange(0, 1, 1)
    assert strips(latent, one, latent, one) == [(0, 0, latent.layer_block_bytes)]


def test_ranks_without_a_head_in_common_exchange_nothing() -> None:
    assert strips(a_layout(2), HeadRange(0, 2, 4), a_layout(2), HeadRange(2, 2, 4)) == []


@pytest.mark.parametrize(
    ("target", "heads", "problem"),
    [
        (a_layout(1, "mla"), HeadRange(0, 1, 4), "differ in kind: gqa here, mla there"),
        (a_layout(2), HeadRange(0, 2, 8), "4 KV heads here, 8 there"),
        (a_layout(2), HeadRange(0, 4, 4), "a layout of 2 KV heads does not hold 4"),
    ],
)
def test_layouts_that_differ_in_more_than_heads_are_refused(
    target: KVLayout, heads: HeadRange, problem: str
) -> None:
    with pytest.raises(LayoutMismatch, match=problem):
        strips(a_layout(4), HeadRange(0, 4, 4), target, heads)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(LayoutMismatch, match="8 KV heads cannot be split over 3 ranks"):
        heads_of_rank(0, 3, 8)
