import pytest

from kvtransfer.plan import Chunk, Geometry, Run, check_blocks, check_layers, chunks, joined, runs
from protocol.ids import BlockId
from tests.support.transfers import LAYOUT

UNIT = LAYOUT.layer_block_bytes


def ids(*blocks: int) -> list[BlockId]:
    return [BlockId(block) for block in blocks]


def test_blocks_that_follow_each_other_at_both_ends_are_one_run() -> None:
    assert runs(ids(3, 4, 5), ids(7, 8, 9)) == [Run(3, 7, 3)]


def test_a_gap_at_either_end_starts_a_new_run() -> None:
    assert runs(ids(3, 4, 6), ids(7, 8, 9)) == [Run(3, 7, 2), Run(6, 9, 1)]
    assert runs(ids(3, 4, 5), ids(7, 9, 10)) == [Run(3, 7, 1), Run(4, 9, 2)]


def test_runs_of_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="2 source blocks for 1"):
        runs(ids(1, 2), ids(1))


def test_no_blocks_need_no_copies_and_no_chunks() -> None:
    assert runs([], []) == []
    assert list(chunks(LAYOUT, layers=range(3), first_block=0, num_blocks=0, max_bytes=99)) == []
    assert list(chunks(LAYOUT, layers=range(0), first_block=0, num_blocks=4, max_bytes=99)) == []


def test_whole_layers_stay_together_while_they_fit() -> None:
    cut = list(chunks(LAYOUT, layers=range(3), first_block=5, num_blocks=2, max_bytes=4 * UNIT + 1))
    assert cut == [Chunk(0, 2, 5, 2), Chunk(2, 1, 5, 2)]


def test_a_layer_that_is_too_long_is_cut_between_blocks() -> None:
    cut = list(chunks(LAYOUT, layers=range(1, 2), first_block=0, num_blocks=5, max_bytes=2 * UNIT))
    assert cut == [Chunk(1, 1, 0, 2), Chunk(1, 1, 2, 2), Chunk(1, 1, 4, 1)]


def test_a_whole_pool_is_one_extent_across_layers() -> None:
    geometry = Geometry(LAYOUT, 4)
    assert geometry.extents(Chunk(1, 2, 0, 4), ids(0, 1, 2, 3)) == [(4 * UNIT, 8 * UNIT)]


def test_a_sample_stays_within_the_chunk() -> None:
    geometry = Geometry(LAYOUT, 8)
    places, size = geometry.sample(Chunk(0, 3, 0, 2), ids(6, 1)), LAYOUT.head_block_bytes
    assert places == [(6 * UNIT, size), ((8 + 1) * UNIT, size), ((16 + 6) * UNIT, size)]


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_outside_the_pool_is_named(block: int) -> None:
    with pytest.raises(ValueError, match=rf"source block {block} is outside 0 \.\.\. 3"):
        check_blocks(ids(0, block), 4, side="source")


@pytest.mark.parametrize("layers", [range(2, 4), range(-1, 2), range(0, 3, 2)])
def test_layers_outside_the_model_are_refused(layers: range) -> None:
    with pytest.raises(ValueError, match="are not within"):
        check_layers(layers, range(LAYOUT.num_layers))


@pytest.mark.parametrize(
    ("other", "blocks", "both"),
    [
        (Chunk(1, 1, 6, 1), (9,), (Chunk(1, 1, 4, 3), (7, 8, 9))),
        (Chunk(2, 1, 4, 2), (7, 8), (Chunk(1, 2, 4, 2), (7, 8))),
        (Chunk(2, 1, 4, 2), (7, 9), None),
        (Chunk(2, 1, 6, 1), (9,), None),
        (Chunk(1, 1, 7, 1), (9,), None),
        (Chunk(0, 1, 4, 2), (7, 8), None),
        (Chunk(1, 2, 6, 1), (9,), None),
    ],
    ids=[
        "the next blocks",
        "the next layer",
        "the next layer, from other pages",
        "across a corner",
        "after a gap",
        "the layer before",
        "the next blocks, of more layers",
    ],
)
def test_neighbours_that_form_a_rectangle_are_joined(
    other: Chunk, blocks: tuple[int, ...], both: object
) -> None:
    found = joined(
        Chunk(1, 1, 4, 2), tuple(ids(7, 8)), other, tuple(BlockId(block) for block in blocks)
    )
    assert found == both
