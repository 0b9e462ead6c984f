"""What prefill ranks split arrives once each, in the right place."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from kvtransfer.gather import gather, scatter
from kvtransfer.plan import Chunk
from kvtransfer.shares import WHOLE, Share, layers_of, layout_of, places_of, share_of_rank
from protocol.errors import LayoutMismatch
from protocol.ids import BlockId
from protocol.kv import KVLayout, heads_of_rank

TOKENS, WIDTH, LAYERS = 4, 2, 2
SPLITS = [(1, 8), (2, 8), (4, 8), (8, 8), (16, 8), (32, 8), (4, 4), (2, 1), (3, 3), (6, 3)]


def a_layout(num_heads: int, kind: str = "gqa", value_width: int = WIDTH) -> KVLayout:
    return KVLayout(
        kind=kind,  # type: ignore[arg-type]
        dtype="float32",
        num_layers=LAYERS,
        block_tokens=TOKENS,
        kv_heads=num_heads,
        key_width=WIDTH,
        value_width=value_width if kind == "gqa" else 0,
    )


def pages_of(kv: torch.Tensor, heads: range) -> torch.Tensor:
    held = kv[:, :, :, heads.start : heads.stop].contiguous()
    return held.view(torch.uint8).view(LAYERS, kv.shape[1], -1)


@given(split=st.sampled_from(SPLITS), seed=st.integers(0, 99))
def test_a_decode_rank_gets_every_head_once_from_prefill_ranks_of_any_number(
    split: tuple[int, int], seed: int
) -> None:
    num_ranks, total = split
    whole = a_layout(total)
    shape = (LAYERS, 3, 2, total, TOKENS, WIDTH)  # layers, blocks, keys and values, heads
    kv = torch.arange(int(np.prod(shape)), dtype=torch.float32).view(shape)
    target = torch.full((LAYERS, 5, whole.layer_block_bytes), 255).byte()
    blocks = [BlockId(block) for block in random.Random(seed).sample(range(5), 3)]
    written = 0
    for rank in range(num_ranks):
        share = share_of_rank(rank, num_ranks, whole)
        if share is None:
            continue
        pages = pages_of(kv, heads_of_rank(rank, num_ranks, total))
        held = layout_of(share, whole)
        assert pages.shape[2] == held.layer_block_bytes
        row = torch.empty(pages.numel(), dtype=torch.uint8)
        chunk = Chunk(0, LAYERS, 0, 3)
        gather(pages, chunk, [BlockId(0), BlockId(1), BlockId(2)], row)
        scatter(row, target, chunk, blocks, places_of(share, whole))
        written += row.numel()
    assert torch.equal(target[:, blocks], pages_of(kv, range(total)))
    assert written == 3 * whole.block_bytes
    rest = [block for block in range(5) if block not in blocks]
    assert (target[:, rest] == 255).all()


@given(split=st.sampled_from(SPLITS), value_width=st.sampled_from([2, 6]))
def test_the_places_of_all_shares_are_the_whole_block(
    split: tuple[int, int], value_width: int
) -> None:
    num_ranks, total = split
    whole = a_layout(total, value_width=value_width)
    shares = [share_of_rank(rank, num_ranks, whole) for rank in range(num_ranks)]
    places = sorted(place for share in shares if share for place in places_of(share, whole))
    end = 0
    for start, length in places:
        assert start == end
        end += length
    assert end == whole.layer_block_bytes


@given(
    width=st.sampled_from([1, 2, 4, 8]),
    stages=st.integers(1, 5),
    more=st.integers(0, 9),
    kind=st.sampled_from(["gqa", "mla"]),
)
def test_stages_send_every_layer_of_every_head_once(
    width: int, stages: int, more: int, kind: str
) -> None:
    whole = structs.replace(a_layout(4 if kind == "gqa" else 1, kind), num_layers=stages + more)
    found = [
        share_of_rank(rank, width * stages, whole, num_stages=stages)
        for rank in range(width * stages)
    ]
    shares = [share for share in found if share is not None]
    assert all(share.senders == len(shares) for share in shares)
    sent = [(share.part, layer) for share in shares for layer in layers_of(share, whole)]
    assert sorted(sent) == [
        (part, layer) for part in range(shares[0].parts) for layer in range(stages + more)
    ]
    for share in shares:
        held = layout_of(share, whole)
        assert held.num_layers in {whole.num_layers // stages, -(-whole.num_layers // stages)}
        assert held.kv_heads * share.parts == whole.kv_heads


def test_latents_are_sent_once_and_whole() -> None:
    latent = a_layout(1, "mla")
    assert [share_of_rank(rank, 4, latent) for rank in range(4)] == [WHOLE, None, None, None]
    assert places_of(WHOLE, latent) == [(0, latent.layer_block_bytes)]


@pytest.mark.parametrize(
    ("share", "whole", "problem"),
    [
        (Share(0, 2), a_layout(1, "mla"), "latents are not split"),
        (Share(0, 3), a_layout(4), "part 0 of 3 is no share of 4 KV heads"),
        (Share(2, 2), a_layout(4), "part 2 of 2 is no share"),
        (Share(-1, 2), a_layout(4), "part -1 of 2 is no share"),
        (Share(0, 0), a_layout(4), "part 0 of 0 is no share"),
        (Share(stage=2, stages=2), a_layout(4), "stage 2 of 2 is no share of 2 layers"),
        (Share(stage=-1, stages=2), a_layout(4), "stage -1 of 2 is no share"),
        (Share(stage=0, stages=3), a_layout(4), "use at most as many stages as the model has"),
        (Share(stage=0, stages=0), a_layout(4), "stage 0 of 0 is no share"),
    ],
)
def test_what_is_no_share_of_the_layout_is_refused(
    share: Share, whole: KVLayout, problem: str
) -> None:
    with pytest.raises(LayoutMismatch, match=problem):
        places_of(share, whole)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(LayoutMismatch, match="8 KV heads cannot be split over 3 ranks"):
        heads_of_rank(0, 3, 8)
