import os

import pytest

from kvtransfer.memory import allocate_shared, buffer, free_bytes, map_shared, wrap
from protocol.errors import ConfigError, LayoutMismatch, TransferError
from tests.support.transfers import LAYOUT


def test_what_one_mapping_writes_the_other_reads() -> None:
    memory = allocate_shared(LAYOUT, 4)
    assert memory.share is not None
    other = map_shared(LAYOUT, 4, os.dup(memory.share))
    buffer(memory)[17] = 99
    assert buffer(other)[17] == 99
    assert other.address != memory.address


def test_shared_memory_starts_as_zeros_and_cannot_shrink() -> None:
    memory = allocate_shared(LAYOUT, 2)
    assert memory.share is not None
    assert bytes(buffer(memory)) == bytes(memory.num_bytes)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.share, 0)


def test_the_descriptor_goes_with_the_memory() -> None:
    memory = allocate_shared(LAYOUT, 2)
    share = memory.share
    assert share is not None
    del memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(share)


def test_memory_of_another_size_is_a_layout_mismatch() -> None:
    memory = allocate_shared(LAYOUT, 4)
    assert memory.share is not None
    with pytest.raises(LayoutMismatch, match="its layout says"):
        map_shared(LAYOUT, 5, os.dup(memory.share))


def test_memory_that_its_owner_could_shrink_is_not_mapped() -> None:
    share = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(share, LAYOUT.block_bytes)
    with pytest.raises(TransferError, match="not sealed"):
        map_shared(LAYOUT, 1, share)


def test_a_wrapped_allocation_is_seen_in_place() -> None:
    shared = allocate_shared(LAYOUT, 1)
    wrapped = wrap(LAYOUT, 1, address=shared.address, owner=shared)
    buffer(wrapped)[3] = 7
    assert buffer(shared)[3] == 7
    assert wrapped.share is None


def test_more_memory_than_there_is_names_the_setting_and_what_would_fit() -> None:
    room = 3 * LAYOUT.block_bytes + 1
    with pytest.raises(ConfigError, match="use at most 3 blocks"):
        allocate_shared(LAYOUT, 4, available_bytes=room)


def test_no_blocks_at_all_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="num_blocks is 0"):
        allocate_shared(LAYOUT, 0)


def test_the_room_that_is_left_is_less_than_the_host_has() -> None:
    assert 0 < free_bytes() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
