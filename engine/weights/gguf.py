"""GGUF files of dense Llama models: header by our own walk, values by the ``gguf`` package.

The package's reader makes an array object of every vocabulary entry, 3.5 s for 49152 tokens; the
walk here skips them in milliseconds, and finds a truncated file before anything is allocated.
Format: github.com/ggml-org/ggml, docs/gguf.md. Tensors appear under their Hugging Face names, and
query and key rows in half-split order (the file keeps rope pairs as neighbours).
"""

import hashlib
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from engine.weights.orders import half_split_rows
from engine.weights.source import WHOLE, Part
from protocol.errors import ConfigError

SAMPLE_BYTES = 4096
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")  # by type

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


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # from the start of the file

    @property
    def row_bytes(self) -> int:
        per_block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // per_block * block_bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class GgufFile:
    """A ``TensorSource`` over one GGUF file.

    Raises:
        ConfigError: it cannot be read, is not GGUF 2 or 3, or is shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        walk = _Walk(path, self._bytes)
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

    def _values(self, entry: _Entry, part: Part) -> Tensor:
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
        values = dequantize(np.ascontiguousarray(packed), entry.kind)
        first = start - first_block * per_block
        wanted = values[..., first : first + stop - start]
        # float32 values come back as a view of the file, which torch may not write to.
        return torch.from_numpy(wanted if wanted.flags.writeable else wanted.copy())


class _Walk:
    """One pass over the header. ``position`` ends where tensor data begins."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.position = 0
        self.metadata: dict[str, object] = {}
        self.entries: dict[str, _Entry] = {}
        tokenizer = hashlib.sha256()
        try:
            self._check_magic()
            num_tensors, num_values = self._scalar("<Q"), self._scalar("<Q")
            for _ in range(num_values):
                start = self.position
                key = self._string()
                self.metadata[key] = self._value(self._scalar("<I"))
                if key.startswith("tokenizer."):
                    tokenizer.update(data[start : self.position])
            described = [self._tensor() for _ in range(num_tensors)]
        except (struct.error, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{path}: header is truncated or corrupt at byte {self.position}: {error}"
            ) from error
        self.tokenizer_digest = tokenizer.hexdigest()[:16]
        self._place(described)

    def _check_magic(self) -> None:
        if self._data[:4] != b"GGUF":
            raise ConfigError(f"{self._path}: is not a GGUF file")
        self.position = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ConfigError(f"{self._path}: is GGUF version {version}; 2 and 3 are supported")

    def _scalar(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self._data, self.position)
        self.position += struct.calcsize(layout)
        return value  # type: ignore[no-any-return]  # callers ask for what they expect

    def _string(self) -> str:
        start = self._skip_string()
        return self._data[start : self.position].decode()

    def _skip_string(self) -> int:
        length = self._scalar("<Q")
        start = self.position
        if length > len(self._data) - start:
            raise struct.error(f"a string of {length} bytes does not fit")
        self.position += length
        return start

    def _value(self, kind: int) -> object:
        """A scalar or a string; of an array only its length, as nobody here needs the entries."""
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(self._layout(kind))
        item_kind, length = self._scalar("<I"), self._scalar("<Q")
        if item_kind == STRING:
            for _ in range(length):
                self._skip_string()
        else:
            self.position += length * struct.calcsize(self._layout(item_kind))
        return _ArrayLength(length)

    def _layout(self, kind: int) -> str:
        if kind >= len(SCALARS) or not SCALARS[kind]:
            raise struct.error(f"unknown value type {kind}")
        return SCALARS[kind]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise struct.error(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))
        kind = self._scalar("<I")
        return name, shape[::-1], kind, self._scalar("<Q")  # the file lists the last axis first

    def _place(self, described: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ConfigError(f"{self._path}: key 'general.alignment' is {alignment!r}")
        self.position = -(-self.position // alignment) * alignment
        for name, shape, kind, offset in described:
            if kind not in GGMLQuantizationType._value2member_map_:
                raise ConfigError(f"{self._path}: tensor {name} is of unknown type {kind}")
            entry = _Entry(shape, GGMLQuantizationType(kind), self.position + offset)
            if shape[-1] % GGML_QUANT_SIZES[entry.kind][0]:
                raise ConfigError(f"{self._path}: tensor {name} has rows of broken blocks")
            if entry.offset + entry.num_bytes > len(self._data):
                raise ConfigError(
                    f"{self._path}: is truncated: tensor {name} ends at byte "
                    f"{entry.offset + entry.num_bytes}, the file has {len(self._data)}"
                )
            self.entries[name] = entry


@dataclass(frozen=True, slots=True)
class _ArrayLength:
    """Stands for a metadata array that was skipped."""

    length: int


def _gguf_name(tensor: str) -> str:
    match = LAYER_TENSOR.fullmatch(tensor)
    if match is None:
        return NAMES.get(tensor, tensor)
    return f"blk.{match[1]}.{LAYER_NAMES.get(match[2], match[2])}.weight"
