"""A host copy of a rank's blocks, for a device whose memory the transports cannot reach.

The mirror has the storage's blocks under the same ids and the same layer-major layout. Which copy
is the newer one follows from the role: a prefill rank stores, a decode rank loads.
"""

# Shape suffixes: L layers   B blocks   X bytes of one block of one layer

from collections.abc import Sequence
from typing import Any

import torch

from engine.kvcache.storage import KVStorage


class HostMirror:
    def __init__(self, storage: KVStorage, buffer: Any) -> None:
        """``buffer`` is writable host memory of ``num_blocks * layout.block_bytes``."""
        layout = storage.layout
        self._storage = storage
        self._host_LBX = torch.frombuffer(buffer, dtype=torch.uint8).view(
            layout.num_layers, storage.num_blocks, layout.layer_block_bytes
        )

    def store(self, layers: range, block_ids: Sequence[int]) -> None:
        """Device to host. On return the host copy is complete; it waits for the device."""
        contents_LBX = self._storage.read_blocks(block_ids, layers)
        self._host_LBX[self._storage.rows_of(layers), torch.tensor(block_ids)] = contents_LBX

    def load(self, block_ids: Sequence[int]) -> None:
        """Host to device, all layers; queued on the current stream, before what comes next."""
        self._storage.write_blocks(block_ids, self._host_LBX[:, torch.tensor(block_ids)])
