import mmap

import pytest
import torch

from engine.kvcache.storage import KVStorage, OncePerStep
from protocol.kv import KVLayout
from tests.support.paged import gqa_layout, mla_layout

CPU = torch.device("cpu")
LAYOUTS = pytest.mark.parametrize(
    "layout",
    [gqa_layout(block_tokens=4, key_width=8), mla_layout("bfloat16")],
    ids=["gqa", "mla"],
)


def fill(storage: KVStorage) -> None:
    """Every float is a different small number."""
    for index in range(storage.layout.num_layers):
        rows = storage.layer(index).token_rows
        rows.copy_(torch.arange(rows.numel()).view_as(rows) % 199 + index)


def test_a_token_is_found_in_the_block_and_at_the_offset_of_its_slot() -> None:
    layout = gqa_layout(block_tokens=4, key_width=8)
    storage = KVStorage(layout, 6, device=CPU)
    cache = storage.layer(1)
    key, value = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    slots = torch.tensor([5 * 4 + 3, 2 * 4])
    cache.write((key, value), cache.rows_of_slots(slots))
    blocks = cache.block_rows.view(6, 2, 3, 4, 8)
    assert torch.equal(blocks[5, 0, :, 3], key[0])
    assert torch.equal(blocks[5, 1, :, 3], value[0])
    assert torch.equal(blocks[2, 0, :, 0], key[1])
    assert blocks.count_nonzero() == 2 * 2 * 3 * 8
    assert storage.layer(0).token_rows.count_nonzero() == 0


def test_a_gather_puts_the_tokens_of_a_head_next_to_each_other() -> None:
    layout = gqa_layout(block_tokens=4, key_width=8)
    storage = KVStorage(layout, 6, device=CPU)
    cache = storage.layer(0)
    fill(storage)
    rows = cache.rows_of_blocks(torch.tensor([[4, 1]]))
    gathered = cache.block_rows[rows.flatten()].view(2, 3, 8, 8)
    blocks = cache.block_rows.view(6, 2, 3, 4, 8)
    assert torch.equal(gathered[1, 2, :4], blocks[4, 1, 2])
    assert torch.equal(gathered[1, 2, 4:], blocks[1, 1, 2])


@LAYOUTS
def test_memory_is_layer_major_and_a_block_of_a_layer_is_contiguous(layout: KVLayout) -> None:
    storage = KVStorage(layout, 5, device=CPU)
    start = storage.memory_address
    for index in range(layout.num_layers):
        rows = storage.layer(index).token_rows
        assert rows.data_ptr() == start + index * 5 * layout.layer_block_bytes
        assert rows.numel() * rows.element_size() == 5 * layout.layer_block_bytes


@LAYOUTS
def test_blocks_come_back_bit_for_bit_at_other_places(layout: KVLayout) -> None:
    storage = KVStorage(layout, 5, device=CPU)
    fill(storage)
    everything = storage.read_blocks(range(5))
    taken = storage.read_blocks([3, 0])
    assert taken.shape == (layout.num_layers, 2, layout.layer_block_bytes)
    storage.write_blocks([1, 4], taken)
    expected = everything.clone()
    expected[:, [1, 4]] = everything[:, [3, 0]]
    assert torch.equal(storage.read_blocks(range(5)), expected)
    assert torch.equal(taken, everything[:, [3, 0]])  # a copy, not a view


def test_a_buffer_of_the_caller_is_the_memory() -> None:
    layout = mla_layout("bfloat16")
    buffer = mmap.mmap(-1, 5 * layout.block_bytes)
    storage = KVStorage(layout, 5, device=CPU, buffer=buffer)
    storage.layer(0).token_rows[0, 0] = 1.0
    assert buffer[:2] == b"\x80\x3f"


def test_a_buffer_that_is_too_small_is_refused() -> None:
    layout = mla_layout("bfloat16")
    with pytest.raises(ValueError, match=f"{5 * layout.block_bytes} bytes"):
        KVStorage(layout, 5, device=CPU, buffer=bytearray(5 * layout.block_bytes - 1))


def test_key_and_value_widths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="value_width is 32"):
        KVStorage(gqa_layout(value_width=32), 5, device=CPU)


def test_a_plan_is_made_once_for_a_step() -> None:
    plans, made = OncePerStep(), []

    def build(step: list[int]) -> int:
        made.append(step)
        return len(made)

    first, second = [1], [1]
    assert [plans.get(first, build), plans.get(first, build), plans.get(second, build)] == [1, 1, 2]
