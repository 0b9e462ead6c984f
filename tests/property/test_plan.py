import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.plan import Chunk, Geometry, chunks, runs, slices
from protocol.ids import BlockId
from protocol.kv import KVLayout


def a_layout(num_layers: int) -> KVLayout:
    return KVLayout(
        kind="mla",
        dtype="bfloat16",
        num_layers=num_layers,
        block_tokens=1,
        kv_heads=1,
        key_width=2,
        value_width=0,
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[KVLayout, int, int, list[BlockId], list[BlockId]]:
    """A layout, two pool sizes, and as many blocks of the one as of the other."""
    layout = a_layout(draw(st.integers(1, 5)))
    source_size, target_size = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    count = draw(st.integers(0, min(source_size, target_size)))
    shuffled = [
        [BlockId(b) for b in draw(st.permutations(range(size)))]
        if draw(st.booleans())
        else [BlockId(b) for b in range(size)]
        for size in (source_size, target_size)
    ]
    return layout, source_size, target_size, shuffled[0][:count], shuffled[1][:count]


@given(pairs(), st.integers(0, 60))
def test_runs_of_chunks_move_what_a_naive_copy_moves(
    pair: tuple[KVLayout, int, int, list[BlockId], list[BlockId]], max_bytes: int
) -> None:
    layout, source_size, target_size, source_blocks, target_blocks = pair
    unit = layout.layer_block_bytes
    source = bytes(i % 251 for i in range(source_size * layout.block_bytes))
    naive = bytearray(target_size * layout.block_bytes)
    for layer, (here, there) in itertools.product(
        range(layout.num_layers), zip(source_blocks, target_blocks, strict=True)
    ):
        start, to = (layer * source_size + here) * unit, (layer * target_size + there) * unit
        naive[to : to + unit] = source[start : start + unit]

    copied = bytearray(len(naive))
    cut = chunks(
        layout,
        layers=range(layout.num_layers),
        first_block=0,
        num_blocks=len(source_blocks),
        max_bytes=max_bytes,
    )
    for chunk in cut:
        part = slice(chunk.first_block, chunk.first_block + chunk.num_blocks)
        for run in runs(source_blocks[part], target_blocks[part]):
            for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers):
                start = (layer * source_size + run.source) * unit
                to, size = (layer * target_size + run.target) * unit, run.length * unit
                assert run.source + run.length <= source_size
                assert run.target + run.length <= target_size
                copied[to : to + size] = source[start : start + size]
    assert copied == naive


@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
def test_chunks_cover_every_piece_exactly_once(
    num_layers: int, first_block: int, num_blocks: int, max_bytes: int
) -> None:
    layout = a_layout(num_layers)
    covered = [
        (layer, block)
        for cut in chunks(
            layout,
            layers=range(num_layers),
            first_block=first_block,
            num_blocks=num_blocks,
            max_bytes=max_bytes,
        )
        for layer in range(cut.first_layer, cut.first_layer + cut.num_layers)
        for block in range(cut.first_block, cut.first_block + cut.num_blocks)
    ]
    wanted = itertools.product(range(num_layers), range(first_block, first_block + num_blocks))
    assert sorted(covered) == list(wanted)


@given(pairs())
def test_both_sides_read_a_chunk_in_the_same_order(
    pair: tuple[KVLayout, int, int, list[BlockId], list[BlockId]],
) -> None:
    layout, source_size, target_size, source_blocks, target_blocks = pair
    chunk = Chunk(0, layout.num_layers, 0, len(source_blocks))
    orders = []
    for size, blocks in ((source_size, source_blocks), (target_size, target_blocks)):
        names = {block: index for index, block in enumerate(blocks)}
        geometry = Geometry(layout, size)
        orders.append(
            [
                (unit // size, names[BlockId(unit % size)])
                for offset, length in geometry.extents(chunk, blocks)
                for unit in range(offset // geometry.unit, (offset + length) // geometry.unit)
            ]
        )
    assert orders[0] == orders[1]
    assert len(orders[0]) == layout.num_layers * len(source_blocks)


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 64))
def test_slices_keep_every_byte_in_order_and_are_full_but_for_the_last(
    places: list[bytes], max_bytes: int
) -> None:
    parts = [b"".join(part) for part in slices([memoryview(p) for p in places], max_bytes)]
    assert b"".join(parts) == b"".join(places)
    assert all(len(part) == max_bytes for part in parts[:-1])
    assert all(0 < len(part) <= max_bytes for part in parts[-1:])
