"""The memory that holds one rank's KV cache, and how tokens' keys and values lie in it.

Memory is layer-major (``protocol.kv``): one block of one layer is ``layer_block_bytes`` contiguous
bytes. Inside, a ``gqa`` block is (2, kv_heads, block_tokens, width): keys, then values, each head's
tokens together, so that attention gathers whole rows; an ``mla`` block is (block_tokens, width).
Which block belongs to whom is not known here.
"""

# Shape suffixes: L layers   B blocks   K kinds of row   G KV heads   T tokens of a block
# D row width   N tokens   I, J any number of blocks   X bytes

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from protocol.kv import KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


Step = TypeVar("Step")
Plan = TypeVar("Plan")


class OncePerStep:
    """Keeps what was worked out for a step, so that its layers share it.

    Two entries: a step may pass the layers as two batches in turn.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, Any], ...] = ()

    def get(self, step: Step, build: Callable[[Step], Plan]) -> Plan:
        """``build(step)``, or what it returned if the step object is one of the last two."""
        for kept, known in self._kept:
            if kept is step:
                found: Plan = known
                return found
        plan = build(step)
        self._kept = ((step, plan), *self._kept[:1])
        return plan


class LayerCache:
    """The blocks of one layer as rows. Every tensor here is a view of the storage, never a copy.

    A block has ``row_kinds`` kinds of row (keys and values, or latents alone) for ``heads`` heads.
    """

    def __init__(self, layout: KVLayout, blocks: Tensor, plans: OncePerStep) -> None:
        self.block_tokens = layout.block_tokens
        self.keys_and_values = layout.kind == "gqa"  # else latents alone
        self.row_kinds = 2 if self.keys_and_values else 1
        self.heads = layout.kv_heads
        self.width = layout.key_width
        self.plans = plans  # shared by all layers
        self.block_rows = blocks.view(-1, layout.block_tokens * self.width)  # (B * K * G, T * D)
        self.token_rows = blocks.view(-1, self.width)  # (B * K * G * T, D)

    def rows_of_blocks(self, block_IJ: Tensor) -> Tensor:
        """Indexes into ``block_rows``: (K, I, G, J), so that a gather puts a head's tokens of
        the J blocks next to each other.
        """
        per_block = self.row_kinds * self.heads
        lanes_KG = torch.arange(per_block, device=block_IJ.device).view(self.row_kinds, -1)
        return block_IJ[None, :, None, :] * per_block + lanes_KG[:, None, :, None]

    def rows_of_slots(self, slot_mapping_N: Tensor) -> Tensor:
        """Indexes into ``token_rows``: (K, N * G)."""
        block_N = slot_mapping_N // self.block_tokens
        offset_N = slot_mapping_N % self.block_tokens
        lanes_KING = self.rows_of_blocks(block_N[:, None]).transpose(2, 3)
        return (lanes_KING * self.block_tokens + offset_N[:, None, None]).flatten(1)

    def write(self, rows_K: Sequence[Tensor], index_KN: Tensor) -> None:
        """Store new tokens: per kind of row (N, G, D) or, for one head, (N, D).

        ``index_KN`` is ``rows_of_slots`` of the tokens' slots.
        """
        for rows, index_N in zip(rows_K, index_KN, strict=True):
            self.token_rows.index_copy_(0, index_N, rows.reshape(-1, self.width))


class KVStorage:
    """All layers' blocks of one rank, in memory of its own or in a caller's buffer.

    Layers are numbered as in the model, of which the storage has those from ``first_layer`` on.
    ``buffer`` (CPU only) is a writable buffer such as a mapped file; it must hold
    ``num_blocks * layout.block_bytes`` finite numbers, such as zeros, and stay mapped while the
    storage lives.

    Raises:
        ValueError: the buffer is too small, or the layout is none that fits here.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        *,
        device: torch.device,
        buffer: Any = None,
        first_layer: int = 0,
    ) -> None:
        if layout.kind == "gqa" and layout.key_width != layout.value_width:
            raise ValueError(
                f"KVLayout.value_width is {layout.value_width}, which a gqa cache cannot hold "
                f"beside key_width {layout.key_width}: make them equal"
            )
        self.layout = layout
        self.num_blocks = num_blocks
        self.first_layer = first_layer
        num_bytes = num_blocks * layout.block_bytes
        # Zeros, because masked keys still take part with weight zero, and 0 * NaN is NaN.
        if buffer is None:
            flat_X = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        else:
            given = memoryview(buffer).nbytes
            if given < num_bytes:
                raise ValueError(
                    f"buffer has {given} bytes, but {num_blocks} blocks take {num_bytes} bytes"
                )
            flat_X = torch.frombuffer(buffer, dtype=torch.uint8, count=num_bytes)
        self._owner = buffer
        self._blocks_LBX = flat_X.view(layout.num_layers, num_blocks, layout.layer_block_bytes)
        plans = OncePerStep()
        self._layers = tuple(
            LayerCache(layout, layer_BX.view(DTYPES[layout.dtype]), plans)
            for layer_BX in self._blocks_LBX.unbind()
        )

    def layer(self, index: int) -> LayerCache:
        return self._layers[index - self.first_layer]

    def rows_of(self, layers: range) -> slice:
        """Where consecutive layers lie among those that are held."""
        return slice(layers.start - self.first_layer, layers.stop - self.first_layer)

    @property
    def memory_address(self) -> int:
        """Of the first byte; valid while the storage lives."""
        return self._blocks_LBX.data_ptr()

    def read_blocks(self, block_ids: Sequence[int], layers: range | None = None) -> Tensor:
        """A copy in host memory of the blocks: (L, B, layer_block_bytes) uint8, all layers or
        a range of consecutive ones. It waits for the device.
        """
        index_B = torch.tensor(block_ids, dtype=torch.int64, device=self._blocks_LBX.device)
        chosen = slice(None) if layers is None else self.rows_of(layers)
        return self._blocks_LBX[chosen].index_select(1, index_B).cpu()

    def write_blocks(self, block_ids: Sequence[int], contents_LBX: Tensor) -> None:
        """Put back, bit for bit, what ``read_blocks`` of as many blocks returned."""
        device = self._blocks_LBX.device
        index_B = torch.tensor(block_ids, dtype=torch.int64, device=device)
        self._blocks_LBX.index_copy_(1, index_B, contents_LBX.to(device))
