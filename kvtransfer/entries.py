"""One grant in the ledger, and the connections that fill it: one for each share."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.interface import Fence, TransferFailed
from kvtransfer.plan import Chunk
from kvtransfer.shares import Share
from kvtransfer.steps import ConnectionId
from protocol.errors import TransferError
from protocol.kv import Grant


@dataclass(slots=True, kw_only=True)
class Writer:
    """The connection that brings one share of a grant, which is of these layers."""

    layers: range
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
    writers: dict[Share, Writer] = field(default_factory=dict[Share, Writer])
    on_device: bool = False
    quarantined: bool = False
    payload: bytes = b""
    num_bytes: int = 0

    def writer(self, connection: ConnectionId) -> Writer | None:
        found = (w for w in self.writers.values() if w.connection == connection)
        return next(found, None)

    @property
    def parts(self) -> int:
        """How many shares of the heads there are; 0: nobody has opened it yet."""
        return next((share.parts for share in self.writers), 0)

    def is_divided_otherwise(self, share: Share) -> bool:
        """Others fill it in shares that do not make a whole with this one."""
        return any((of.parts, of.stages) != (share.parts, share.stages) for of in self.writers)

    @property
    def finished(self) -> bool:
        """Every share has come, and been said to be all."""
        ended = [share for share, writer in self.writers.items() if writer.finished]
        return bool(ended) and len(ended) == ended[0].senders

    def outside(self, chunk: Chunk, layers: range) -> str | None:
        """What is wrong with a chunk that names what the grant has not, or another than these
        layers; or None.
        """
        blocks = len(self.grant.block_ids)
        end = chunk.first_layer + chunk.num_layers
        if not (chunk.num_layers and layers.start <= chunk.first_layer and end <= layers.stop):
            return f"a chunk's layers are not within {layers.start} ... {layers.stop - 1}"
        if not chunk.num_blocks or chunk.first_block + chunk.num_blocks > blocks:
            return f"a chunk's blocks are not within the grant's {blocks}"
        return None

    def rows(self, writer: Writer, chunk: Chunk) -> Sequence[tuple[int, int]]:
        """Where the chunk's pieces are in what has arrived, layer by layer."""
        width, first = len(self.grant.block_ids), chunk.first_layer - writer.layers.start
        starts = (
            layer * width + chunk.first_block for layer in range(first, first + chunk.num_layers)
        )
        return [(start, start + chunk.num_blocks) for start in starts]

    def failure(self, error: TransferError) -> TransferFailed:
        return TransferFailed(ref=self.grant.ref, generation=self.grant.generation, error=error)
