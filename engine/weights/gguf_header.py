"""The header of a GGUF file: its metadata, and where each tensor's bytes lie. No torch.

The ``gguf`` package's reader makes an array object of every vocabulary entry, 3.5 s for 49152
tokens; the walk here skips them in milliseconds, and finds a truncated file before anything is
allocated. Format: github.com/ggml-org/ggml, docs/gguf.md. Tensors have the names of the file.
"""

import hashlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from protocol.errors import ConfigError

MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", "", "", "<Q", "<q", "<d")  # by type


@dataclass(frozen=True, slots=True)
class GgufEntry:
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


def map_gguf(path: Path) -> mmap.mmap:
    """The file's bytes, read when touched.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


class GgufHeader:
    """One pass over the header. ``position`` ends where tensor data begins.

    Raises:
        ConfigError: it is not GGUF 2 or 3, or the file is shorter than its header says.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self.position = 0
        self.metadata: dict[str, object] = {}
        self.entries: dict[str, GgufEntry] = {}
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
        """A scalar or a string; of an array only where it is, as few readers need the entries."""
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(self._layout(kind))
        item_kind, length = self._scalar("<I"), self._scalar("<Q")
        start = self.position
        if item_kind == STRING:
            for _ in range(length):
                self._skip_string()
        else:
            self.position += length * struct.calcsize(self._layout(item_kind))
        return _Array(item_kind, length, start)

    def strings(self, key: str) -> list[str]:
        """The entries of an array of strings; the file must still be mapped.

        Raises:
            ConfigError: the file has no such array.
        """
        array = self._array(key, kinds=(STRING,))
        self.position = array.start
        return [self._string() for _ in range(array.length)]

    def integers(self, key: str) -> tuple[int, ...]:
        """The entries of an array of integers; as ``strings``."""
        array = self._array(key, kinds=(4, 5))
        code = SCALARS[array.item_kind][-1]
        return struct.unpack_from(f"<{array.length}{code}", self._data, array.start)

    def _array(self, key: str, *, kinds: tuple[int, ...]) -> "_Array":
        found = self.metadata.get(key)
        if not isinstance(found, _Array) or found.item_kind not in kinds:
            raise ConfigError(f"{self._path}: key '{key}' is missing, or not an array of its kind")
        return found

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
            entry = GgufEntry(shape, GGMLQuantizationType(kind), self.position + offset)
            if shape[-1] % GGML_QUANT_SIZES[entry.kind][0]:
                raise ConfigError(f"{self._path}: tensor {name} has rows of broken blocks")
            if entry.offset + entry.num_bytes > len(self._data):
                raise ConfigError(
                    f"{self._path}: is truncated: tensor {name} ends at byte "
                    f"{entry.offset + entry.num_bytes}, the file has {len(self._data)}"
                )
            self.entries[name] = entry


@dataclass(frozen=True, slots=True)
class _Array:
    """Stands for a metadata array that was skipped."""

    item_kind: int
    length: int
    start: int  # byte of the first entry
