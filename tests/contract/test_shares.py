"""Prefill ranks that have a share of the heads or layers each fill one grant of a rank that has
all.
"""

import contextlib
from collections.abc import Generator
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest

from kvtransfer.carrier import Transport
from kvtransfer.interface import KVMemory
from kvtransfer.memory import allocate_shared, buffer
from kvtransfer.shares import Share, layers_of, layout_of, places_of, share_of_rank
from kvtransfer.sink import Sink, make_sink
from kvtransfer.source import Source, make_source
from protocol.errors import LayoutMismatch, TransferAborted
from protocol.ids import BlockId, WorkerRef
from protocol.kv import Grant, KVLayout, layers_of_stage
from tests.support.transfer_peers import Done, another_process, answer
from tests.support.transfers import (
    WAIT_S,
    Events,
    a_grant,
    a_worker,
    block_bytes,
    patterned,
    until,
)

NUM_BLOCKS = 12
WHOLE = KVLayout(
    kind="gqa",
    dtype="bfloat16",
    num_layers=3,
    block_tokens=16,
    kv_heads=4,
    key_width=64,
    value_width=64,
)
LATENT = KVLayout(
    kind="mla",
    dtype="bfloat16",
    num_layers=3,
    block_tokens=16,
    kv_heads=1,
    key_width=72,
    value_width=0,
)


def held_by(model: KVMemory, share: Share) -> KVMemory:
    """What a rank with this share has of the model's blocks."""
    whole, held = model.layout, layout_of(share, model.layout)
    layers = layers_of(share, whole)
    memory = allocate_shared(held, model.num_blocks)
    at = 0
    for layer in layers:
        for block in range(model.num_blocks):
            for place, length in places_of(share, whole):
                start = (layer * model.num_blocks + block) * whole.layer_block_bytes + place
                buffer(memory)[at : at + length] = buffer(model)[start : start + length]
                at += length
    return replace(memory, first_layer=layers.start)


class DecodeRank:
    def __init__(self, transport: Transport, layout: KVLayout) -> None:
        self.worker, self.events = a_worker(), Events()
        self.memory = patterned(layout, NUM_BLOCKS, 1)
        self.sink: Sink = make_sink(self.memory, self.worker, self.events, transport=transport)
        self._generation = 0

    def grant(self, blocks: list[int]) -> Grant:
        self._generation += 1
        grant = a_grant(
            self.worker,
            blocks,
            generation=self._generation,
            endpoint=self.sink.endpoint,
            layout=self.memory.layout,
        )
        self.sink.expect(grant)
        return grant


@contextlib.contextmanager
def decode_rank(transport: Transport, layout: KVLayout) -> Generator[DecodeRank]:
    rank = DecodeRank(transport, layout)
    try:
        yield rank
    finally:
        rank.sink.close()


def source_of(transport: Transport, share: Share, model: KVMemory, worker: WorkerRef) -> Source:
    memory = held_by(model, share)
    return make_source(memory, worker, transport=transport, share=share, whole=model.layout)


@contextlib.contextmanager
def prefill_ranks(
    transport: Transport, num_ranks: int, model: KVMemory, num_stages: int = 1
) -> Generator[list[Source]]:
    """The sources of those ranks that send."""
    shares = [
        share_of_rank(rank, num_ranks, model.layout, num_stages=num_stages)
        for rank in range(num_ranks)
    ]
    sources = [
        source_of(transport, share, model, a_worker(f"prefill-0/{rank}"))
        for rank, share in enumerate(shares)
        if share is not None
    ]
    try:
        yield sources
    finally:
        for source in sources:
            source.close()


