"""One grant in the ledger, and the connections that fill it: one for each share of the heads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.interface import Fence, TransferFailed
from kvtransfer.plan import Chunk
from kvtransfer.steps import ConnectionId
from protocol.errors import TransferError
from protocol.kv import Grant


@dataclass(slots=True, kw_only=True)
class Writer:
    """The connection that brings one part of a grant."""

    connection: ConnectionId
    fence: Fence
    arrived: bytearray  # (layers x blocks), 1 where the piece has arrived and matched
    missing: int
    copying: bool = False  # the receiver is writing a chunk into the pages
    finished: bool = False
    quiet: bool = False  # it is proven to write nothing more


@dataclass(slots=True, kw_only=True)
class Entry:
    grant: Grant
    writers: dict[int, Writer] = field(default_factory=dict[int, Writer])  # by part
    parts: int = 0  # 0: nobody has opened it yet
    on_device: bool = False
    quarantined: bool = False
    payload: bytes = b""
    num_bytes: int = 0

    def writer(self, connection: ConnectionId) -> Writer | None:
        found = (w for w in self.writers.values() if w.connection == connection)
        return next(found, None)

    def outside(self, chunk: Chunk, num_layers: int) -> str | None:
        """What is wrong with a chunk that names what the grant has not, or None."""
        blocks = len(self.grant.block_ids)
        if not chunk.num_layers or chunk.first_layer + chunk.num_layers > num_layers:
            return f"a chunk's layers are not within the model's {num_layers}"
        if not chunk.num_blocks or chunk.first_block + chunk.num_blocks > blocks:
            return f"a chunk's blocks are not within the grant's {blocks}"
        return None

    def rows(self, chunk: Chunk) -> Sequence[tuple[int, int]]:
        """Where the chunk's pieces are in ``arrived``, layer by layer."""
        width = len(self.grant.block_ids)
        starts = (
            layer * width + chunk.first_block
            for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers)
        )
        return [(start, start + chunk.num_blocks) for start in starts]

    def failure(self, error: TransferError) -> TransferFailed:
        return TransferFailed(ref=self.grant.ref, generation=self.grant.generation, error=error)
