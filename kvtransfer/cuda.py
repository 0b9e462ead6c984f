"""What GPU transports need of CUDA: whose memory, streams and events, and bounded waits for them.

cupy is imported here and nowhere else, when a GPU transport is first asked for; torch's streams and
events are used, because the engine's are torch's. Every copy runs on a stream of its own and waits
for events, so that nothing here ever waits for the whole device.
"""

import contextlib
import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from kvtransfer.checksum import Checksum
from kvtransfer.gather import gather, scatter
from kvtransfer.interface import KVMemory
from kvtransfer.plan import Chunk, Geometry
from kvtransfer.shares import WHOLE, Share, places_of
from protocol.errors import ConfigError, TransferError
from protocol.ids import BlockId

HOW_TO_INSTALL = "install it with pip install 'headrace[gpu]'"
_FABRIC_READY = 3


def library() -> Any:
    """Cupy.

    Raises:
        ConfigError: it is not installed, or finds no CUDA.
    """
    try:
        return importlib.import_module("cupy")
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"cannot load the library cupy: {error}; {HOW_TO_INSTALL}") from error


def problem(memory: KVMemory) -> str | None:
    """Why a GPU transport cannot carry blocks of ``memory`` here, or None."""
    if memory.device is None:
        return "the KV blocks are not on a GPU"
    try:
        library().cuda.runtime.getDeviceCount()
    except ConfigError as error:
        return str(error)
    except RuntimeError as error:  # of another CUDA version than the driver's, for instance
        return f"cupy cannot use CUDA here: {error}"
    return None


def gpu_id(device: int) -> str:
    """The same for one GPU in every process, however devices are numbered there."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_of(gpu: str) -> int:
    """This process's number of that GPU.

    Raises:
        TransferError: it is not visible here.
    """
    for device in range(torch.cuda.device_count()):
        if gpu_id(device) == gpu:
            return device
    raise TransferError(f"GPU {gpu} is not visible to this process")


def engine_event() -> torch.cuda.Event:
    """Behind all that the calling thread's current stream has been given."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


class _FabricInfo(ctypes.Structure):
    """NVML's nvmlGpuFabricInfo_t."""

    _fields_ = (
        ("cluster", ctypes.c_ubyte * 16),
        ("status", ctypes.c_int),
        ("clique", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    )


def domain_of(gpu: str) -> str:
    """Equal for two GPUs exactly when NVLink joins them across hosts; empty where it does not."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    device, info = ctypes.c_void_p(), _FabricInfo()
    try:
        found = (
            nvml.nvmlInit_v2() == 0
            and nvml.nvmlDeviceGetHandleByUUID(f"GPU-{gpu}".encode(), ctypes.byref(device)) == 0
            and nvml.nvmlDeviceGetGpuFabricInfo(device, ctypes.byref(info)) == 0
        )
    except AttributeError:  # a driver that is older than the fabric
        return ""
    cluster = bytes(info.cluster)
    if not found or info.state != _FABRIC_READY or not any(cluster):
        return ""
    return f"{cluster.hex()}/{info.clique}"


class DevicePages:
    """One rank's blocks in GPU memory, and a stream of its own to move them on."""

    def __init__(self, memory: KVMemory, share: Share = WHOLE) -> None:
        """``share`` is what chunks carry of these blocks."""
        assert memory.device is not None
        self.memory = memory
        places = places_of(share, memory.layout)
        self.geometry = Geometry(
            memory.layout, memory.num_blocks, places, first_layer=memory.first_layer
        )
        self.device = torch.device("cuda", memory.device)
        self.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        flat = tensor_at(memory.address, memory.num_bytes, memory.device, memory.owner)
        layout = memory.layout
        self._pages = flat.view(layout.num_layers, memory.num_blocks, layout.layer_block_bytes)

    def num_bytes(self, chunk: Chunk) -> int:
        return chunk.num_layers * chunk.num_blocks * self.geometry.carried

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def after(self, ready: object) -> None:
        """Do what follows when the event that the engine has recorded has come."""
        if isinstance(ready, torch.cuda.Event):
            self.stream.wait_event(ready)

    def gather(self, chunk: Chunk, blocks: Sequence[BlockId], row: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            gather(self._pages, self._here(chunk), blocks, row)

    def scatter(self, chunk: Chunk, blocks: Sequence[BlockId], row: Tensor) -> None:
        with torch.cuda.stream(self.stream):
            scatter(row, self._pages, self._here(chunk), blocks, self.geometry.places)

    def _here(self, chunk: Chunk) -> Chunk:
        """With layers counted from the first one here."""
        return chunk._replace(first_layer=chunk.first_layer - self.memory.first_layer)

    def event(self, *, timed: bool = False) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]

    def mark(self, *, timed: bool = False) -> torch.cuda.Event:
        """An event behind all that has been queued here."""
        event = self.event(timed=timed)
        event.record(self.stream)
        return event

    def is_over(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())  # type: ignore[no-untyped-call]

    def crc(self, checksum: Checksum, chunk: Chunk, blocks: Sequence[BlockId]) -> int:
        """Of 4 KB of each layer, unless checksums are off: reading all of it over the bus would
        cost more than the transfer.
        """
        if checksum == "off":
            return 0
        flat = self._pages.view(-1)
        with torch.cuda.stream(self.stream):
            samples = [
                flat[offset : offset + length]
                for offset, length in self.geometry.sample(chunk, blocks)
            ]
            sampled = torch.cat(samples).cpu()  # waits for this stream alone
        return crc32(sampled.numpy())


def tensor_at(address: int, num_bytes: int, device: int, owner: object) -> Tensor:
    """GPU memory that somebody else owns, as bytes."""
    cupy = library()
    memory = cupy.cuda.UnownedMemory(address, num_bytes, owner, device)
    array = cupy.ndarray((num_bytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
    return torch.as_tensor(array, device=torch.device("cuda", device))


def allocation_of(address: int) -> tuple[int, int]:
    """(base, size) of the allocation that the address is in: handles are of whole allocations.

    Raises:
        TransferError: it is no CUDA memory.
    """
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        found = driver.cuMemGetAddressRange_v2(
            ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        )
        if found == 0:
            return base.value, size.value
    raise TransferError("the KV memory is no CUDA allocation that can be shared")