def send_share(source: Source, grant: Grant, blocks: list[int], layers: range) -> Done:
    push, done = source.open(grant), Done()
    push.send(layers, 0, [BlockId(block) for block in blocks])
    push.finish(b"", done)
    return done


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", [WHOLE, LATENT], ids=["heads", "latents"])
def test_any_number_of_prefill_ranks_fills_a_decode_rank_with_all_heads(
    transport: Transport, num_ranks: int, layout: KVLayout
) -> None:
    model, here, there = patterned(layout, NUM_BLOCKS, 2), [3, 4, 5, 9], [7, 8, 1, 0]
    with (
        decode_rank(transport, layout) as rank,
        prefill_ranks(transport, num_ranks, model) as sources,
    ):
        assert len(sources) == (1 if layout.kind == "mla" else min(num_ranks, 4))
        before = [block_bytes(rank.memory, block) for block in range(NUM_BLOCKS)]
        grant = rank.grant(there)
        done = [send_share(source, grant, here, range(3)) for source in sources]
        committed = rank.events.committed()
        assert committed.bytes_received == 4 * layout.block_bytes
        assert [callback.wait() for callback in done] == [None] * len(sources)
        for source, target in zip(here, there, strict=True):
            assert block_bytes(rank.memory, target) == block_bytes(model, source)
        for block in set(range(NUM_BLOCKS)) - set(there):
            assert block_bytes(rank.memory, block) == before[block]


@pytest.mark.parametrize(("num_ranks", "num_stages"), [(2, 2), (3, 3), (4, 2)])
@pytest.mark.parametrize("layout", [WHOLE, LATENT], ids=["heads", "latents"])
def test_stages_that_hold_some_layers_each_fill_a_decode_rank_that_holds_all(
    transport: Transport, num_ranks: int, num_stages: int, layout: KVLayout
) -> None:
    model, here, there = patterned(layout, NUM_BLOCKS, 2), [3, 4, 5, 9], [7, 8, 1, 0]
    width = num_ranks // num_stages
    with (
        decode_rank(transport, layout) as rank,
        prefill_ranks(transport, num_ranks, model, num_stages) as sources,
    ):
        assert len(sources) == num_stages * (1 if layout.kind == "mla" else width)
        grant = rank.grant(there)
        done: list[Done] = []
        for number, source in enumerate(sources):
            stage = number * num_stages // len(sources)
            layers = layers_of_stage(stage, num_stages, layout.num_layers)
            assert rank.events.is_empty()
            done.append(send_share(source, grant, here, layers))
        assert rank.events.committed().bytes_received == 4 * layout.block_bytes
        assert [callback.wait() for callback in done] == [None] * len(sources)
        for source_block, target in zip(here, there, strict=True):
            assert block_bytes(rank.memory, target) == block_bytes(model, source_block)


def test_layers_of_another_stage_are_not_sent(transport: Transport) -> None:
    model = patterned(WHOLE, NUM_BLOCKS, 2)
    with decode_rank(transport, WHOLE) as rank, prefill_ranks(transport, 3, model, 3) as sources:
        push, done = sources[1].open(rank.grant([1])), Done()
        for layers in (range(1), range(3), range(2, 3)):
            with pytest.raises(ValueError, match=r"not within 1 \.\.\. 1"):
                push.send(layers, 0, [BlockId(1)])
        push.abort("a wrong layer", done)


def test_nothing_is_committed_before_every_rank_has_finished(transport: Transport) -> None:
    model = patterned(WHOLE, NUM_BLOCKS, 2)
    with decode_rank(transport, WHOLE) as rank, prefill_ranks(transport, 2, model) as sources:
        first, second = sources
        grant = rank.grant([1, 2])
        push, done = first.open(grant), Done()
        push.send(range(3), 0, [BlockId(1), BlockId(2)])
        push.finish(b"the first token", done)
        late = second.open(grant)
        late.send(range(3), 0, [BlockId(1), BlockId(2)])
        assert rank.events.is_empty()
        done_late = Done()
        late.finish(b"", done_late)
        assert rank.events.committed().payload == b"the first token"
        assert (done.wait(), done_late.wait()) == (None, None)


