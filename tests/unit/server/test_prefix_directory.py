"""Hints of prefix caches: what is believed of whom."""

from protocol.ids import Incarnation, WorkerId, WorkerRef
from protocol.workers import PrefixEvents
from server.prefix_directory import PrefixDirectory

WORKER = WorkerRef(WorkerId("prefill-0"), Incarnation(1))


def a_directory(*stored: bytes) -> PrefixDirectory:
    directory = PrefixDirectory()
    directory.apply(WORKER, PrefixEvents(sequence=5, stored=stored, snapshot=True))
    return directory


def test_only_leading_blocks_count() -> None:
    directory = a_directory(b"a", b"b", b"d")
    assert directory.hit_blocks(WORKER, [b"a", b"b", b"c", b"d"]) == 2
    assert directory.hit_blocks(WORKER, [b"x", b"a"]) == 0
    assert directory.hit_blocks(WORKER, [b"a", b"b"]) == 2


def test_a_removed_block_ends_the_hit() -> None:
    directory = a_directory(b"a", b"b")
    assert directory.apply(WORKER, PrefixEvents(sequence=6, removed=(b"a",)))
    assert directory.hit_blocks(WORKER, [b"a", b"b"]) == 0


def test_after_a_gap_nothing_is_believed_until_the_next_snapshot() -> None:
    directory = a_directory(b"a")
    assert not directory.apply(WORKER, PrefixEvents(sequence=7, stored=(b"b",)))
    assert directory.hit_blocks(WORKER, [b"a"]) == 0
    assert not directory.apply(WORKER, PrefixEvents(sequence=8, stored=(b"b",)))
    assert directory.apply(WORKER, PrefixEvents(sequence=9, stored=(b"a",), snapshot=True))
    assert directory.hit_blocks(WORKER, [b"a"]) == 1


def test_a_new_life_of_a_worker_has_an_empty_cache() -> None:
    directory = a_directory(b"a")
    assert directory.hit_blocks(WorkerRef(WORKER.worker_id, Incarnation(2)), [b"a"]) == 0
