"""A rank's KV memory as bytes: shared with the host's other processes, or wrapped as it is.

Shared memory is an anonymous memfd. It has no name, so nothing can be left behind or guessed, and
its size is sealed, so no holder can shrink it under another's feet.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
from pathlib import Path

from kvtransfer.interface import KVMemory
from protocol.errors import ConfigError, LayoutMismatch, TransferError
from protocol.kv import KVLayout

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedPages:
    """A mapping of a memfd and the descriptor itself; both go when the last reference goes."""

    def __init__(self, share: int, mapping: mmap.mmap) -> None:
        self.share = share
        self.mapping = mapping
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))

    def __del__(self) -> None:
        os.close(self.share)


def allocate_shared(
    layout: KVLayout, num_blocks: int, *, available_bytes: int | None = None
) -> KVMemory:
    """Zeroed memory for ``num_blocks`` that other processes of this host can map by ``share``.

    All of it is backed by pages on return, so running out of memory shows here and not later.
    ``buffer`` gives it to ``torch.frombuffer``. ``available_bytes`` is what may be taken at most,
    by default what the host and the container have left: the kernel itself sets shared memory no
    limit, it would kill other processes to make room.

    Raises:
        ConfigError: there is not that much memory; nothing was allocated.
    """
    if num_blocks < 1:
        raise ConfigError(f"num_blocks is {num_blocks}; KV memory needs at least 1 block")
    num_bytes = num_blocks * layout.block_bytes
    room = free_bytes() if available_bytes is None else available_bytes
    if num_bytes > room:
        raise ConfigError(
            f"num_blocks is {num_blocks}: KV memory would take {num_bytes} bytes, {room} are "
            f"free; use at most {room // layout.block_bytes} blocks"
        )
    share = os.memfd_create("headrace-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(share, 0, num_bytes)
        fcntl.fcntl(share, fcntl.F_ADD_SEALS, _SEALS)
        mapping = _map(share, num_bytes)
    except OSError as error:
        os.close(share)
        raise ConfigError(
            f"num_blocks is {num_blocks}: no {num_bytes} bytes of shared KV memory: {error}"
        ) from error
    return _memory(layout, num_blocks, SharedPages(share, mapping))


def free_bytes() -> int:
    """What this process could still take: the host's free memory, or less in a container."""
    free = _meminfo("MemAvailable")
    for limit, used in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # no such cgroup, or "max"
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ConfigError(f"/proc/meminfo has no {name}: this kernel is too old")


def map_shared(layout: KVLayout, num_blocks: int, share: int) -> KVMemory:
    """Another process's shared memory. Takes ``share`` over, also when it raises.

    Raises:
        LayoutMismatch: the memory is not of that size.
        TransferError: its size is not sealed, or this process cannot map it.
    """
    num_bytes = num_blocks * layout.block_bytes
    try:
        held = os.fstat(share).st_size
        if held != num_bytes:
            raise LayoutMismatch(f"the peer shares {held} bytes, its layout says {num_bytes}")
        if not fcntl.fcntl(share, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise TransferError("the peer's shared memory is not sealed against shrinking")
        mapping = _map(share, num_bytes)
    except OSError as error:
        os.close(share)
        raise TransferError(f"cannot map the peer's KV memory: {error}") from error
    except TransferError:
        os.close(share)
        raise
    return _memory(layout, num_blocks, SharedPages(share, mapping))


def _map(share: int, num_bytes: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE  # page tables now, not at the first request
    return mmap.mmap(share, num_bytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)


def _memory(layout: KVLayout, num_blocks: int, pages: SharedPages) -> KVMemory:
    return KVMemory(
        layout=layout,
        num_blocks=num_blocks,
        address=pages.address,
        owner=pages,
        share=pages.share,
    )


def wrap(layout: KVLayout, num_blocks: int, *, address: int, owner: object) -> KVMemory:
    """Memory that somebody else allocated, for instance ``tensor.data_ptr()`` and the tensor."""
    return KVMemory(layout=layout, num_blocks=num_blocks, address=address, owner=owner)


def buffer(memory: KVMemory) -> memoryview:
    """All bytes of ``memory``, writable; valid while ``memory.owner`` lives."""
    if isinstance(memory.owner, SharedPages):
        return memoryview(memory.owner.mapping)
    array = (ctypes.c_ubyte * memory.num_bytes).from_address(memory.address)
    return memoryview(array).cast("B")
