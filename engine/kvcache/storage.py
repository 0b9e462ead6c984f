"""The memory that holds one rank's KV cache, and how tokens' keys and values lie in it.

Memory is layer-major (``protocol.kv``): one block of one layer is ``layer_block_bytes`` contiguous
bytes. Inside, a ``gqa`` block is (2, kv_heads, block_tokens, width): keys, then values, each head's
tokens together, so that attention gathers whole rows; an ``mla`` block is (block_tokens, width).
Which block belongs to whom is not known here.
"""

# Shape suffixes: B blocks   L layers   N tokens   G KV heads   T tokens of a block   D head width
# C latent and roped width   X bytes

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from protocol.kv import KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LayerCache:
    """The blocks of one layer. Every tensor here is a view of the storage, never a copy."""

    def __init__(self, layout: KVLayout, blocks: Tensor) -> None:
        self.layout = layout
        self.block_tokens = layout.block_tokens
        self.blocks = blocks  # (B, 2, G, T, D) for gqa, (B, T, C) for mla

    def write_gqa(self, key_NGD: Tensor, value_NGD: Tensor, slot_mapping_N: Tensor) -> None:
        """Store each token's key and value at its slot, block_id * block_tokens + offset."""
        block_N = slot_mapping_N // self.block_tokens
        offset_N = slot_mapping_N % self.block_tokens
        self.blocks[block_N, 0, :, offset_N] = key_NGD
        self.blocks[block_N, 1, :, offset_N] = value_NGD

    def write_mla(self, row_NC: Tensor, slot_mapping_N: Tensor) -> None:
        """Store each token's cat(latent, roped key) at its slot."""
        self.blocks.view(-1, row_NC.shape[-1]).index_copy_(0, slot_mapping_N, row_NC)


class KVStorage:
    """All layers' blocks of one rank, in memory of its own or in a caller's buffer.

    ``buffer`` (CPU only) is a writable buffer such as a mapped file; it must hold
    ``num_blocks * layout.block_bytes`` and stay mapped while the storage lives.
    """

    def __init__(
        self, layout: KVLayout, num_blocks: int, *, device: torch.device, buffer: Any = None
    ) -> None:
        if layout.kind == "gqa" and layout.key_width != layout.value_width:
            raise ValueError(
                f"KVLayout.value_width is {layout.value_width}, which a gqa cache cannot hold "
                f"beside key_width {layout.key_width}: make them equal"
            )
        self.layout = layout
        self.num_blocks = num_blocks
        num_bytes = num_blocks * layout.block_bytes
        if buffer is None:
            flat_X = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        else:
            flat_X = torch.frombuffer(buffer, dtype=torch.uint8, count=num_bytes)
        self._owner = buffer
        self._blocks_LBX = flat_X.view(layout.num_layers, num_blocks, layout.layer_block_bytes)
        shape: tuple[int, ...] = (num_blocks, layout.block_tokens, layout.key_width)
        if layout.kind == "gqa":
            shape = (num_blocks, 2, layout.kv_heads, layout.block_tokens, layout.key_width)
        self._layers = tuple(
            LayerCache(layout, layer_BX.view(DTYPES[layout.dtype]).view(shape))
            for layer_BX in self._blocks_LBX.unbind()
        )

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    @property
    def memory_address(self) -> int:
        """Of the first byte; valid while the storage lives."""
        return self._blocks_LBX.data_ptr()

    def read_blocks(self, block_ids: Sequence[int]) -> Tensor:
        """A copy in host memory of all layers of the blocks: (L, B, layer_block_bytes) uint8."""
        index_B = torch.tensor(block_ids, dtype=torch.int64, device=self._blocks_LBX.device)
        return self._blocks_LBX.index_select(1, index_B).cpu()

    def write_blocks(self, block_ids: Sequence[int], contents_LBX: Tensor) -> None:
        """Put back, bit for bit, what ``read_blocks`` of as many blocks returned."""
        device = self._blocks_LBX.device
        index_B = torch.tensor(block_ids, dtype=torch.int64, device=device)
        self._blocks_LBX.index_copy_(1, index_B, contents_LBX.to(device))
