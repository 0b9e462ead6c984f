"""Ends of a KV transfer whose blocks are on a GPU: patterned memory, and a decode process."""

from multiprocessing.connection import Connection

import torch

from kvtransfer.carrier import Transport
from kvtransfer.interface import KVMemory
from kvtransfer.memory import allocate_shared
from kvtransfer.sink import make_sink
from protocol.ids import WorkerRef
from protocol.kv import KVLayout
from tests.support.transfers import Events


def gpu_memory(layout: KVLayout, num_blocks: int, device: int, seed: int) -> KVMemory:
    """Random bytes. Large enough for an allocation of its own, as KV memory is."""
    generator = torch.Generator().manual_seed(seed)
    contents = torch.randint(
        0, 256, (num_blocks * layout.block_bytes,), dtype=torch.uint8, generator=generator
    ).to(f"cuda:{device}")
    return KVMemory(
        layout=layout,
        num_blocks=num_blocks,
        address=contents.data_ptr(),
        owner=contents,
        device=device,
    )


def bytes_of(memory: KVMemory, block: int) -> bytes:
    """One block's, layer after layer."""
    assert isinstance(memory.owner, torch.Tensor)
    layout = memory.layout
    pages = memory.owner.view(layout.num_layers, memory.num_blocks, layout.layer_block_bytes)
    return pages[:, block].cpu().numpy().tobytes()


def gpu_decode_process(  # noqa: PLR0917  a process is given them by place
    pipe: Connection,
    worker: WorkerRef,
    transport: Transport,
    layout: KVLayout,
    num_blocks: int,
    device: int,
) -> None:
    """Expects the grants that it is sent, and answers a block's number with its bytes."""
    memory = gpu_memory(layout, num_blocks, device, seed=2)
    events = Events()
    sink = make_sink(
        allocate_shared(layout, num_blocks),
        worker,
        events,
        device_memory=memory,
        transport=transport,
    )
    pipe.send(sink.endpoint)
    while True:
        request = pipe.recv()
        if isinstance(request, int):
            pipe.send(bytes_of(memory, request))
        elif request == "committed":
            pipe.send(events.committed().on_device)
        else:
            sink.expect(request)
            pipe.send("expected")
