"""The shape of KV cache on a rank, and a decode rank's promise to hold some of it.

Memory of a rank is layer-major: all blocks of layer 0, then all of layer 1, and so on. A block of
one layer is ``layer_block_bytes`` contiguous bytes, whatever the attention kind puts inside. Two
ranks can exchange blocks when their layouts are equal, or differ in the number of heads and layers
only, where one rank of several has a share of them; their number of blocks may differ.
"""

import hashlib
from typing import Literal

import msgspec

from protocol.errors import LayoutMismatch
from protocol.ids import AttemptRef, BlockId, Generation, WorkerRef

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """What one block of this model holds on one rank."""

    kind: Literal["gqa", "mla"]
    dtype: str
    num_layers: int
    block_tokens: int
    kv_heads: int  # 1 for mla
    key_width: int  # elements per token and head; for mla the latent and the roped part, 512 + 64
    value_width: int  # 0 for mla: values are read from the latent

    @property
    def layer_block_bytes(self) -> int:
        width = self.kv_heads * (self.key_width + self.value_width)
        return self.block_tokens * width * DTYPE_BYTES[self.dtype]

    @property
    def head_block_bytes(self) -> int:
        """The keys of one head in one block of one layer."""
        return self.block_tokens * self.key_width * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_block_bytes

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]


def heads_of_rank(rank: int, num_ranks: int, num_heads: int) -> range:
    """The KV heads that rank ``rank`` of a tensor-parallel group holds: neighbours in equal parts,
    and beyond one rank a head, neighbouring ranks the same head.

    Raises:
        LayoutMismatch: neither number divides the other.
    """
    if num_heads % num_ranks == 0:
        count = num_heads // num_ranks
        return range(rank * count, (rank + 1) * count)
    if num_ranks % num_heads == 0:
        head = rank * num_heads // num_ranks
        return range(head, head + 1)
    raise LayoutMismatch(
        f"{num_heads} KV heads cannot be split over {num_ranks} ranks; use a number of ranks that "
        "divides them or that they divide"
    )


def layers_of_stage(stage: int, num_stages: int, num_layers: int) -> range:
    """The layers of one of the stages that follow one another in a model: neighbours, as many as
    any other stage has or one more.

    Raises:
        LayoutMismatch: there is no such stage, or there would be one without layers.
    """
    if not 0 <= stage < num_stages <= num_layers:
        raise LayoutMismatch(
            f"stage {stage} of {num_stages} is no share of {num_layers} layers; use at most as "
            "many stages as the model has layers"
        )
    return range(stage * num_layers // num_stages, (stage + 1) * num_layers // num_stages)


class KVEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a decode rank accepts KV, one address per transport that it listens on.

    ``addresses`` maps a transport's name ("shm", "tcp") to an address that only this transport
    reads. ``host_id`` is equal on two ends exactly when they share a kernel, so shm can work,
    and ``process_id`` when they are one process. ``gpu`` is the GPU that holds the blocks and
    ``domain`` the NVLink domain that it belongs to; both may be empty.
    """

    host_id: str
    num_blocks: int
    addresses: dict[str, str]
    process_id: str = ""
    gpu: str = ""
    domain: str = ""


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """A decode rank's promise of blocks for one attempt, until committed, cancelled or expired.

    ``block_ids[i]`` is for tokens ``i * block_tokens ...`` of the prompt. ``generation`` is unique
    within the decode incarnation and is in every message about the grant.
    """

    ref: AttemptRef
    decode: WorkerRef
    generation: Generation
    block_ids: tuple[BlockId, ...]
    layout_digest: str
    endpoint: KVEndpoint
    lease_s: float
