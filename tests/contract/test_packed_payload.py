"""KV over TCP as 8-bit floats, between two ends that agree on it."""

import pytest
import torch

from kvtransfer.interface import KVMemory
from kvtransfer.memory import allocate_shared, buffer
from kvtransfer.sink import make_sink
from kvtransfer.source import make_source
from protocol.errors import ConfigError
from protocol.ids import BlockId
from protocol.kv import KVLayout
from tests.support.transfer_peers import Done
from tests.support.transfers import LAYOUT, Events, a_grant, a_worker

WIDE = KVLayout(
    kind="gqa",
    dtype="bfloat16",
    num_layers=3,
    block_tokens=4,
    kv_heads=2,
    key_width=16,
    value_width=16,
)


def elements(memory: KVMemory) -> torch.Tensor:
    """(layers, blocks, elements of one block of one layer)"""
    return torch.frombuffer(buffer(memory), dtype=torch.bfloat16).view(
        WIDE.num_layers, memory.num_blocks, -1
    )


def test_blocks_arrive_rounded_and_others_stay_as_they_are() -> None:
    decode, events = a_worker(), Events()
    source_memory, target = allocate_shared(WIDE, 8), allocate_shared(WIDE, 8)
    generator = torch.Generator().manual_seed(3)
    elements(source_memory).copy_(torch.randn(3, 8, 256, generator=generator))
    sink = make_sink(target, decode, events, transport="tcp", payload="fp8")
    source = make_source(source_memory, a_worker("prefill-0"), transport="tcp")
    for generation, (here, there) in enumerate([([5, 1, 2], [0, 7, 3]), ([4], [1])], start=1):
        grant = a_grant(decode, there, generation=generation, endpoint=sink.endpoint, layout=WIDE)
        sink.expect(grant)
        push, done = source.open(grant), Done()
        push.send(range(WIDE.num_layers), 0, [BlockId(block) for block in here])
        push.finish(b"", done)
        assert done.wait() is None
        committed = events.committed()
        assert committed.bytes_received == len(there) * WIDE.block_bytes
        sent, arrived = elements(source_memory)[:, here], elements(target)[:, there]
        error = (arrived.float() - sent.float()).abs()
        assert (error <= sent.float().abs() / 15 + 1e-5).all()
        assert error.any()  # it is not a copy
    assert not elements(target)[:, [2, 4, 5, 6]].any()
    source.close()
    sink.close()


def test_rows_too_short_for_a_scale_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv\.payload is fp8: rows of 4 elements"):
        make_sink(allocate_shared(LAYOUT, 4), a_worker(), Events(), payload="fp8")
