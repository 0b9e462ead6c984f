"""The memory that the ranks of one life share, and how they come by it.

It is an anonymous memfd of the first rank's, sealed against changes of size, which the others open
through ``/proc``; no name is left behind when processes are killed. Its first words say whose it
is: the epoch and the roll's random number, so nothing of another life is ever mapped.
"""

import ctypes
import fcntl
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.cpu.channels import ring_offset
from engine.one_host.whereabouts import Whereabouts

VERSION = 1
_HEADER = struct.Struct("=8sqqqqq")
_MAGIC = b"hdrcrows"
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_BYTES_OF_RANK = 4 << 20  # of rings out of a rank, which are backed by pages as they are used
_LEAST_RING, _MOST_RING = 16 << 10, 256 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What tells one group of ranks from all others."""

    epoch: int
    number: int
    size: int

    @property
    def ring_bytes(self) -> int:
        share = _BYTES_OF_RANK // self.size
        return min(max(1 << (share.bit_length() - 1), _LEAST_RING), _MOST_RING)

    @property
    def num_bytes(self) -> int:
        return ring_offset(self.size) + self.size**2 * self.ring_bytes

    def header(self) -> bytes:
        return _HEADER.pack(_MAGIC, VERSION, self.epoch, self.number, self.size, self.ring_bytes)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """Where the first rank's memory is; or why there is none."""

    pid: int
    descriptor: int
    failure: str = ""


class Segment:
    """A mapping of the memory of ``life``; it goes when the last reference goes."""

    def __init__(self, life: Life, descriptor: int) -> None:
        """Takes ``descriptor`` over, also when it raises.

        Raises:
            OSError: it cannot be mapped, or is not of this life.
        """
        try:
            _check(life, descriptor)
            self._mapping = mmap.mmap(descriptor, life.num_bytes)
        finally:
            os.close(descriptor)
        self.life = life
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))


def create(life: Life) -> int:
    """A descriptor of new memory, all zeros behind the header.

    Raises:
        OSError: there is no such memory here.
    """
    descriptor = os.memfd_create("headrace-rows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, life.num_bytes)
        os.pwrite(descriptor, life.header(), 0)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def opened(offer: Offer, life: Life, owner: Whereabouts) -> Segment:
    """The memory that ``owner``, a process of this host, offers.

    Raises:
        OSError: it cannot be reached from here, or is not of this life.
    """
    if offer.failure:
        raise OSError(offer.failure)
    if offer.pid != owner.pid:
        raise OSError("another process than the first rank offers memory")
    path = Path(f"/proc/{offer.pid}/fd/{offer.descriptor}")
    return Segment(life, os.open(path, os.O_RDWR | os.O_CLOEXEC))


def _check(life: Life, descriptor: int) -> None:
    if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise OSError("the memory is not sealed against shrinking")
    if os.fstat(descriptor).st_size != life.num_bytes:
        raise OSError("the memory is not of the size that this group needs")
    if os.pread(descriptor, _HEADER.size, 0) != life.header():
        raise OSError("the memory is another group's")
