"""Runs of blocks are copied to their places, whether by streaming stores or not."""

import pytest

from kvtransfer.memory import allocate_shared, buffer
from kvtransfer.plan import Chunk, Run
from kvtransfer.runs import RunCopier
from kvtransfer.shares import WHOLE, Share, layout_of, places_of
from protocol.kv import KVLayout
from tests.support.transfers import block_bytes, patterned

WIDTHS = {"whole cache lines": 4, "no whole cache lines": 3}


def a_layout(width: int) -> KVLayout:
    return KVLayout(
        kind="gqa",
        dtype="float32",
        num_layers=3,
        block_tokens=4,
        kv_heads=4,
        key_width=width,
        value_width=width,
    )


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("share", [WHOLE, Share(0, 2), Share(3, 4)], ids=str)
def test_a_run_is_copied_to_its_places_and_nowhere_else(width: int, share: Share) -> None:
    whole = a_layout(width)
    source = patterned(layout_of(share, whole), 9, 1)
    target = allocate_shared(whole, 7)
    places = places_of(share, whole)
    copier = RunCopier(source, target, places)
    copier.copy(Chunk(1, 2, 0, 4), [Run(5, 0, 3), Run(1, 6, 1)])
    unit, moved = whole.layer_block_bytes, {0: 5, 1: 6, 2: 7, 6: 1}
    for block in range(7):
        there = block_bytes(target, block)
        expected = bytearray(len(there))
        if block in moved:
            for layer in (1, 2):
                part = source.layout.layer_block_bytes
                at = (layer * 9 + moved[block]) * part
                for place, length in places:
                    to = layer * unit + place
                    expected[to : to + length] = buffer(source)[at : at + length]
                    at += length
        assert there == expected
