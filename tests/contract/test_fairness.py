"""A huge transfer holds up no small ones, of the same worker or of another process."""

from multiprocessing.connection import Connection

import pytest

from kvtransfer.carrier import Transport
from kvtransfer.limits import TransferLimits
from kvtransfer.memory import allocate_shared
from kvtransfer.sink import make_sink
from kvtransfer.source import make_source
from protocol.ids import BlockId
from protocol.kv import Grant, KVLayout
from tests.support.transfer_peers import Done, another_process, answer
from tests.support.transfers import Events, a_grant, a_worker, until

LAYOUT = KVLayout(
    kind="gqa",
    dtype="bfloat16",
    num_layers=4,
    block_tokens=16,
    kv_heads=2,
    key_width=128,
    value_width=128,
)  # a block is 64 KB
HUGE_BLOCKS, SMALL = 2048, 16  # 128 MB, and so many of one block
LIMITS = TransferLimits(
    tcp_frame_bytes=64 * 1024, shm_frame_bytes=64 * 1024, nixl_frame_bytes=64 * 1024
)


def sender(pipe: Connection, transport: Transport) -> None:
    """Sends each list of grants that it is told, all at once, and says when they have committed."""
    memory = allocate_shared(LAYOUT, HUGE_BLOCKS)
    source = make_source(memory, a_worker("prefill"), transport=transport, limits=LIMITS)
    while True:
        grants: list[Grant] = pipe.recv()
        pushes = [(source.open(grant), Done()) for grant in grants]
        for (push, done), grant in zip(pushes, grants, strict=True):
            push.send(range(4), 0, [BlockId(block) for block in range(len(grant.block_ids))])
            push.finish(b"", done)
        pipe.send([str(done.wait()) for _, done in pushes])


@pytest.mark.parametrize("processes", [1, 2], ids=["one worker", "two workers"])
def test_small_transfers_commit_before_a_huge_one_that_was_there_first(
    transport: Transport, processes: int
) -> None:
    decode, events = a_worker(), Events()
    target = allocate_shared(LAYOUT, HUGE_BLOCKS + SMALL + 1)
    sink = make_sink(target, decode, events, transport=transport, limits=LIMITS)

    def grant(generation: int, blocks: list[int]) -> Grant:
        made = a_grant(decode, blocks, generation=generation, endpoint=sink.endpoint, layout=LAYOUT)
        sink.expect(made)
        return made

    huge = grant(1, list(range(HUGE_BLOCKS)))
    small = [grant(2 + i, [HUGE_BLOCKS + i]) for i in range(SMALL)]
    first = grant(2 + SMALL, [HUGE_BLOCKS + SMALL])
    with (
        another_process(sender, transport) as (_, one),
        another_process(sender, transport) as (_, two),
    ):
        if processes == 1:
            one.send([huge, *small])
        else:
            two.send([first])  # it has connected when the huge one begins
            assert answer(two) == ["None"]
            assert events.committed().generation == first.generation
            chunks = sink.stats()["chunks"]
            one.send([huge])
            until(lambda: sink.stats()["chunks"] > chunks, "the huge one does not begin")
            two.send(small)
        ended = [events.committed().generation for _ in range(SMALL + 1)]
        assert ended[-1] == huge.generation
        assert sorted(ended[:-1]) == [made.generation for made in small]
        assert set(answer(one)) == {"None"}  # type: ignore[call-overload]
    sink.close()
