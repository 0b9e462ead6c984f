"""What a transport adds to a connection: how bytes get from the source's pages to the granted ones.

All transports share the handshake, the frames and the ledger, over a stream socket per pair of
workers. A carrier is one process's end of one transport. It does not know grants, and what it
cannot do on this machine it says by ``problem`` before anybody relies on it.
"""

import socket
from dataclasses import dataclass
from typing import Literal, Protocol

from kvtransfer.checksum import Checksum
from kvtransfer.handshake import Admitted, Connected, Payload
from kvtransfer.inlet import Inlet, Reader
from kvtransfer.interface import Fence, KVMemory
from kvtransfer.limits import TransferLimits
from kvtransfer.outlet import Outlet
from kvtransfer.shares import WHOLE, Share
from protocol.ids import WorkerRef
from protocol.kv import KVLayout

Transport = Literal["shm", "tcp", "nixl", "cuda_ipc", "nccl"]
TransportChoice = Literal["auto", "shm", "tcp", "nixl", "cuda_ipc", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """The prefill end of a connection that has been let in."""

    sock: socket.socket
    memory: KVMemory
    worker: WorkerRef
    connected: Connected
    limits: TransferLimits
    whole: KVLayout  # of the decode rank
    share: Share = WHOLE  # what ``memory`` has of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiving:
    """The decode end of a connection that has been let in."""

    sock: socket.socket
    reader: Reader
    memory: KVMemory
    checksum: Checksum
    payload: Payload
    worker: WorkerRef
    admitted: Admitted
    limits: TransferLimits

    @property
    def share(self) -> Share:
        """What the sender brings of every block."""
        return self.admitted.share


class Carrier(Protocol):
    @property
    def name(self) -> Transport: ...

    @property
    def control(self) -> Literal["unix", "tcp"]:
        """The kind of socket that frames travel on; ``unix`` implies one host."""
        ...

    @property
    def fence(self) -> Fence: ...

    @property
    def on_device(self) -> bool:
        """Whether it moves the pages of a GPU; otherwise those of the host."""
        ...

    def problem(self, memory: KVMemory) -> str | None:
        """Why this process cannot carry blocks of ``memory``, or None."""
        ...

    def prepare(self, memory: KVMemory, worker: WorkerRef) -> None:
        """Make what all outlets share, before a connection whose other end waits for it.

        Raises:
            ConfigError, TransferError: it cannot be made.
        """
        ...

    def outlet(self, sending: Sending) -> Outlet:
        """
        Raises:
            ServingError, OSError: the peer cannot be reached this way.
        """
        ...

    def inlet(self, receiving: Receiving) -> Inlet:
        """Raises as ``outlet``."""
        ...

    def close(self) -> None:
        """Give back what all connections share; they have ended."""
        ...
