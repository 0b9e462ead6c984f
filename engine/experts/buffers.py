"""How many bytes the exchange of expert rows takes, by arithmetic alone.

What a transport allocates is what is computed here, for the same row is described by the same
columns; so the sum can be printed, and checked against limits, before anything is allocated.
Pure: no torch.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

Payload = Literal["native", "bf16", "fp8"]
ALIGNMENT = 8  # of each column of a row, in bytes

_SLOT_BYTES = 4
_WEIGHT_BYTES = 4
_SCALE_BYTES = 4
_COUNT_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeShape:
    """What all ranks know of an exchange before it begins.

    ``max_tokens_per_rank`` None: any number may come, and buffers are taken as they are needed.
    """

    SCALED_TOGETHER: ClassVar[int] = 128  # values of a row that share a scale in fp8

    num_ranks: int
    slots_per_rank: int
    experts_per_token: int
    hidden: int
    element_bytes: int  # of the model's dtype
    max_tokens_per_rank: int | None
    numerics: Literal["exact", "fast"]
    payload: Payload = "native"
    on_gpu: bool = False
    queue_pair_depth: int = 1024  # of NVSHMEM

    @property
    def num_slots(self) -> int:
        return self.num_ranks * self.slots_per_rank

    @property
    def payload_rounds(self) -> bool:
        """Whether a row arrives with other values than it was sent with."""
        return self.payload == "fp8" or (self.payload == "bf16" and self.element_bytes > 2)  # noqa: PLR2004

    @property
    def column_bytes(self) -> tuple[int, ...]:
        """Of a dispatched row: values, scales, weights, slots."""
        values = {
            "native": (self.hidden * self.element_bytes,),
            "bf16": (self.hidden * 2,),
            "fp8": (self.hidden, self.hidden // self.SCALED_TOGETHER * _SCALE_BYTES),
        }[self.payload]
        weights = (self.experts_per_token * _WEIGHT_BYTES,) if self.numerics == "fast" else ()
        return (*values, *weights, self.experts_per_token * _SLOT_BYTES)

    @property
    def dispatch_row_bytes(self) -> int:
        return sum(aligned(width) for width in self.column_bytes)

    @property
    def result_row_bytes(self) -> int:
        """Results return in the model's dtype, or in bf16 where rows went in it."""
        return self.hidden * (2 if self.payload == "bf16" else self.element_bytes)

    @property
    def results_per_row(self) -> int:
        """Rows that an arrived row may send home."""
        return 1 if self.numerics == "fast" else min(self.experts_per_token, self.slots_per_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferRows:
    """Rows of the four buffers of one exchange: sent, arrived, sent home, come home."""

    sent: int
    arrived: int
    returned: int
    home: int

    def bytes_of(self, shape: ExchangeShape) -> int:
        rows = (self.sent + self.arrived) * shape.dispatch_row_bytes
        return rows + (self.returned + self.home) * shape.result_row_bytes


def buffer_rows(name: str, shape: ExchangeShape) -> BufferRows:
    """Of one exchange at the most tokens that there may be."""
    tokens = shape.max_tokens_per_rank
    assert tokens is not None
    everywhere = shape.num_ranks * tokens
    per_row = shape.results_per_row
    if name == "padded":
        return BufferRows(
            sent=everywhere,
            arrived=everywhere,
            returned=everywhere * per_row,
            home=everywhere * per_row,
        )
    if name == "all_gather":
        summed = shape.numerics == "fast"
        return BufferRows(
            sent=tokens,
            arrived=everywhere,
            returned=everywhere * per_row,
            home=tokens if summed else everywhere * per_row,
        )
    reached = min(shape.experts_per_token, shape.num_ranks)
    fast = shape.numerics == "fast"
    return BufferRows(
        sent=everywhere,
        arrived=everywhere,
        returned=everywhere * per_row,
        home=tokens * (reached if fast else shape.experts_per_token),
    )


def buffer_bytes(name: str, shape: ExchangeShape, *, in_flight: int = 1) -> int:
    """Bytes of the exchange's buffers on one rank; 0 for one rank, and where no bound is known.

    For ``padded`` and ``all_gather`` that is what is allocated, once for all layers. For
    ``all_to_all`` it is the most that one exchange can take. For the libraries it is what they ask
    for themselves, and the layer's own buffers.
    """
    if shape.num_ranks == 1 or shape.max_tokens_per_rank is None:
        return 0
    if name == "deepep":
        return deepep_bytes(shape)
    if name == "nccl_ep":
        return nccl_ep_bytes(shape) * in_flight
    return buffer_rows(name, shape).bytes_of(shape) * in_flight


def deepep_bytes(shape: ExchangeShape) -> int:
    """RDMA memory of DeepEP's low-latency mode, which holds two exchanges: for each, a send buffer,
    a receive buffer and counters. Every physical slot counts, replicas and empty ones too.
    """
    tokens = shape.max_tokens_per_rank
    assert tokens is not None
    scales = shape.hidden // ExchangeShape.SCALED_TOGETHER
    dispatched = 16 + max(2 * shape.hidden, shape.hidden + scales * _SCALE_BYTES)
    combined = scales * 4 + 2 * shape.hidden
    everything = shape.num_slots * tokens
    send = max(tokens * dispatched, everything * combined)
    receive = everything * max(dispatched, combined)
    counters = _up(shape.num_slots * 8 + shape.slots_per_rank * 4, 128)
    return _up(2 * (send + receive + counters) + 1, 128)


def nccl_ep_bytes(shape: ExchangeShape) -> int:
    """What this side gives to NCCL EP for one exchange: tokens, weights and slots from every rank,
    and as many results. NCCL EP's own staging comes on top.
    """
    tokens = shape.max_tokens_per_rank
    assert tokens is not None
    rows = shape.num_ranks * tokens
    arrived = rows * (2 * shape.hidden + shape.experts_per_token * (_WEIGHT_BYTES + 8))
    counts = shape.num_ranks * 4
    return arrived + rows * 2 * shape.hidden + tokens * 2 * shape.hidden + counts


def aligned(count: int) -> int:
    return _up(count, ALIGNMENT)


def _up(count: int, to: int) -> int:
    return -(-count // to) * to
