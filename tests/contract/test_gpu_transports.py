"""KV from GPU to GPU: what the contract of all transports asks, between two processes.

``cuda_ipc`` runs on one GPU that both processes share; ``nccl`` needs two.
"""

from collections.abc import Generator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch

from kvtransfer.carrier import Transport
from kvtransfer.interface import KVMemory
from kvtransfer.memory import allocate_shared
from kvtransfer.source import Source, make_source
from protocol.errors import TransferError
from protocol.ids import BlockId, WorkerRef
from protocol.kv import Grant, KVEndpoint, KVLayout
from tests.support.gpu_peers import bytes_of, gpu_decode_process, gpu_memory
from tests.support.transfer_peers import Done, another_process, answer
from tests.support.transfers import a_grant, a_worker

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LAYOUT = KVLayout(
    kind="gqa",
    dtype="bfloat16",
    num_layers=8,
    block_tokens=16,
    kv_heads=8,
    key_width=128,
    value_width=128,
)
NUM_BLOCKS = 64


@pytest.fixture(params=["cuda_ipc", "nccl"])
def transport(request: pytest.FixtureRequest) -> Transport:
    chosen: Transport = request.param
    pytest.importorskip("cupy")
    needed = 2 if chosen == "nccl" else 1
    if torch.cuda.device_count() < needed:
        pytest.skip(f"{chosen} needs {needed} GPUs")
    return chosen


@dataclass
class GpuDecode:
    process: BaseProcess
    pipe: Connection
    worker: WorkerRef
    endpoint: KVEndpoint
    generation: int = 0

    def grant(self, blocks: list[int]) -> Grant:
        self.generation += 1
        grant = a_grant(
            self.worker, blocks, generation=self.generation, endpoint=self.endpoint, layout=LAYOUT
        )
        self.pipe.send(grant)
        assert answer(self.pipe) == "expected"
        return grant

    def bytes_of(self, block: int) -> object:
        self.pipe.send(block)
        return answer(self.pipe)


@pytest.fixture
def memory() -> KVMemory:
    return gpu_memory(LAYOUT, NUM_BLOCKS, 0, seed=1)


@pytest.fixture
def source(transport: Transport, memory: KVMemory) -> Generator[Source]:
    made = make_source(
        allocate_shared(LAYOUT, NUM_BLOCKS),
        a_worker("prefill-0"),
        device_memory=memory,
        transport=transport,
    )
    yield made
    made.close()


def a_decode_rank(transport: Transport) -> Generator[GpuDecode]:
    worker = a_worker()
    device = 1 if transport == "nccl" else 0
    with another_process(gpu_decode_process, worker, transport, LAYOUT, NUM_BLOCKS, device) as (
        process,
        pipe,
    ):
        endpoint = answer(pipe)
        assert isinstance(endpoint, KVEndpoint)
        yield GpuDecode(process, pipe, worker, endpoint)


@pytest.fixture
def decode(transport: Transport) -> Generator[GpuDecode]:
    yield from a_decode_rank(transport)


def carry(
    source: Source, decode: GpuDecode, memory: KVMemory, here: list[int], there: list[int]
) -> None:
    push, done = source.open(decode.grant(there)), Done()
    for layers in (range(5), range(5, LAYOUT.num_layers)):
        push.send(layers, 0, [BlockId(block) for block in here])
    push.finish(b"", done)
    assert done.wait() is None
    decode.pipe.send("committed")
    assert answer(decode.pipe) is True
    for sent, arrived in zip(here, there, strict=True):
        assert decode.bytes_of(arrived) == bytes_of(memory, sent)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (list(range(16)), list(range(16, 32))),
        ([9, 1, 33, 4], [0, 31, 2, 20]),
        ([3], [60]),
        ([], []),
        (list(range(64)), list(reversed(range(64)))),
    ],
    ids=["in order", "scattered", "one block", "no block", "the whole pool"],
)
def test_blocks_arrive_on_the_other_gpu(
    source: Source, decode: GpuDecode, memory: KVMemory, here: list[int], there: list[int]
) -> None:
    carry(source, decode, memory, here, there)


def test_blocks_are_read_when_the_engine_has_written_them(
    source: Source, decode: GpuDecode, memory: KVMemory
) -> None:
    """The push is queued behind kernels that are still running when it is sent."""
    assert isinstance(memory.owner, torch.Tensor)
    push, done = source.open(decode.grant([5])), Done()
    for number in range(200):
        memory.owner.copy_(torch.full_like(memory.owner, number))
    push.send(range(LAYOUT.num_layers), 0, [BlockId(2)])
    push.finish(b"", done)
    assert done.wait() is None
    assert decode.bytes_of(5) == bytes([199]) * LAYOUT.block_bytes


def test_a_killed_decode_rank_fails_the_push_and_its_next_life_serves(
    transport: Transport, source: Source, memory: KVMemory
) -> None:
    for _ in range(2):
        for decode in a_decode_rank(transport):
            carry(source, decode, memory, [1, 2], [3, 4])
            push, done = source.open(decode.grant([7])), Done()
            decode.process.kill()
            decode.process.join()
            push.finish(b"", done)
            assert isinstance(done.wait(), TransferError)


def test_an_aborted_push_leaves_the_pair_usable(
    source: Source, decode: GpuDecode, memory: KVMemory
) -> None:
    push, done = source.open(decode.grant([0, 1])), Done()
    push.send(range(1), 0, [BlockId(0), BlockId(1)])
    push.abort("the client has gone", done)
    done.wait()
    push, done = source.open(decode.grant([5])), Done()
    push.send(range(LAYOUT.num_layers), 0, [BlockId(6)])
    push.finish(b"", done)
    assert done.wait() is None
    assert decode.bytes_of(5) == bytes_of(memory, 6)