def test_a_rank_that_gives_up_fails_the_grant_for_all(transport: Transport) -> None:
    model = patterned(WHOLE, NUM_BLOCKS, 2)
    with decode_rank(transport, WHOLE) as rank, prefill_ranks(transport, 2, model) as sources:
        grant = rank.grant([1, 2])
        push, done = sources[0].open(grant), send_share(sources[1], grant, [1, 2], range(3))
        aborted = Done()
        push.send(range(1), 0, [BlockId(1), BlockId(2)])
        push.abort("the client has gone", aborted)
        aborted.wait()
        assert "the client has gone" in str(rank.events.failed().error)
        assert isinstance(done.wait(), TransferAborted)
        rank.events.quiet()
        again = rank.grant([1, 2])
        done_again = [send_share(source, again, [1, 2], range(3)) for source in sources]
        rank.events.committed()
        assert [callback.wait() for callback in done_again] == [None, None]


def test_a_share_that_does_not_make_up_the_decode_ranks_layout_is_refused(
    transport: Transport,
) -> None:
    thirds = Share(0, 3)
    memory = allocate_shared(layout_of(Share(0, 4), WHOLE), NUM_BLOCKS)
    worker = a_worker("prefill-0/0")
    for whole in (None, WHOLE):
        with pytest.raises(LayoutMismatch):
            make_source(memory, worker, transport=transport, share=thirds, whole=whole)
    source = make_source(memory, worker, transport=transport)
    with decode_rank(transport, WHOLE) as rank, pytest.raises(LayoutMismatch):
        source.open(rank.grant([1]))
    source.close()


def share_process(
    pipe: Connection, transport: Transport, grant: Grant, share: Share, worker: WorkerRef
) -> None:
    """One prefill rank: half of the layers, then when it is told to the others."""
    model = patterned(WHOLE, NUM_BLOCKS, 2)
    source = source_of(transport, share, model, worker)
    push, blocks = source.open(grant), [BlockId(block) for block in range(8)]
    push.send(range(1), 0, blocks)
    pipe.send("half sent")
    pipe.recv()
    done = Done()
    push.send(range(1, 3), 0, blocks)
    push.finish(b"", done)
    pipe.send(str(done.wait()))
    pipe.recv()
    source.close()


def test_two_processes_with_half_of_the_heads_each_fill_one_grant(transport: Transport) -> None:
    model, there = patterned(WHOLE, NUM_BLOCKS, 2), [11, 3, 4, 5, 0, 1, 8, 7]
    with decode_rank(transport, WHOLE) as rank:
        grant = rank.grant(there)
        with (
            another_process(
                share_process, transport, grant, Share(0, 2), a_worker("prefill-0/0")
            ) as (_, first),
            another_process(
                share_process, transport, grant, Share(1, 2), a_worker("prefill-0/1")
            ) as (_, second),
        ):
            assert [answer(first), answer(second)] == ["half sent"] * 2
            first.send("go on")
            second.send("go on")
            rank.events.committed()
            assert [answer(first), answer(second)] == ["None"] * 2
        for source, target in enumerate(there):
            assert block_bytes(rank.memory, target) == block_bytes(model, source)


def test_the_death_of_one_of_two_processes_fails_the_grant_and_leaves_quiet_pages(
    transport: Transport,
) -> None:
    with decode_rank(transport, WHOLE) as rank:
        grant = rank.grant(list(range(8)))
        with (
            another_process(
                share_process, transport, grant, Share(0, 2), a_worker("prefill-0/0")
            ) as (_, first),
            another_process(
                share_process, transport, grant, Share(1, 2), a_worker("prefill-0/1")
            ) as (killed, second),
        ):
            assert [answer(first), answer(second)] == ["half sent"] * 2
            until(lambda: rank.sink.stats()["chunks"] >= 2, "both have not begun")
            killed.kill()
            killed.join(WAIT_S)
            assert rank.events.failed().generation == grant.generation
            assert rank.events.quiet().generation == grant.generation
            assert rank.sink.stats()["live_grants"] == 0
