"""Blocks leave and return, tokens are written: memory is always what a plain dictionary says."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kvcache.storage import KVStorage
from tests.support.paged import gqa_layout

NUM_BLOCKS, TOKENS, WIDTH = 6, 4, 2
SLOTS = st.sets(st.integers(0, NUM_BLOCKS * TOKENS - 1), max_size=9)
BLOCKS = st.lists(st.integers(0, NUM_BLOCKS - 1), min_size=1, unique=True)


@given(written=st.lists(SLOTS, min_size=1, max_size=4), out=BLOCKS, data=st.data())
def test_swapped_blocks_and_written_tokens_are_where_they_belong(
    written: list[set[int]], out: list[int], data: st.DataObject
) -> None:
    layout = gqa_layout(kv_heads=1, block_tokens=TOKENS, key_width=WIDTH, value_width=WIDTH)
    storage = KVStorage(layout, NUM_BLOCKS, device=torch.device("cpu"))
    cache = storage.layer(1)
    expected = dict.fromkeys(range(NUM_BLOCKS * TOKENS), 0.0)
    for step, slots in enumerate(written, start=1):
        values = torch.tensor([100.0 * step + slot for slot in sorted(slots)])
        rows = values[:, None, None].expand(-1, 1, WIDTH)
        slot_mapping = torch.tensor(sorted(slots), dtype=torch.int64)
        cache.write((rows, -rows), cache.rows_of_slots(slot_mapping))
        expected |= dict(zip(sorted(slots), values.tolist(), strict=True))
    back = data.draw(st.permutations(range(NUM_BLOCKS)))[: len(out)]
    storage.write_blocks(back, storage.read_blocks(out))
    before = dict(expected)
    for source, target in zip(out, back, strict=True):
        for offset in range(TOKENS):
            expected[target * TOKENS + offset] = before[source * TOKENS + offset]
    keys, values = cache.token_rows.view(NUM_BLOCKS, 2, TOKENS, WIDTH).unbind(1)
    assert keys.reshape(-1, WIDTH)[:, 0].tolist() == list(expected.values())
    assert torch.equal(values, -keys)
