import pytest

from engine.kvcache.block_table import BlockTable, blocks_for
from protocol.ids import BlockId


def a_table(*blocks: int, block_tokens: int = 4) -> BlockTable:
    return BlockTable(block_tokens, [BlockId(block) for block in blocks])


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)], ids=["none", "one", "full", "next"]
)
def test_a_started_block_counts_whole(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 4) == blocks


def test_a_token_lies_in_its_block_at_its_offset() -> None:
    table = a_table(7, 2)
    assert [table.slot(position) for position in (0, 3, 4, 6)] == [28, 31, 8, 10]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 12), (3, 9), (4, 8), (5, 6), (7, 7), (11, 12)], ids=str
)
def test_a_range_of_tokens_maps_to_their_single_slots(start: int, stop: int) -> None:
    table = a_table(5, 0, 3)
    assert table.slot_mapping(start, stop) == [table.slot(at) for at in range(start, stop)]


def test_a_range_beyond_the_table_is_refused() -> None:
    with pytest.raises(AssertionError, match="no slots"):
        a_table(5).slot_mapping(2, 5)


def test_a_table_grows_by_one_block_and_gives_all_back() -> None:
    table = a_table(5)
    table.append(BlockId(9))
    assert table.capacity_tokens == 8
    assert table.slot(7) == 39
    assert table.take_all() == [5, 9]
    assert table.capacity_tokens == 0
