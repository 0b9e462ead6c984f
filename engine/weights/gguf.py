"""GGUF files of dense Llama models: header by our own walk, values by the ``gguf`` package.

Tensors appear under their Hugging Face names, and query and key rows in half-split order (the file
keeps rope pairs as neighbours).
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from engine.weights.gguf_header import GgufEntry, GgufHeader, map_gguf
from engine.weights.orders import half_split_rows
from engine.weights.source import WHOLE, Part

SAMPLE_BYTES = 4096
BLOCKS_AT_ONCE = 4096  # what unpacking needs besides its result then stays in the cache

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


class GgufFile:
    """A ``TensorSource`` over one GGUF file.

    Raises:
        ConfigError: it cannot be read, is not GGUF 2 or 3, or is shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = map_gguf(path)
        walk = GgufHeader(path, self._bytes)
        self._entries = walk.entries
        self.metadata: Mapping[str, object] = walk.metadata
        if (embedding := self.shape("model.embed_tokens.weight")) is not None:
            self.metadata = {"llama.vocab_size": embedding[0], **walk.metadata}
        self.tokenizer_digest = walk.tokenizer_digest
        self._header_bytes = walk.position
        self._rotated_heads = {
            "attn_q": self.metadata.get("llama.attention.head_count"),
            "attn_k": self.metadata.get("llama.attention.head_count_kv"),
        }

    @property
    def name(self) -> str:
        return str(self._path)

    def shape(self, tensor: str) -> tuple[int, ...] | None:
        entry = self._entries.get(_gguf_name(tensor))
        return None if entry is None else entry.shape

    def read(self, tensor: str, part: Part = WHOLE) -> Tensor:
        name = _gguf_name(tensor)
        entry = self._entries[name]
        heads = self._rotated_heads.get(name.split(".")[-2])
        if isinstance(heads, int):
            whole = half_split_rows(self._values(entry, WHOLE), heads=heads)
            return whole if part == WHOLE else whole[part.rows or slice(None)]
        return self._values(entry, part)

    def digest(self) -> str:
        middle = (self._header_bytes + len(self._bytes)) // 2
        digest = hashlib.sha256(str(len(self._bytes)).encode())
        digest.update(self._bytes[: self._header_bytes])
        digest.update(self._bytes[middle : middle + SAMPLE_BYTES])
        return digest.hexdigest()[:16]

    def close(self) -> None:
        del self._bytes  # unmapped when the last view of it is gone

    def _values(self, entry: GgufEntry, part: Part) -> Tensor:
        """Only the wanted rows are unpacked, and of columns only the wanted quantisation blocks."""
        packed = np.frombuffer(
            self._bytes, dtype=np.uint8, count=entry.num_bytes, offset=entry.offset
        ).reshape(*entry.shape[:-1], entry.row_bytes)
        if part.rows is not None:
            packed = packed[part.rows]
        start, stop, _ = (part.columns or slice(None)).indices(entry.shape[-1])
        per_block, block_bytes = GGML_QUANT_SIZES[entry.kind]
        first_block, last_block = start // per_block, -(-stop // per_block)
        packed = packed[..., first_block * block_bytes : last_block * block_bytes]
        values = _unpack(packed, entry.kind)
        first = start - first_block * per_block
        return values[..., first : first + stop - start]


def _unpack(packed: NDArray[np.uint8], kind: GGMLQuantizationType) -> Tensor:
    """float32 of an array of quantisation blocks, which the last axis holds side by side."""
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    shape = (*packed.shape[:-1], packed.shape[-1] // block_bytes * per_block)
    blocks = np.ascontiguousarray(packed).reshape(-1, block_bytes)
    values = np.empty((blocks.shape[0], per_block), dtype=np.float32)
    for first in range(0, blocks.shape[0], BLOCKS_AT_ONCE):
        some = blocks[first : first + BLOCKS_AT_ONCE]
        # As one row: the package takes many rows sixteen at a time, which is slower.
        unpacked = dequantize(some.reshape(1, -1), kind)
        values[first : first + BLOCKS_AT_ONCE] = unpacked.reshape(-1, per_block)
    return torch.from_numpy(values.reshape(shape))


def _gguf_name(tensor: str) -> str:
    match = LAYER_TENSOR.fullmatch(tensor)
    if match is None:
        return NAMES.get(tensor, tensor)
    return f"blk.{match[1]}.{LAYER_NAMES.get(match[2], match[2])}.weight"
